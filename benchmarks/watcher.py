"""How late a task resumes that awaits a kernel, and what the waiting costs.

Compares this package with what is written by hand today. A kernel does nothing but take a known
time; a wait is a kernel enqueued and awaited. Waits are all of one length, or of irregular
ones, from 0.1 to 1.9 times that. They come one after the other, on one stream or on four
streams at once; or a thousand kernels are enqueued and awaited up front.

Polling at a fixed interval meets the ends of kernels of a fixed length soon or late by chance,
so judge it by the irregular ones. CPU is that of all threads, with what launching takes.
On CUDA, lateness includes what it took to start the kernel. Without a GPU the device is the
simulated one of the tests, which needs a C++ compiler, and whose threads count as CPU, too.
"""

from __future__ import annotations

import asyncio
import importlib
import random
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from statistics import quantiles
from time import monotonic, process_time
from typing import Any, NamedTuple

import torch

import torchfut_aio
from torchfut_aio import PollPolicy

from ._bench import Case, Figures, run

ROUNDS, DRAWN, BY = 3, "", "waits"
DEVICE = "cuda" if torch.cuda.is_available() else "sim"
STREAMS = 4
MANY = 1_000
WARM_UP = 5  # waits on each stream that do not count


def launch(device: Any, stream: torch.Stream, seconds: float) -> Callable[[], float]:
    """Enqueues a kernel, and returns what tells when the stream's latest finished."""
    if DEVICE == "sim":
        with stream:
            device.sleep(seconds)
        return lambda: float(device.finished_at(stream))
    launched = monotonic()
    begin, end = (torch.Event(DEVICE, enable_timing=True) for _ in range(2))
    with stream:
        begin.record(stream)
        device.sleep(seconds)
        end.record(stream)
    return lambda: launched + begin.elapsed_time(end) / 1e3


# --------------------------------------- ways to wait for a kernel that takes some seconds


async def synchronize(stream: torch.Stream, _: float) -> None:
    await torchfut_aio.synchronize(stream)


async def polling(interval: float, stream: torch.Stream, _: float) -> None:
    event = torch.Event(stream.device)
    event.record(stream)
    while not event.query():  # noqa: ASYNC110
        await asyncio.sleep(interval)


async def thread(stream: torch.Stream, _: float) -> None:
    event = torch.Event(stream.device)
    event.record(stream)
    await asyncio.get_running_loop().run_in_executor(None, event.synchronize)


async def floor(stream: torch.Stream, seconds: float) -> None:
    await asyncio.sleep(seconds)  # this one knows how long
    stream.synchronize()


OURS, BLOCKING = "synchronize", "synchronize, blocking"
WAYS: dict[str, Callable[[torch.Stream, float], Awaitable[None]]] = {
    OURS: synchronize,
    BLOCKING: synchronize,
    "sleep(0.001) polling": partial(polling, 0.001),
    "sleep(0) spinning": partial(polling, 0),
    "event.synchronize thread": thread,
    "floor: the loop's timer": floor,
}

# ---------------------------------------------------------------------------- measuring


class Waits(NamedTuple):
    """Waits of one kind: how long in seconds, how many pending at a time and in all."""

    length: float
    irregular: bool
    pending: int
    count: int

    def __str__(self) -> str:
        pattern = "irregular" if self.irregular else "regular"
        return f"{self.length * 1e3:g} ms, {pattern}, {self.pending:,} pending"

    def lengths(self) -> list[float]:
        """Return the length of each wait, and of those that do not count, which come first."""
        rng = random.Random(1)
        count = self.count + WARM_UP * STREAMS
        factors = (rng.uniform(0.1, 1.9) if self.irregular else 1 for _ in range(count))
        return [self.length * factor for factor in factors]


async def watcher(device: Any, name: str, waits: Waits) -> Figures:
    late: list[float] = []
    streams = [torch.Stream(DEVICE) for _ in range(min(STREAMS, waits.pending))]
    lengths = waits.lengths()
    warm_up, lengths = lengths[: -waits.count], lengths[-waits.count :]

    async def one_by_one(stream: torch.Stream, lengths: list[float]) -> None:
        for seconds in lengths:
            finished = launch(device, stream, seconds)
            await WAYS[name](stream, seconds)
            late.append(monotonic() - finished())

    torchfut_aio.set_poll_policy(PollPolicy(blocking=name == BLOCKING))
    await asyncio.gather(*(one_by_one(each, warm_up[n::STREAMS]) for n, each in enumerate(streams)))
    late.clear()
    begin = process_time()
    # A task enqueues its first kernel, and records an event behind it, before the next begins.
    shares = [lengths[n :: waits.pending] for n in range(waits.pending)]
    await asyncio.gather(
        *(one_by_one(streams[n % STREAMS], share) for n, share in enumerate(shares))
    )
    cpu = process_time() - begin
    at = quantiles(late, n=100, method="inclusive")
    figures = {"Microseconds of CPU for a wait": cpu / waits.count * 1e6}
    if waits.pending <= STREAMS:  # or nobody knows when each finished
        after = "Microseconds from a kernel's end until its task resumes"
        figures |= {f"{after}, p50": at[49] * 1e6, f"{after}, p99": at[98] * 1e6}
    return {(f"{title}, device {DEVICE}", str(waits)): figures[title] for title in figures}


def cases(quick: bool) -> Iterator[Case]:
    device = importlib.import_module(
        "tests.cuda_device" if DEVICE == "cuda" else "tests.simulated_device"
    )
    device.reset_counters()  # on CUDA this measures the clock
    counts = {0.2: 50, 5: 20} if quick else {0.2: 300, 1: 300, 5: 100, 20: 30}
    few = [
        Waits(ms / 1e3, irregular, pending, counts[ms] * pending)
        for ms in counts
        for irregular in (False, True)
        for pending in ((1,) if quick else (1, STREAMS))
    ]
    for waits in [*few, Waits(0.001, True, MANY, MANY)]:
        yield {name: partial(run, "asyncio", watcher, device, name, waits) for name in WAYS}

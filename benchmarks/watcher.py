"""How late a task resumes that awaits a kernel, and how much CPU the wait takes.

A kernel does nothing but take a known time; a wait is a kernel enqueued and awaited. Waits have
one length, or irregular ones, from 0.1 to 1.9 times that. They follow each other, on one stream or
on four at once; or a thousand kernels are enqueued and awaited up front.

Polling at a fixed interval meets the ends of kernels of a fixed length soon or late by chance, so
compare the irregular ones. CPU is that of all threads, and includes the launches. On CUDA, lateness
includes the start of the kernel. Without a GPU, the device is the simulated one of the tests, which
needs a C++ compiler, and whose threads count as CPU.
"""

from __future__ import annotations

import asyncio
import importlib
import random
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from time import monotonic, process_time
from typing import Any

import torch

import torchfut_aio
from torchfut_aio import PollPolicy

from ._bench import Case, Figures, percentiles, run

ROUNDS, BY = 3, ""
PLOTS = {"watcher": "p50", "watcher-cpu": "CPU"}
DEVICE = "cuda" if torch.cuda.is_available() else "sim"
STREAMS = 4
MANY = 1_000
WARM_UP = 5  # waits on each stream that do not count


def launch(device: Any, stream: torch.Stream, seconds: float) -> Callable[[], float]:
    """Enqueue a kernel; return a function that returns when it finished."""
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


# Ways to wait for a kernel that takes some seconds.


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


async def timer(stream: torch.Stream, seconds: float) -> None:
    await asyncio.sleep(seconds)  # which no program knows
    stream.synchronize()


BLOCKING = "synchronize, blocking"
WAYS: dict[str, Callable[[torch.Stream, float], Awaitable[None]]] = {
    "synchronize": synchronize,
    BLOCKING: synchronize,
    "sleep(0.001) polling": partial(polling, 0.001),
    "sleep(0) spinning": partial(polling, 0),
    "event.synchronize thread": thread,
    "floor: the loop's timer": timer,
}


async def watcher(
    device: Any, name: str, milliseconds: float, pattern: str, pending: int, count: int
) -> Figures:
    late: list[float] = []
    streams = [torch.Stream(DEVICE) for _ in range(min(STREAMS, pending))]
    rng = random.Random(1)
    factors = (
        rng.uniform(0.1, 1.9) if pattern == "irregular" else 1
        for _ in range(WARM_UP * STREAMS + count)
    )
    lengths = [milliseconds / 1e3 * factor for factor in factors]
    warm_up, lengths = lengths[:-count], lengths[-count:]

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
    shares = [lengths[n::pending] for n in range(pending)]
    await asyncio.gather(
        *(one_by_one(streams[n % STREAMS], share) for n, share in enumerate(shares))
    )
    figures = {"Microseconds of CPU for a wait": (process_time() - begin) / count * 1e6}
    if pending <= STREAMS:  # with more, only the end of a stream's last kernel is known
        title = "Microseconds from a kernel's end until its task resumes, {}"
        figures |= percentiles(title, late, 1e-6)
    column = f"{milliseconds:g} ms, {pattern}, {pending:,} pending"
    return {(f"{title}, device {DEVICE}", column): figures[title] for title in figures}


def cases(quick: bool) -> Iterator[Case]:
    device = importlib.import_module(
        "tests.cuda_device" if DEVICE == "cuda" else "tests.simulated_device"
    )
    device.reset_counters()  # on CUDA this measures the clock
    counts = {0.2: 50, 5: 20} if quick else {0.2: 300, 1: 300, 5: 100, 20: 30}
    kinds = [
        (length, pattern, pending, counts[length] * pending)
        for length in counts
        for pattern in ("regular", "irregular")
        for pending in ((1,) if quick else (1, STREAMS))
    ]
    for waits in [*kinds, (1, "irregular", MANY, MANY)]:
        yield {name: partial(run, "asyncio", watcher, device, name, *waits) for name in WAYS}

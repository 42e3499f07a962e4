"""How late a task resumes that awaits a kernel, and what the waiting costs.

Compares this package with what is written by hand today. A kernel does nothing but take a known
time; a wait is a kernel enqueued and awaited. Waits are all of one length, or of irregular
ones, from 0.1 to 1.9 times that. They come one after the other, on one stream or on four
streams at once; or a thousand kernels are enqueued and awaited up front.

Polling at a fixed interval meets the ends of kernels of a fixed length soon or late by chance,
so judge it by the irregular ones. A heartbeat tells for how long the loop was held up. CPU is of
one core, with what launching takes, as in the floor. Without a GPU the device is the simulated
one of the tests, which needs a C++ compiler.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import partial
from statistics import quantiles
from time import monotonic, process_time
from typing import NamedTuple

import torch

import torchfut_aio
from torchfut_aio import PollPolicy

from ._bench import Bench, Case, run

STREAMS = 4
MANY = 1_000
WARM_UP = 5  # waits on each stream that do not count
HEARTBEAT = 0.01  # seconds

# ------------------------------------------------------------------------------ devices


class Simulated:
    """The accelerator of host threads that the tests use."""

    note = "On the simulated device, whose threads count as CPU, too."

    def __init__(self) -> None:
        import tests.simulated_device as sim

        self._sim = sim
        self.streams = [torch.Stream("sim") for _ in range(STREAMS)]

    def launch(self, stream: torch.Stream, seconds: float) -> Callable[[], float]:
        """Enqueues a kernel, and returns what tells when the stream's latest finished."""
        with stream:
            self._sim.sleep(seconds)
        return lambda: self._sim.finished_at(stream)


class Cuda:
    """The current GPU."""

    note = "On CUDA: lateness includes what it took to start the kernel."

    def __init__(self) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        self.streams = [torch.Stream("cuda") for _ in range(STREAMS)]
        for cycles in (10**9, 10**8):  # the first is for the GPU's clock to speed up
            begin, end = self._sleep(self.streams[0], cycles)
            end.synchronize()
            self._cycles_per_second = cycles / begin.elapsed_time(end) * 1e3

    def launch(self, stream: torch.Stream, seconds: float) -> Callable[[], float]:
        """Enqueues a kernel, and returns what tells when it finished, if none was before it."""
        launched = monotonic()
        begin, end = self._sleep(stream, round(seconds * self._cycles_per_second))
        return lambda: launched + begin.elapsed_time(end) / 1e3

    def _sleep(self, stream: torch.Stream, cycles: int) -> tuple[torch.Event, torch.Event]:
        begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        with stream:
            begin.record(stream)
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
            end.record(stream)
        return begin, end


Device = Simulated | Cuda

# --------------------------------------- ways to wait for a kernel that takes some seconds


async def synchronize(stream: torch.Stream, _: float) -> None:
    await torchfut_aio.synchronize(stream)


async def polling(stream: torch.Stream, _: float, interval: float = 0.001) -> None:
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


Way = Callable[[torch.Stream, float], Awaitable[None]]
OURS, BLOCKING = "synchronize", "synchronize, blocking"
WAYS: dict[str, tuple[Way, PollPolicy]] = {
    OURS: (synchronize, PollPolicy()),
    BLOCKING: (synchronize, PollPolicy(blocking=True)),
    "sleep(0.001) polling": (polling, PollPolicy()),
    "sleep(0) spinning": (partial(polling, interval=0), PollPolicy()),
    "event.synchronize thread": (thread, PollPolicy()),
    "floor: the loop's timer": (floor, PollPolicy()),
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
        """Returns the length of each wait, and of those that do not count, which come first."""
        rng = random.Random(1)
        count = self.count + WARM_UP * STREAMS
        factors = (rng.uniform(0.1, 1.9) if self.irregular else 1 for _ in range(count))
        return [self.length * factor for factor in factors]


async def measure(device: Device, way: Way, waits: Waits) -> list[float]:
    """Returns us of CPU a wait, ms of lag, and us late at p50 and p99."""
    late: list[float] = []
    lags: list[float] = []
    streams = device.streams[: waits.pending]
    lengths = waits.lengths()
    warm_up, lengths = lengths[: -waits.count], lengths[-waits.count :]

    async def one_by_one(stream: torch.Stream, lengths: list[float]) -> None:
        for seconds in lengths:
            finished = device.launch(stream, seconds)
            await way(stream, seconds)
            late.append(monotonic() - finished())

    async def beat() -> None:
        while True:
            due = monotonic() + HEARTBEAT
            await asyncio.sleep(HEARTBEAT)
            lags.append(monotonic() - due)

    await asyncio.gather(
        *(one_by_one(stream, warm_up[n::STREAMS]) for n, stream in enumerate(streams))
    )
    late.clear()
    heart = asyncio.ensure_future(beat())
    await asyncio.sleep(0)
    begin = process_time()
    # A task enqueues its first kernel, and records an event behind it, before the next begins.
    shares = [lengths[n :: waits.pending] for n in range(waits.pending)]
    await asyncio.gather(
        *(one_by_one(streams[n % STREAMS], share) for n, share in enumerate(shares))
    )
    cpu = process_time() - begin
    heart.cancel()
    at = quantiles(late, n=100, method="inclusive")
    figures = [cpu / waits.count * 1e6, max(lags, default=0) * 1e3]
    # Where several are enqueued on a stream, nobody knows when each finished.
    return figures if waits.pending > STREAMS else [*figures, at[49] * 1e6, at[98] * 1e6]


def with_policy(loop: str, device: Device, name: str, waits: Waits) -> list[float]:
    way, policy = WAYS[name]
    before = torchfut_aio.set_poll_policy(policy)
    try:
        figures: list[float] = run(loop, measure, device, way, waits)
        return figures
    finally:
        torchfut_aio.set_poll_policy(before)


def all_waits(quick: bool) -> list[Waits]:
    counts = {0.2: 50, 5: 20} if quick else {0.2: 300, 1: 300, 5: 100, 20: 30}
    few = [
        Waits(ms / 1e3, irregular, pending, counts[ms] * pending)
        for ms in counts
        for irregular in (False, True)
        for pending in ((1,) if quick else (1, STREAMS))
    ]
    many = [Waits(0.001, True, pending, MANY) for pending in (STREAMS, MANY)]
    return few + many[quick:]


def main(bench: Bench) -> None:
    device = Cuda() if torch.cuda.is_available() else Simulated()
    bench.notes.append(device.note)
    for loop in bench.loops("asyncio"):
        table = partial(bench.table, x="a wait", ours=(OURS, BLOCKING))
        late = [
            table(f"How late a task resumes after its kernel, {at}, {loop}", unit="microseconds")
            for at in ("p50", "p99")
        ]
        others = [
            table(f"CPU of a wait, {loop}", unit="microseconds"),
            table(f"The most that the heartbeat was late, {loop}", unit="milliseconds"),
        ]
        for waits in all_waits(bench.quick):
            tables = others if waits.pending > STREAMS else [*others, *late]
            peers = {name: partial(with_policy, loop, device, name, waits) for name in WAYS}
            bench.cases.append(Case([(table, str(waits)) for table in tables], peers))
        late[0].plot = "5 ms, irregular, 1 pending"
    bench.measure(rounds=3)

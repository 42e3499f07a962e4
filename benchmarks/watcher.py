"""How late a task resumes that awaits a kernel, and what the waiting costs.

    python -m benchmarks.watcher [--device sim|cuda] [--loop asyncio|uvloop] [--quick] [--rounds N]

Compares this package with what is written by hand today. A kernel does nothing but take
a known time; a wait is a kernel enqueued and awaited. Waits are all of one length, or of
irregular ones, from 0.1 to 1.9 times that. They come one after the other, on one stream
or on four streams at once; or a thousand kernels are enqueued and awaited up front.

Every run has a fresh event loop, and begins with a few waits that do not count. Polling
at a fixed interval meets the ends of kernels of a fixed length soon or late by chance, so
judge it by the irregular ones. The simulated device needs a C++ compiler.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Awaitable, Callable
from functools import partial
from math import nan
from statistics import median, quantiles
from time import monotonic, process_time
from typing import NamedTuple

import torch

import torchfut_aio
from torchfut_aio import PollPolicy

from ._options import Options
from ._plot import bars
from ._report import Report
from ._rounds import Progress, rotated
from ._ways import run

STREAMS = 4
MANY = 1_000
WARM_UP = 5  # waits on each stream that do not count
HEARTBEAT = 0.01  # seconds

# ------------------------------------------------------------------------------ devices


class Simulated:
    """The accelerator of host threads that the tests use."""

    note = "the device tells when a kernel finished; its threads count as CPU, too"

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

    note = (
        "a kernel finished, by the host's clock, when it was launched plus the time between\n"
        "two timing events around it: so latencies include what it took to start it"
    )

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

# ---- ways to wait for a kernel that takes some seconds; each returns how many queries it made


async def synchronize(stream: torch.Stream, _: float) -> int:
    await torchfut_aio.synchronize(stream)
    return 0  # the statistics tell


async def polling(stream: torch.Stream, _: float, interval: float = 0.001) -> int:
    event = torch.Event(stream.device)
    event.record(stream)
    queries = 1
    while not event.query():
        await asyncio.sleep(interval)
        queries += 1
    return queries


async def thread(stream: torch.Stream, _: float) -> int:
    event = torch.Event(stream.device)
    event.record(stream)
    await asyncio.get_running_loop().run_in_executor(None, event.synchronize)
    return 0


async def floor(stream: torch.Stream, seconds: float) -> int:
    await asyncio.sleep(seconds)  # this one knows how long
    stream.synchronize()
    return 0


Way = Callable[[torch.Stream, float], Awaitable[int]]
OURS, BASE, FLOOR = "synchronize", "sleep(0.001) polling", "floor: the loop's timer"
WAYS: dict[str, tuple[Way, PollPolicy]] = {
    OURS: (synchronize, PollPolicy()),
    "synchronize, blocking": (synchronize, PollPolicy(blocking=True)),
    BASE: (polling, PollPolicy()),
    "sleep(0) spinning": (partial(polling, interval=0), PollPolicy()),
    "event.synchronize thread": (thread, PollPolicy()),
    FLOOR: (floor, PollPolicy()),
}

# ---------------------------------------------------------------------------- measuring


class Cell(NamedTuple):
    """Waits of one kind: their length in seconds, and how many are pending at a time."""

    length: float
    irregular: bool
    pending: int
    waits: int

    def __str__(self) -> str:
        pattern = "irregular" if self.irregular else "periodic"
        return f"{self.length * 1e3:g} ms {pattern}, {self.pending:,} pending"

    def lengths(self, seed: int) -> list[float]:
        """Returns the length of each wait, and of those that do not count, which come first."""
        rng = random.Random(seed)
        count = self.waits + WARM_UP * STREAMS
        factors = (rng.uniform(0.1, 1.9) if self.irregular else 1 for _ in range(count))
        return [self.length * factor for factor in factors]


class Run(NamedTuple):
    """What one way took for the waits of a cell, in seconds."""

    late: list[float]
    cpu: float
    wall: float
    lag: float
    queries: int


async def measure(device: Device, way: Way, cell: Cell, seed: int) -> Run:
    late: list[float] = []
    lag = 0.0
    streams = device.streams[: cell.pending]
    lengths = cell.lengths(seed)
    warm_up, lengths = lengths[: -cell.waits], lengths[-cell.waits :]

    async def one_by_one(stream: torch.Stream, lengths: list[float]) -> int:
        queries = 0
        for seconds in lengths:
            finished = device.launch(stream, seconds)
            queries += await way(stream, seconds)
            # Where several are enqueued on a stream, nobody knows when each finished.
            late.append(monotonic() - finished() if cell.pending <= STREAMS else nan)
        return queries

    async def beat() -> None:
        nonlocal lag
        while True:
            due = monotonic() + HEARTBEAT
            await asyncio.sleep(HEARTBEAT)
            lag = max(lag, monotonic() - due)

    await asyncio.gather(
        *(one_by_one(stream, warm_up[n::STREAMS]) for n, stream in enumerate(streams))
    )
    late.clear()
    heart = asyncio.ensure_future(beat())
    await asyncio.sleep(0)
    before = torchfut_aio.statistics().queries
    cpu, wall = process_time(), monotonic()
    # A task enqueues its first kernel, and records an event behind it, before the next begins.
    shares = [lengths[n :: cell.pending] for n in range(cell.pending)]
    queries = await asyncio.gather(
        *(one_by_one(streams[n % STREAMS], share) for n, share in enumerate(shares))
    )
    cpu, wall = process_time() - cpu, monotonic() - wall
    heart.cancel()
    of_ours = torchfut_aio.statistics().queries - before
    return Run(late, cpu, wall, lag, sum(queries) + of_ours)


Results = dict[Cell, dict[str, list[Run]]]


def measure_all(device: Device, cells: list[Cell], rounds: int, loop: str) -> Results:
    results: Results = {cell: {name: [] for name in WAYS} for cell in cells}
    progress = Progress(rounds * len(cells) * len(WAYS))
    for n in range(rounds):
        for cell in cells:
            for name in rotated(list(WAYS), n):
                way, policy = WAYS[name]
                before = torchfut_aio.set_poll_policy(policy)
                results[cell][name].append(run(loop, measure, device, way, cell, n))
                torchfut_aio.set_poll_policy(before)
                progress.step()
    return results


# ---------------------------------------------------------------------------- reporting


def late(runs: list[Run], percentile: int) -> float:
    pooled = [late for run in runs for late in run.late]
    return quantiles(pooled, n=100, method="inclusive")[percentile - 1] * 1e6


def cpu(runs: list[Run]) -> float:
    return median(run.cpu for run in runs) * 1e3


def print_cell(cell: Cell, ways: dict[str, list[Run]]) -> None:
    print(f"\n{cell!s:31}p50 us   p99 us  CPU %  lag ms  queries    p50 x  CPU x")
    for name, runs in ways.items():
        p50, p99 = late(runs, 50), late(runs, 99)
        share = median(run.cpu / run.wall for run in runs) * 100
        lag = median(run.lag for run in runs) * 1e3
        queries = median(run.queries for run in runs) / cell.waits
        p50_x, cpu_x = p50 / late(ways[BASE], 50), cpu(runs) / cpu(ways[BASE])
        print(
            f"  {name:26} {p50:8.0f} {p99:8.0f} {share:6.1f} {lag:7.1f} {queries:8.1f} "
            f"{p50_x:8.2f} {cpu_x:6.2f}"
        )


def print_verdict(results: Results) -> None:
    print(f"\nVERDICT: {OURS} against {BASE}\n{'late, in us; CPU, in ms':28}", end="")
    print("   p50       of     x   p99 x    CPU   of    x   floor")
    for cell, ways in results.items():
        if cell.length in (0.0002, 0.005, 0.02) and cell.waits != MANY:
            ours, base = ways[OURS], ways[BASE]
            p50, base50 = late(ours, 50), late(base, 50)
            print(
                f"  {cell!s:26} {p50:6.0f} {base50:8.0f} {p50 / base50:5.2f} "
                f"{late(ours, 99) / late(base, 99):7.2f} {cpu(ours):6.0f} {cpu(base):4.0f} "
                f"{cpu(ours) / cpu(base):4.2f} {cpu(ways[FLOOR]):7.0f}"
            )
    print(f"\nCPU of {MANY:,} waits, in ms; of the same ones, {STREAMS} pending at a time; x")
    for cell, ways in results.items():
        if cell.pending == MANY:
            few = results[cell._replace(pending=STREAMS)]
            for name, runs in ways.items():
                many, four = cpu(runs), cpu(few[name])
                print(f"  {cell!s:30} {name:26} {many:7.0f} {four:6.0f} {many / four:6.2f}")


def cells_of(quick: bool) -> list[Cell]:
    waits = {0.2: 300, 1: 300, 5: 100, 20: 30, 100: 7}  # by milliseconds
    many = [(1, False), (1, True), (5, False)]
    if quick:
        waits = {0.2: 100, 5: 40, 20: 12}
        many = many[:1]
    few = [
        Cell(ms / 1e3, irregular, pending, waits[ms] * pending)
        for ms in waits
        for irregular in (False, True)
        for pending in ((1,) if quick else (1, STREAMS))
    ]
    return few + [
        Cell(ms / 1e3, irregular, pending, MANY)
        for ms, irregular in many
        for pending in (STREAMS, MANY)
    ]


def fill_tables(report: Report, results: Results) -> None:
    """Gives the report a sample of each run."""
    p50, p99, share, lag, queries = (
        report.table(title, unit, x="waits", ours=OURS)
        for title, unit in (
            ("late, p50 of a run", "us"),
            ("late, p99 of a run", "us"),
            ("CPU of a run", "% of one core"),
            ("the most that the heartbeat was late in a run", "ms"),
            ("queries of events", "a wait"),
        )
    )
    for cell, ways in results.items():
        for name, runs in ways.items():
            for one in runs:
                if cell.pending <= STREAMS:
                    p50.add(name, str(cell), late([one], 50))
                    p99.add(name, str(cell), late([one], 99))
                share.add(name, str(cell), one.cpu / one.wall * 100)
                lag.add(name, str(cell), one.lag * 1e3)
                queries.add(name, str(cell), one.queries / cell.waits)


def plot_of(results: Results, device: str, loop: str, rounds: int) -> str:
    groups = {
        str(cell): {name: [late([run], 50) for run in runs] for name, runs in ways.items()}
        for cell, ways in results.items()
        if cell.irregular and cell.pending == 1
    }
    return bars(
        "How late a task resumes after its kernel",
        f"{device}, {loop}; p50, medians and quartiles of {rounds} rounds; less is better",
        "microseconds",
        groups,
        ours=OURS,
        bound=FLOOR,
    )


def main() -> None:
    parser = Options("watcher", __doc__, rounds=3, loops=("asyncio", "uvloop"), one_loop=True)
    default = "cuda" if torch.cuda.is_available() else "sim"
    parser.add_argument("--device", choices=["sim", "cuda"], default=default)
    options = parser.parse()
    report = Report("watcher", options)
    device = Cuda() if options.device == "cuda" else Simulated()
    report.notes.append(f"{options.device}, {options.loop}; {device.note}")
    print(
        f"\n{report.notes[0]}\n"
        "late: from when a kernel finished until its task goes on (p50, p99). CPU: of one core,\n"
        "with what launching and a heartbeat take, as in the floor. lag: the most that the\n"
        "heartbeat was late, of which the loop's timer is 1 or 2 ms. queries: of events, per\n"
        f"wait. x: compared with {BASE}"
    )
    gc.collect()
    gc.freeze()  # so that nobody waits while all that torch imported is looked through
    results = measure_all(device, cells_of(options.quick), options.rounds, options.loop)
    for cell, ways in results.items():
        print_cell(cell, ways)
    print_verdict(results)
    fill_tables(report, results)
    report.plot("", plot_of(results, options.device, options.loop, options.rounds))
    report.save()


if __name__ == "__main__":
    main()

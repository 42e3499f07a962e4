"""What pending awaits cost, and how that grows from ten to a million of them.

    python -m benchmarks.scale [--loop asyncio|uvloop] [--quick] [--rounds N]

Tasks each await a future of their own. Time: of starting such a task until it waits, with the
future made first; of completing all futures in one other thread until the last task has
resumed; of cancelling all tasks until the last has ended. Threads: how many more there are
while all are pending, and once all tasks have been cancelled. Small numbers are repeated
on the same loop until there are a thousand, to be measurable.

Memory is measured in a process of its own, whose Python allocates with malloc, as C++ does:
so glibc counts each byte of both, and nothing is estimated. It is measured on top of a few
hundred that are pending already, which take what lay around in free lists, and what a loop
needs once. An asyncio future is what a loop cannot do without; the task that awaits is the
same for all, and is counted, too.

`run_in_executor` needs a thread for each pending await, so it is not asked for as many.
A million takes up to 7 GB, and is left out where these are not free.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

from ._options import Options
from ._plot import lines
from ._report import Report, Table
from ._rounds import Case, measure
from ._ways import (
    Way,
    floor,
    hand_written_bridge,
    ours,
    producers,
    run,
    run_in_executor,
    wrap_future,
)

PLAIN = "asyncio.Future"
THREADS = "run_in_executor"
WAYS: dict[str, Callable[[], Way]] = {
    "await fut": ours,
    "bridge by hand": hand_written_bridge,
    "asyncio.wrap_future": wrap_future,
    THREADS: run_in_executor,
    PLAIN: floor,  # completed by one wake-up a batch
}
MOST_THREADS = 1_000
MEASURABLE = 1_000
UNCOUNTED = 400  # pending before those whose bytes are counted
MEMORY_EACH = 7_000  # bytes, more than any needs, even while it is cancelled
BYTES_GOAL = 1.2  # times those of an asyncio future

# ------------------------------------------------------------------------ time and threads


class Pending:
    """Tasks that each await a future."""

    def __init__(self, way: Way, count: int) -> None:
        self._way, self._count = way, count
        self._waiting = self._ended = 0
        self._all_wait, self._all_ended = asyncio.Event(), asyncio.Event()
        self._last = 0.0
        self.futures: list[Any] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def _task(self, fut: Any) -> None:
        self._waiting += 1
        if self._waiting == self._count:
            self._all_wait.set()
        try:
            await self._way.wait(fut)
        finally:
            self._ended += 1
            if self._ended == self._count:
                self._last = perf_counter()
                self._all_ended.set()

    async def start(self) -> float:
        """Starts the tasks, and returns how long it took until all wait."""
        create_task, task = asyncio.get_running_loop().create_task, self._task
        begin = perf_counter()
        self.futures = [self._way.new() for _ in range(self._count)]
        self._tasks = [create_task(task(fut)) for fut in self.futures]
        await self._all_wait.wait()
        return perf_counter() - begin

    async def complete(self, hand_out: Callable[[list[list[Any]]], None]) -> float:
        """Completes the futures, and returns how long it took until all tasks had ended."""
        begin = perf_counter()
        hand_out([self.futures])
        await self._all_ended.wait()
        for task in self._tasks:
            task.result()  # which it has
        return self._last - begin

    async def cancel(self) -> float:
        """Cancels the tasks, and returns how long it took until all had ended."""
        begin = perf_counter()
        for task in self._tasks:
            task.cancel()
        await self._all_ended.wait()
        assert all(task.cancelled() for task in self._tasks)
        return self._last - begin


async def costs(way_of: Callable[[], Way], count: int) -> list[float]:
    """Returns us to start, complete and cancel each, and threads while pending and after."""
    way = way_of()
    times = -(-MEASURABLE // count)
    starting = completing = cancelling = 0.0
    with producers(way.complete, 1) as hand_out:
        before = threading.active_count()
        for _ in range(times):
            with enough_threads(count):
                pending = Pending(way, count)
                starting += await pending.start()
                completing += await pending.complete(hand_out)
            with enough_threads(count):
                pending = Pending(way, count)
                await pending.start()
                threads = threading.active_count() - before
                cancelling += await pending.cancel()
                left = threading.active_count() - before
                if way_of is run_in_executor:  # or its threads would wait for ever
                    hand_out([pending.futures])
    seconds = (starting, completing, cancelling)
    return [*(total / times / count * 1e6 for total in seconds), threads, left]


@contextmanager
def enough_threads(count: int) -> Iterator[None]:
    """Gives the loop an executor that starts up to ``count`` threads, as they are needed."""
    with ThreadPoolExecutor(count) as executor:
        asyncio.get_running_loop().set_default_executor(executor)
        yield


# ---------------------------------------------------------------------------------- memory


class _MallInfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


_mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc 2.33 and newer
if _mallinfo2:
    _mallinfo2.restype = _MallInfo2


def bytes_in_use() -> int:
    """Returns how many bytes malloc has handed out and not got back, in this process."""
    info = _mallinfo2()
    return info.uordblks + info.hblkhd


async def bytes_each(way_of: Callable[[], Way], count: int) -> tuple[float, float]:
    """Returns bytes of a future and the task that awaits it, and of the latter alone."""
    way = way_of()
    create_task = asyncio.get_running_loop().create_task

    async def task(fut: Any) -> None:
        await way.wait(fut)

    def made(number: int) -> int:
        for n in range(number):
            futures[n] = way.new()
        return bytes_in_use()

    async def started(number: int) -> int:
        for n in range(number):
            tasks[n] = create_task(task(futures[n]))
        await asyncio.sleep(0)  # each of them is waiting now
        return bytes_in_use()

    gc.collect()
    futures: list[Any] = [None] * UNCOUNTED
    tasks: list[Any] = [None] * UNCOUNTED
    made(UNCOUNTED)
    await started(UNCOUNTED)
    uncounted = [*futures, *tasks]
    futures, tasks = [None] * count, [None] * count
    before = bytes_in_use()
    with_futures = made(count)
    with_all = await started(count)
    del uncounted
    return (with_all - before) / count, (with_all - with_futures) / count


def print_bytes(loop: str, counts: list[int]) -> None:
    """Prints what `bytes_each` returns, for each way and count, as JSON."""
    gc.disable()  # it would take most of the time, and find nothing
    measured = [
        (name, count, *run(loop, bytes_each, way, count))
        for name, way in WAYS.items()
        if name != THREADS
        for count in counts
    ]
    print(json.dumps(measured))


def measured_bytes(loop: str, counts: list[int]) -> list[tuple[str, int, float, float]]:
    """Returns what `print_bytes` prints in a process that allocates with malloc."""
    if not _mallinfo2:
        return []
    code = f"from benchmarks.scale import print_bytes; print_bytes({loop!r}, {counts!r})"
    environment = os.environ | {
        "PYTHONMALLOC": "malloc",
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",  # what lies there counts as handed out
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True
    )
    measured: list[tuple[str, int, float, float]] = json.loads(done.stdout)
    return measured


# ------------------------------------------------------------------------------- reporting


def main() -> None:
    parser = Options("scale", __doc__, rounds=5, loops=("asyncio", "uvloop"), one_loop=True)
    options = parser.parse()
    loop, rounds = options.loop, options.rounds
    report = Report("scale", options)
    counts = [10, 100, 1_000] if options.quick else [10**power for power in range(1, 7)]
    if counts[-1] * MEMORY_EACH > (free := free_memory()):
        report.notes.append(f"{counts.pop():,} are left out: only {free / 1e9:.1f} GB are free")
    most_threads = 100 if options.quick else MOST_THREADS
    report.notes.append(
        f"{THREADS} needs a thread for each pending await: not more than {most_threads:,}."
    )

    table = partial(report.table, x="pending")
    start = table(f"{loop}: to make a future and start a task that awaits it", "us each")
    complete = table(f"{loop}: to complete all in another thread, and resume", "us each")
    cancel = table(f"{loop}: to cancel all", "us each")
    threads = table(f"{loop}: threads more, while all are pending", "threads")
    left = table(f"{loop}: threads more, after all have been cancelled", "threads")
    size = table(f"{loop}: a pending future and the task that awaits it", "bytes each")
    added = table(f"{loop}: the task that awaits it alone", "bytes each")
    for name, count, of_both, of_task in measured_bytes(loop, counts):
        size.add(name, count, of_both)
        added.add(name, count, of_task)
    if not size.samples:
        report.notes.append("Memory is not measured: that takes glibc 2.33 or newer.")
    cases = []
    for count in counts:
        names = [name for name in WAYS if name != THREADS or count <= most_threads]
        peers = {name: partial(run, loop, costs, WAYS[name], count) for name in names}
        # The largest take minutes a round, and vary the least.
        at_most = 3 if count >= 1_000_000 else rounds
        cases.append(Case(count, [start, complete, cancel, threads, left], peers, at_most))
    measure(cases, rounds)

    set_goals(report, counts, size, threads)
    of_rounds = f"medians and quartiles of {rounds} rounds"
    size_title = "Memory of a pending future and of the task that awaits it"
    size_note = "what malloc has handed out, for Python and C++"
    complete_title = "To complete all in another thread, until all have resumed"
    cancel_title = "To cancel all tasks, until all have ended"
    for slug, measured, unit, title, note in (
        ("bytes", size, "bytes each", size_title, size_note),
        ("complete", complete, "microseconds each", complete_title, of_rounds),
        ("cancel", cancel, "microseconds each", cancel_title, of_rounds),
    ):
        if measured.samples:
            note = f"{loop}; {note}; less is better"
            plot = partial(lines, title, note, "pending awaits", unit, measured.samples)
            report.plot(slug, plot(ours="await fut", bound=PLAIN))
    report.finish()


def set_goals(report: Report, counts: list[int], size: Table, threads: Table) -> None:
    if size.samples:
        for count in counts:
            text = f"bytes of future and task, {count:,} pending, times {PLAIN}"
            report.goal(text, 1 / size.gain(PLAIN, count), at_most=BYTES_GOAL)
        each = [size.at(count)["await fut"][0] for count in counts]
        text = f"bytes each, {counts[0]:,} to {counts[-1]:,} pending, most by least"
        report.goal(text, max(each) / min(each), at_most=1.1)
    most = max(max(samples) for samples in threads.samples["await fut"].values())
    report.goal("threads more, while all are pending", most, at_most=0)


def free_memory() -> int:
    """Returns how many bytes can be had without swapping."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()

"""What pending awaits cost, and how that grows from ten to a million of them.

Tasks each await a future of their own. Time: of making a future and starting such a task, until
it waits; of completing all futures in one other thread, in one go, until the last task has
resumed; of cancelling all tasks, until the last has ended. Small numbers are repeated on the
same loop, to be measurable. Threads: how many more there are while all are pending.
A thread in fut.wait() is needed for each, by `run_in_executor`, so it is not asked for as many.

Memory is what a fresh process grows by, in pages, when so many more futures are made and awaited
by tasks: Python's and C++'s objects alike. A million takes up to 7 GB.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ._bench import Bench, Case, run
from ._report import Table
from ._waves import Wave, native_tasks, producers
from ._ways import BARE, BRIDGE, FLOOR, SET_RESULT, SET_RESULTS, THREAD, WRAP, way, ways

WITH_MEMORY = (SET_RESULT, BARE, BRIDGE, WRAP)
MOST_THREADS = 1_000
MEASURABLE = 1_000
MEMORY_EACH = 7_000  # bytes, more than any needs, even while it is cancelled


async def costs(loop: str, name: str, count: int) -> list[float]:
    """Returns microseconds to start, complete and cancel each, and threads while pending."""
    this = way(loop, name)
    times = -(-MEASURABLE // count)
    starting = completing = cancelling = threads = 0.0
    with producers(this) as hand_out:
        before = threading.active_count()

        def count_threads() -> None:
            nonlocal threads
            threads = threading.active_count() - before

        for _ in range(times):
            if name == THREAD:
                asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(count))
            seconds = await Wave(loop, this, count, nothing).complete(hand_out)
            starting += seconds[0]
            completing += seconds[1]
            wave = Wave(loop, this, count, nothing)
            cancelling += await wave.cancel(count_threads)
            if name == THREAD:  # or its threads would wait for ever
                hand_out(wave.futures)
    seconds_of_all = (starting, completing, cancelling)
    return [*(total / times / count * 1e6 for total in seconds_of_all), threads]


def nothing(_: object) -> None:
    pass


# ---------------------------------------------------------------------------------- memory


def pages_of_this_process() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


async def bytes_each(loop: str, name: str, count: int) -> float:
    this = way(loop, name)
    kept: list[Any] = []

    async def task(fut: Any) -> None:
        await this.wait(fut)

    async def grow(start_soon: Callable[..., object], more: int) -> int:
        for _ in range(more):
            kept.append(this.new())
            start_soon(task, kept[-1])
        await asyncio.sleep(0)  # each of them is waiting now
        return pages_of_this_process()

    gc.disable()  # it would take most of the time, and find nothing
    async with native_tasks(loop) as (start_soon, cancel):
        before = await grow(start_soon, count // 10)  # what lay around free is used up
        pages = await grow(start_soon, count) - before
        cancel()
    return pages * os.sysconf("SC_PAGE_SIZE") / count


def memory(loop: str, name: str, count: int) -> list[float]:
    code = (
        "from benchmarks.scale import *; "
        f"print(run({loop!r}, bytes_each, {loop!r}, {name!r}, {count}))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return [float(done.stdout)]


def add_memory(bench: Bench, table: Table, loop: str) -> None:
    if not Path("/proc/self/statm").exists():
        bench.notes.append("Memory is measured on Linux only.")
        return
    count = 10_000 if bench.quick else 100_000
    peers = {name: partial(memory, loop, name, count) for name in WITH_MEMORY}
    bench.cases.append(Case([(table, count)], peers, at_most=3))


def main(bench: Bench) -> None:
    counts = [10, 100] if bench.quick else [10**power for power in range(1, 7)]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if counts[-1] * MEMORY_EACH > free:
        bench.notes.append(f"{counts.pop():,} are left out: only {free / 1e9:.1f} GB are free.")
    for loop in bench.loops("asyncio"):
        table = partial(bench.table, x="pending awaits", ours=(SET_RESULT, SET_RESULTS))
        each = partial(table, unit="microseconds each")
        start = each(f"To make a future and start a task that awaits it, on {loop}")
        complete = each(
            f"To complete all in another thread, until all resumed, on {loop}", plot=True
        )
        cancel = each(f"To cancel all, on {loop}")
        threads = table(f"More threads while all are pending, on {loop}", unit="threads")
        size = table(f"A pending future and the task that awaits it, on {loop}", unit="bytes each")
        for count in counts:
            peers = {
                name: partial(run, loop, costs, loop, name, count)
                for name in ways(loop)
                if name != FLOOR and (name != THREAD or count <= MOST_THREADS)
            }
            # The largest take minutes a round, and vary the least.
            at_most = 3 if count >= 1_000_000 else 5
            cells = [(table, count) for table in (start, complete, cancel, threads)]
            bench.cases.append(Case(cells, peers, at_most))
        add_memory(bench, size, loop)
    bench.measure(rounds=5)

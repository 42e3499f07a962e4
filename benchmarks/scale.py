"""What pending awaits cost, and how that grows from ten to a million of them.

Tasks each await a future of their own. Time: of making a future and starting such a task, until
it waits; of completing all futures in one other thread, in one go, until the last task has
resumed; of cancelling all tasks, until the last has ended. Small numbers are repeated on the
same loop, to be measurable. A thread in fut.wait() is needed for each, by `run_in_executor`, so it
is not asked for as many.

Memory is what a fresh process grows by, in pages, when 100,000 more futures are made and awaited
by tasks: Python's and C++'s objects alike. Linux only. A million at once takes up to 7 GB.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import anyio

from ._bench import Case, Figures, run
from ._waves import native_tasks, producers, wave
from ._ways import BARE, BRIDGE, FLOOR, SET_RESULT, THREAD, WRAP, way, ways

ROUNDS, DRAWN, BY = 3, "complete", "futures"
MOST_THREADS = 1_000
MEASURABLE = 1_000


async def scale(name: str, count: int) -> Figures:
    this = way("asyncio", name)
    seconds: list[list[float]] = [[], [], []]
    pending: list[Any] = []

    def cancel_all(futures: list[Any], cancel: Callable[[], object]) -> None:
        pending.append(futures)
        cancel()

    with anyio.fail_after(600), producers(this) as hand_out:
        for _ in range(-(-MEASURABLE // count)):
            if name == THREAD:
                asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(count))
            start, complete = await wave("asyncio", this, count, hand_out, nothing)
            _, cancel = await wave("asyncio", this, count, cancel_all, nothing)
            for all_of_it, took in zip(seconds, (start, complete, cancel), strict=True):
                all_of_it.append(took)
            if name == THREAD:  # or its threads would wait for ever
                hand_out(pending[-1])
            pending.clear()
    title = "Pending awaits, and microseconds to {} each of them"
    return {
        (title.format(what), count): mean(took) / count * 1e6
        for what, took in zip(("start", "complete", "cancel"), seconds, strict=True)
    }


def nothing(_: object) -> None:
    pass


def pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


async def bytes_each(name: str, count: int) -> float:
    this = way("asyncio", name)
    kept: list[Any] = []

    async def task(fut: Any) -> None:
        await this.wait(fut)

    async def grow(start_soon: Callable[..., object], more: int) -> int:
        for _ in range(more):
            kept.append(this.new())
            start_soon(task, kept[-1])
        await asyncio.sleep(0)  # each of them is waiting now
        return pages()

    gc.disable()  # it would take most of the time, and find nothing
    async with native_tasks("asyncio") as (start_soon, cancel):
        before = await grow(start_soon, count // 10)  # what lay around free is used up
        grown = await grow(start_soon, count) - before
        cancel()
    return grown * os.sysconf("SC_PAGE_SIZE") / count


def memory(name: str, count: int) -> Figures:
    code = f"from benchmarks.scale import *; print(run('asyncio', bytes_each, {name!r}, {count}))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return {("Pending awaits, and bytes of each with its task", count): float(done.stdout)}


def cases(quick: bool) -> Iterator[Case]:
    for count in [10, 100] if quick else [10**power for power in range(1, 7)]:
        names = [name for name in ways("asyncio") if name != THREAD or count <= MOST_THREADS]
        yield {name: partial(run, "asyncio", scale, name, count) for name in names if name != FLOOR}
    count = 10_000 if quick else 100_000
    yield {name: partial(memory, name, count) for name in (SET_RESULT, BARE, BRIDGE, WRAP)}

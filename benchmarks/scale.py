"""What pending awaits cost, and how that grows from ten to a million of them.

Tasks await a future each. Time: to make a future and start such a task, until it waits; to
complete all futures in another thread, in one go, until the last task has resumed; to cancel all
tasks, until the last has ended. Small numbers are repeated on the same loop, to be measurable.
`run_in_executor` is left out: it needs a thread for each.

Memory is the growth of a fresh process, in pages, when 100,000 more futures are made and awaited
by tasks: the objects of Python and of C++. Linux only. A million at once takes up to 7 GB.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from functools import partial
from statistics import mean
from typing import Any

import anyio
import psutil

from ._bench import Case, Figures, run, run_in_process
from ._waves import native_tasks, producers, wave
from ._ways import BARE, BRIDGE, FLOOR, SET_RESULT, THREAD, WAYS, WRAP, way

ROUNDS, BY = 3, "pending awaits"
PLOTS = {"scale": "start|complete"}
MEASURABLE = 1_000


async def scale(name: str, count: int) -> Figures:
    this = way("asyncio", name)
    seconds: list[tuple[float, float, float]] = []
    with anyio.fail_after(600), producers(this) as hand_out:
        for _ in range(-(-MEASURABLE // count)):
            start, complete = await wave("asyncio", this, count, hand_out)
            _, cancel = await wave("asyncio", this, count, lambda _, cancel_all: cancel_all())
            seconds.append((start, complete, cancel))
    title = "Pending awaits, and microseconds to {} each of them"
    return {
        (title.format(what), count): mean(took) / count * 1e6
        for what, took in zip(
            ("start", "complete", "cancel"), zip(*seconds, strict=True), strict=True
        )
    }


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
        return int(psutil.Process().memory_info().rss)

    gc.disable()  # it would take most of the time, and find nothing
    async with native_tasks("asyncio") as (start_soon, cancel):
        before = await grow(start_soon, count // 10)  # uses up what was free
        grown = await grow(start_soon, count) - before
        cancel()
    return grown / count


def memory(name: str, count: int) -> Figures:
    code = f"from benchmarks.scale import *; print(run('asyncio', bytes_each, {name!r}, {count}))"
    return {("Pending awaits, and bytes of each with its task", count): run_in_process(code)[0]}


def cases(quick: bool) -> Iterator[Case]:
    names = [name for name in WAYS if name not in (THREAD, FLOOR)]
    for count in [10, 100] if quick else [10**power for power in range(1, 7)]:
        yield {name: partial(run, "asyncio", scale, name, count) for name in names}
    count = 10_000 if quick else 100_000
    yield {name: partial(memory, name, count) for name in (SET_RESULT, BARE, BRIDGE, WRAP)}

"""Counts what the hot paths cost, which no noise of a machine disturbs, against what they may.

    python -m benchmarks.costs [--write]

For each path: the bytecode instructions, per future, that are executed in the package and in
what it calls; and the bytes that a pending await holds, as Python's allocator counts them. CI
compares them with those in costs.json, where a tenth more is a failure. Counts depend on the
version of Python: for one that has none there, those of the nearest are taken, with half as
much again as room. ``--write`` puts the counts of this version there.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import trio
import trio.testing

import torchfut_aio
from torchfut_aio import Future

COMMITTED = Path(__file__).with_suffix(".json")
PACKAGE = str(Path(torchfut_aio.__file__).parent)
COUNT = 10  # futures: fewer than a burst, in which the clock decides how often a loop looks
MANY = 1_000
ROOM, ROOM_FOR_OTHER_VERSIONS, FEW = 1.1, 1.5, 2

Futures = list[Future[int]]


class Instructions:
    """Counts bytecode instructions while `counting`."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts in this thread."""
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(None)

    def complete_in_thread(self, futures: Futures) -> None:
        """Counts in another thread, too, while this one stands still: nothing is a race."""

        def counted() -> None:
            with self.counting():
                complete(futures)

        thread = threading.Thread(target=counted)
        thread.start()
        thread.join()

    def _trace(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if event == "opcode":
            self.count += 1
        elif event == "call":
            caller = frame.f_back
            ours = frame.f_code.co_filename.startswith(PACKAGE)
            if not ours and (caller is None or not caller.f_trace_opcodes):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._trace


# ------------------------------ the paths, of pending futures or done ones; all of it counts

Complete = Callable[[Futures], None]


def nothing(_: object) -> None:
    pass


def complete(futures: Futures) -> None:
    for fut in futures:
        fut.set_result(1)


def pending() -> Futures:
    return [Future() for _ in range(COUNT)]


def done() -> Futures:
    futures = pending()
    complete(futures)
    return futures


async def create(_: Futures, __: Complete) -> None:
    pending()


async def create_set_read(_: Futures, __: Complete) -> None:
    for fut in done():
        fut.value()


async def callback(futures: Futures, _: Complete) -> None:
    for fut in futures:
        fut.add_done_callback(nothing)
    complete(futures)


async def then(futures: Futures, _: Complete) -> None:
    children = [fut.then(nothing) for fut in futures]
    complete(futures)
    del children


async def wait(futures: Futures, _: Complete) -> None:
    for fut in futures:
        fut.wait()


async def collect_all(futures: Futures, _: Complete) -> None:
    torchfut_aio.collect_all(futures)
    complete(futures)


async def await_done(futures: Futures, _: Complete) -> None:
    for fut in futures:
        await fut


async def value_of(fut: Awaitable[Any]) -> Any:
    return await fut


async def waiting(awaitables: list[Any]) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.ensure_future(value_of(each)) for each in awaitables]
    await asyncio.sleep(0)
    return tasks


async def await_here(futures: Futures, _: Complete) -> None:
    await await_elsewhere(futures, complete)


async def await_elsewhere(futures: Futures, complete: Complete) -> None:
    tasks = await waiting(futures)
    complete(futures)
    for task in tasks:
        await task


async def await_on_trio(futures: Futures, complete: Complete) -> None:
    async with trio.open_nursery() as nursery:
        for fut in futures:
            nursery.start_soon(value_of, fut)
        await trio.testing.wait_all_tasks_blocked()
        complete(futures)


async def await_cancelled(futures: Futures, _: Complete) -> None:
    tasks = await waiting(futures)
    for task in tasks:
        task.cancel()
    for task in tasks:
        await asyncio.wait([task])


async def gather(futures: Futures, complete: Complete) -> None:
    [task] = await waiting([torchfut_aio.gather(futures)])
    complete(futures)
    await task


async def as_completed(futures: Futures, complete: Complete) -> None:
    async def take_all() -> None:
        async for fut in torchfut_aio.as_completed(futures):
            fut.value()

    [task] = await waiting([take_all()])
    complete(futures)
    await task


HotPath = Callable[[Futures, Complete], Awaitable[None]]
PATHS: dict[str, tuple[Callable[[], Futures], HotPath]] = {
    "create": (list, create),
    "create, set, read": (list, create_set_read),
    "add a callback, set": (pending, callback),
    "then, set": (pending, then),
    "wait, when done": (done, wait),
    "collect_all, set": (pending, collect_all),
    "await, when done": (done, await_done),
    "await, set by the loop's thread": (pending, await_here),
    "await, set by another thread": (pending, await_elsewhere),
    "await, cancelled": (pending, await_cancelled),
    "gather, set by another thread": (pending, gather),
    "as_completed, set by another thread": (pending, as_completed),
    "await, set by another thread, on trio": (pending, await_on_trio),
}


async def instructions(futures_of: Callable[[], Futures], path: HotPath) -> float:
    for _ in range(2):  # what is done once, such as an import, is not of interest
        count = Instructions()
        futures = futures_of()
        with count.counting():
            await path(futures, count.complete_in_thread)
    return count.count / COUNT


async def bytes_of_pending() -> float:
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        futures = [Future[int]() for _ in range(MANY)]
        tasks = await waiting(futures)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    complete(futures)
    for task in tasks:
        await task
    return (after - before) / MANY


# ------------------------------------------------------------------------------- comparing


def measured() -> dict[str, float]:
    """Returns all costs, of a future each."""
    gc.disable()  # or finalisers would count where they happen to run
    costs = {
        name: anyio.run(instructions, *path, backend="trio" if "trio" in name else "asyncio")
        for name, path in PATHS.items()
    }
    return costs | {"bytes of a pending await": anyio.run(bytes_of_pending)}


def main() -> int:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    committed = json.loads(COMMITTED.read_text())
    costs = measured()
    if "--write" in sys.argv[1:]:
        committed[version] = {name: round(cost, 1) for name, cost in costs.items()}
        COMMITTED.write_text(json.dumps(committed, indent=2) + "\n")
    nearest = min(committed, key=lambda other: abs(int(other[2:]) - sys.version_info.minor))
    room = ROOM if nearest == version else ROOM_FOR_OTHER_VERSIONS
    print(f"bytecode instructions per future, Python {version}; allowed from those of {nearest}")
    print(f"  {'':38}{'now':>10}{'committed':>12}{'allowed':>10}")
    grown = []
    for name, cost in costs.items():
        before = committed[nearest][name]
        allowed = max(before * room, before + FEW)
        more = "  MORE" if cost > allowed else ""
        print(f"  {name:38}{cost:>10.1f}{before:>12.1f}{allowed:>10.1f}{more}")
        grown += [name] * bool(more)
    if grown:
        print(
            f"\nGrown: {'; '.join(grown)}. If that is what it takes, say why in the commit, and "
            "have the new counts committed: python -m benchmarks.costs --write",
            file=sys.stderr,
        )
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())

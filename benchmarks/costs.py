"""Counts what the hot paths cost, which no noise of a machine disturbs, against what they may.

    python -m benchmarks.costs [--write]

For each path: the bytecode instructions, per future, that are executed in the package, without its
C extension, and in what it calls; and the bytes that a pending await holds, as Python's allocator
counts them. CI compares them with those in costs.json, where a tenth more is a failure. Counts
depend on the version of Python: for one that has none there, those of the nearest are taken, with
half as much again as room. ``--write`` puts the counts of this version there. What runs in C is
counted by ``benchmarks.instructions``.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import tracemalloc
from collections.abc import Callable
from inspect import isawaitable
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import trio
import trio.testing

import torchfut_aio
from torchfut_aio import Future, as_completed, collect_all, gather
from torchfut_aio._extension import use_extension

COMMITTED = Path(__file__).with_suffix(".json")
PACKAGE = str(Path(torchfut_aio.__file__).parent)
COUNT = 10  # futures: fewer than a burst, in which the clock decides how often a loop looks
MANY = 1_000
ROOM, ROOM_FOR_OTHER_VERSIONS, FEW = 1.1, 1.5, 2

Futures = list[Future[int]]
Complete = Callable[[Futures], None]

# -------------------------------------------------------------------------------- the paths


def nothing(_: object) -> None:
    pass


def complete_here(futures: Futures) -> None:
    for fut in futures:
        fut.set_result(1)


async def value_of(awaitable: Any) -> Any:
    return await awaitable


async def waiting(awaitables: list[Any]) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.ensure_future(value_of(each)) for each in awaitables]
    await asyncio.sleep(0)
    return tasks


async def awaited(awaitables: list[Any], futures: Futures, complete: Complete) -> None:
    tasks = await waiting(awaitables)
    complete(futures)
    for task in tasks:
        await task


async def awaited_one_by_one(futures: Futures) -> None:
    for fut in futures:
        await fut


async def awaited_on_trio(futures: Futures, complete: Complete) -> None:
    async with trio.open_nursery() as nursery:
        for fut in futures:
            nursery.start_soon(value_of, fut)
        await trio.testing.wait_all_tasks_blocked()
        complete(futures)


async def cancelled(futures: Futures) -> None:
    tasks = await waiting(futures)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def take_all(futures: Futures) -> None:
    async for fut in as_completed(futures):
        fut.value()


# Each is called with futures, pending or done, and with what completes them in another thread.
PATHS: dict[str, Callable[[Futures, Complete], Any]] = {
    "create": lambda _, __: [Future() for _ in range(COUNT)],
    "set": lambda fs, _: complete_here(fs),
    "read, when done": lambda fs, _: [fut.value() for fut in fs],
    "add a callback, set": lambda fs, _: (
        [fut.add_done_callback(nothing) for fut in fs],
        complete_here(fs),
    ),
    "then, set": lambda fs, _: ([fut.then(nothing) for fut in fs], complete_here(fs)),
    "wait, when done": lambda fs, _: [fut.wait() for fut in fs],
    "collect_all, set": lambda fs, _: (collect_all(fs), complete_here(fs)),
    "await, when done": lambda fs, _: awaited_one_by_one(fs),
    "await, set by the loop's thread": lambda fs, _: awaited(fs, fs, complete_here),
    "await, set by another thread": lambda fs, complete: awaited(fs, fs, complete),
    "await, cancelled": lambda fs, _: cancelled(fs),
    "gather, set by another thread": lambda fs, complete: awaited([gather(fs)], fs, complete),
    "as_completed, set by another thread": lambda fs, complete: awaited(
        [take_all(fs)], fs, complete
    ),
    "await, set by another thread, on trio": awaited_on_trio,
}

# --------------------------------------------------------------------------------- counting


async def instructions(name: str) -> float:
    """Count in this thread, and in the other one while this one stands still: no races."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal count
        if event == "opcode":
            count += 1
        elif event == "call":
            caller = frame.f_back
            ours = frame.f_code.co_filename.startswith(PACKAGE)
            if not ours and (caller is None or not caller.f_trace_opcodes):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return trace

    def complete_in_thread(futures: Futures) -> None:
        thread = threading.Thread(target=lambda: (sys.settrace(trace), complete_here(futures)))
        thread.start()
        thread.join()

    for _ in range(2):  # what is done once, such as an import, is not of interest
        count, futures = 0, [Future[int]() for _ in range(COUNT)]
        if name.endswith("when done"):
            complete_here(futures)
        sys.settrace(trace)
        try:
            result = PATHS[name](futures, complete_in_thread)
            if isawaitable(result):
                await result
        finally:
            sys.settrace(None)
    return count / COUNT


async def bytes_of_pending() -> float:
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    tasks = await waiting(futures := [Future[int]() for _ in range(MANY)])
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    complete_here(futures)
    await asyncio.wait(tasks)
    return (after - before) / MANY


# ------------------------------------------------------------------------------- comparing


def main() -> int:
    use_extension(False)
    gc.disable()  # or finalisers would count where they happen to run
    costs: dict[str, float] = {
        name: anyio.run(instructions, name, backend="trio" if "trio" in name else "asyncio")
        for name in PATHS
    }
    costs["bytes of a pending await"] = anyio.run(bytes_of_pending)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    committed = json.loads(COMMITTED.read_text())
    if "--write" in sys.argv[1:]:
        committed[version] = {name: round(cost, 1) for name, cost in costs.items()}
        COMMITTED.write_text(json.dumps(committed, indent=2) + "\n")
    versions = [key for key in committed if key.startswith("3.")]
    nearest = min(versions, key=lambda other: abs(int(other[2:]) - sys.version_info.minor))
    room = ROOM if nearest == version else ROOM_FOR_OTHER_VERSIONS
    allowed = {name: max(cost * room, cost + FEW) for name, cost in committed[nearest].items()}
    print(f"bytecode instructions per future, Python {version}; allowed from those of {nearest}")
    for name, cost in costs.items():
        print(f"  {name:38}{cost:>10.1f}, allowed{allowed[name]:>10.1f}")
    if grown := [name for name, cost in costs.items() if cost > allowed[name]]:
        print(
            f"\nGrown: {'; '.join(grown)}. If that is what it takes, say why in the commit, and "
            "have the new counts committed: python -m benchmarks.costs --write",
            file=sys.stderr,
        )
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())

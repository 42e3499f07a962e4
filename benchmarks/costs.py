"""Counts what the hot paths cost, which no noise of a machine disturbs, against what they may.

    python -m benchmarks.costs [--write]

For each path: the bytecode instructions, per future, that are executed in the package and in
what it calls; and the bytes that a pending await holds, as Python's allocator counts them. CI
compares them with those in costs.json, where a tenth more is a failure. Counts depend on the
version of Python: for one that has none there, those of the nearest are taken, with half as
much again as room. ``--write`` puts the counts of this version there.
"""

from __future__ import annotations

import argparse
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

import trio
import trio.testing

import torchfut_aio
from torchfut_aio import Future

from ._ways import run

COMMITTED = Path(__file__).with_suffix(".json")
PACKAGE = str(Path(torchfut_aio.__file__).parent)
COUNT = 10  # futures: fewer than a burst, in which the clock decides how often a loop looks
MANY = 1_000
ROOM, ROOM_FOR_OTHER_VERSIONS, FEW = 1.1, 1.5, 2


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

    def in_thread(self, function: Callable[[], None]) -> None:
        """Counts in another thread, too, while this one stands still: nothing is a race."""

        def counted() -> None:
            with self.counting():
                function()

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


# ------------------------------------------------------------------------------- the paths


def nothing(_: object) -> None:
    pass


def completed(futures: list[Future[int]]) -> None:
    for fut in futures:
        fut.set_result(1)


def pending() -> list[Future[int]]:
    return [Future() for _ in range(COUNT)]


def done() -> list[Future[int]]:
    futures = pending()
    completed(futures)
    return futures


def create(count: Instructions) -> None:
    with count.counting():
        pending()


def create_set_read(count: Instructions) -> None:
    with count.counting():
        for fut in done():
            fut.value()


def callback(count: Instructions) -> None:
    futures = pending()
    with count.counting():
        for fut in futures:
            fut.add_done_callback(nothing)
        completed(futures)


def then(count: Instructions) -> None:
    futures = pending()
    with count.counting():
        children = [fut.then(nothing) for fut in futures]
        completed(futures)
    assert all(child.done() for child in children)


def wait_when_done(count: Instructions) -> None:
    futures = done()
    with count.counting():
        for fut in futures:
            fut.wait()


def collect_all(count: Instructions) -> None:
    futures = pending()
    with count.counting():
        torchfut_aio.collect_all(futures)
        completed(futures)


async def await_when_done(count: Instructions) -> None:
    futures = done()
    with count.counting():
        for fut in futures:
            await fut


async def value_of(fut: Awaitable[int]) -> int:
    return await fut


async def waiting(futures: list[Future[int]]) -> list[asyncio.Task[int]]:
    tasks = [asyncio.ensure_future(value_of(fut)) for fut in futures]
    await asyncio.sleep(0)
    return tasks


async def await_from_its_thread(count: Instructions) -> None:
    futures = pending()
    with count.counting():
        tasks = await waiting(futures)
        completed(futures)
        for task in tasks:
            await task


async def await_from_another(count: Instructions) -> None:
    futures = pending()
    with count.counting():
        tasks = await waiting(futures)
        count.in_thread(lambda: completed(futures))
        for task in tasks:
            await task


async def await_from_another_on_trio(count: Instructions) -> None:
    futures = pending()
    with count.counting():
        async with trio.open_nursery() as nursery:
            for fut in futures:
                nursery.start_soon(value_of, fut)
            await trio.testing.wait_all_tasks_blocked()
            count.in_thread(lambda: completed(futures))


async def await_cancelled(count: Instructions) -> None:
    futures = pending()
    with count.counting():
        tasks = await waiting(futures)
        for task in tasks:
            task.cancel()
        for task in tasks:
            await asyncio.wait([task])


async def gather(count: Instructions) -> None:
    futures = pending()
    with count.counting():
        task = asyncio.ensure_future(value_of(torchfut_aio.gather(futures)))
        await asyncio.sleep(0)
        count.in_thread(lambda: completed(futures))
        await task


async def as_completed(count: Instructions) -> None:
    futures = pending()

    async def take_all() -> None:
        async for fut in torchfut_aio.as_completed(futures):
            fut.value()

    with count.counting():
        task = asyncio.ensure_future(take_all())
        await asyncio.sleep(0)
        count.in_thread(lambda: completed(futures))
        await task


async def bytes_of_pending() -> float:
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        futures = [Future[int]() for _ in range(MANY)]
        tasks = await waiting(futures)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    completed(futures)
    for task in tasks:
        await task
    return (after - before) / MANY


INSTRUCTIONS: dict[str, Callable[[Instructions], Awaitable[None] | None]] = {
    "create": create,
    "create, set, read": create_set_read,
    "add a callback, set": callback,
    "then, set": then,
    "wait, when done": wait_when_done,
    "collect_all, set": collect_all,
    "await, when done": await_when_done,
    "await, set by the loop's thread": await_from_its_thread,
    "await, set by another thread": await_from_another,
    "await, cancelled": await_cancelled,
    "gather, set by another thread": gather,
    "as_completed, set by another thread": as_completed,
}
ON_TRIO = {"await, set by another thread, on trio": await_from_another_on_trio}
BYTES = "bytes of a pending await"

# ------------------------------------------------------------------------------- comparing


def measured() -> dict[str, float]:
    """Returns all costs, of a future each."""
    costs = {}
    gc.disable()  # or finalisers would count where they happen to run
    try:
        for loop, paths in ("asyncio", INSTRUCTIONS), ("trio", ON_TRIO):
            for name, path in paths.items():
                costs[name] = run(loop, instructions, path) / COUNT
        costs[BYTES] = run("asyncio", bytes_of_pending)
    finally:
        gc.enable()
    return costs


async def instructions(path: Callable[[Instructions], Awaitable[None] | None]) -> int:
    for _ in range(2):  # what is done once, such as an import, is not of interest
        count = Instructions()
        running = path(count)
        if running is not None:
            await running
    return count.count


def allowed(committed: dict[str, dict[str, float]], version: str) -> tuple[str, dict[str, float]]:
    """Returns for which version the committed costs are, and what is allowed with this one."""

    def number(of: str) -> int:
        return int(of.partition(".")[2])

    nearest = min(committed, key=lambda other: abs(number(other) - number(version)))
    room = ROOM if nearest == version else ROOM_FOR_OTHER_VERSIONS
    return nearest, {
        name: max(cost * room, cost + FEW) for name, cost in committed[nearest].items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.costs", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--write", action="store_true", help="have these counts committed")
    options = parser.parse_args()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    committed = json.loads(COMMITTED.read_text())
    costs = measured()
    if options.write:
        committed[version] = {name: round(cost, 1) for name, cost in costs.items()}
        COMMITTED.write_text(json.dumps(committed, indent=2) + "\n")
    nearest, most = allowed(committed, version)
    print(f"bytecode instructions per future, Python {version}; allowed from those of {nearest}")
    print(f"  {'':38}{'now':>10}{'committed':>12}{'allowed':>10}")
    grown = []
    for name, cost in costs.items():
        over = cost > most[name]
        print(
            f"  {name:38}{cost:>10.1f}{committed[nearest][name]:>12.1f}{most[name]:>10.1f}"
            + "  MORE" * over
        )
        grown += [name] * over
    if grown:
        print(
            f"\nGrown: {'; '.join(grown)}. If that is what it takes, say why in the commit, and "
            "have the new counts committed: python -m benchmarks.costs --write",
            file=sys.stderr,
        )
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())

"""What futures cost that nobody awaits, and what it costs to combine them.

    python -m benchmarks.callbacks [--loop asyncio|uvloop] [--quick] [--rounds N]

One operation after the other, on a thousand futures, in one thread. asyncio's futures run
callbacks from their loop, so with a callback theirs includes one turn of the loop for all.

Then many futures as one, of 10 to 10,000: `collect_all`, completed and waited for in one
thread, against torch's; `gather` and `as_completed` on a loop, completed by one other thread,
against asyncio's over wrapped futures. The clock starts before they are combined, and stops
when all values have come; the futures have been made before.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import anyio
import torch

import torchfut_aio

from ._options import Options
from ._plot import bars, lines
from ._report import Report
from ._rounds import Case, measure
from ._ways import Way, hand_written_bridge, ours, producers, run, wrap_future

COUNT = 1_000
OURS, TORCH = "torchfut_aio", "torch.futures"
GATHER_GOAL, AS_COMPLETED_GOAL, CREATE_GOAL = 5, 10, 1  # times what others do

# ------------------------------------------------------------------------- one at a time


class Kind(NamedTuple):
    """A kind of future: functions that take it first."""

    new: Callable[[], Any]
    set: Callable[[Any, Any], object]
    read: Callable[[Any], Any]
    callback: Callable[[Any, Callable[[Any], object]], object]
    wait: Callable[[Any], Any] | None = None
    then: Callable[[Any, Callable[[Any], object]], Any] | None = None
    turn: Callable[[], object] = lambda: None
    """Runs what a completion has left to be run."""


def of_torch(kind: type[torch.futures.Future[Any]]) -> Kind:
    return Kind(kind, kind.set_result, kind.value, kind.add_done_callback, kind.wait, kind.then)


def of_asyncio(loop: asyncio.AbstractEventLoop) -> Kind:
    kind = asyncio.Future

    def turn() -> None:
        loop.call_soon(loop.stop)
        loop.run_forever()

    return Kind(loop.create_future, kind.set_result, kind.result, kind.add_done_callback, turn=turn)


def create(kind: Kind) -> float:
    new = kind.new
    begin = perf_counter()
    for _ in range(COUNT):
        new()
    return perf_counter() - begin


def create_set_read(kind: Kind) -> float:
    new, set_, read = kind.new, kind.set, kind.read
    begin = perf_counter()
    for _ in range(COUNT):
        fut = new()
        set_(fut, 1)
        read(fut)
    return perf_counter() - begin


def set_result(kind: Kind) -> float:
    set_, futures = kind.set, [kind.new() for _ in range(COUNT)]
    begin = perf_counter()
    for fut in futures:
        set_(fut, 1)
    return perf_counter() - begin


def add_callback(kind: Kind) -> float:
    callback, futures = kind.callback, [kind.new() for _ in range(COUNT)]
    begin = perf_counter()
    for fut in futures:
        callback(fut, nothing)
    took = perf_counter() - begin
    for fut in futures:
        kind.set(fut, 1)
    kind.turn()
    return took


def set_with_callback(kind: Kind) -> float:
    set_, futures = kind.set, [kind.new() for _ in range(COUNT)]
    for fut in futures:
        kind.callback(fut, nothing)
    begin = perf_counter()
    for fut in futures:
        set_(fut, 1)
    kind.turn()
    return perf_counter() - begin


def then_set_read(kind: Kind) -> float | None:
    if kind.then is None:
        return None
    then, set_, futures = kind.then, kind.set, [kind.new() for _ in range(COUNT)]
    begin = perf_counter()
    for fut in futures:
        child = then(fut, nothing)
        set_(fut, 1)
        child.value()
    return perf_counter() - begin


def wait_done(kind: Kind) -> float | None:
    if kind.wait is None:
        return None
    wait, futures = kind.wait, [kind.new() for _ in range(COUNT)]
    for fut in futures:
        kind.set(fut, 1)
    begin = perf_counter()
    for fut in futures:
        wait(fut)
    return perf_counter() - begin


def nothing(fut: Any) -> None:  # noqa: ARG001
    return None


OPERATIONS: dict[str, Callable[[Kind], float | None]] = {
    "create": create,
    "create, set, read": create_set_read,
    "set": set_result,
    "add a callback": add_callback,
    "set, with a callback": set_with_callback,
    "then, set, read": then_set_read,
    "wait, when done": wait_done,
}


def each(operation: Callable[[Kind], float | None], kind: Kind) -> tuple[float | None]:
    seconds = operation(kind)
    return (None if seconds is None else seconds / COUNT * 1e6,)


# ----------------------------------------------------------------------------- many as one


def collected(
    kind: type[torch.futures.Future[Any]], collect_all: Callable[[list[Any]], Any], count: int
) -> tuple[float]:
    futures = [kind() for _ in range(count)]
    begin = perf_counter()
    combined = collect_all(futures)
    for fut in futures:
        fut.set_result(1)
    combined.wait()
    return ((perf_counter() - begin) / count * 1e6,)


async def combined(
    way_of: Callable[[], Way],
    values: Callable[[Way, list[Any], Callable[[], None]], Awaitable[int]],
    count: int,
) -> tuple[float]:
    way = way_of()
    futures = [way.new() for _ in range(count)]
    with anyio.fail_after(300), producers(way.complete, 1) as hand_out:
        begin = perf_counter()
        total = await values(way, futures, lambda: hand_out([futures]))
        took = perf_counter() - begin
    assert total == count
    return (took / count * 1e6,)


async def our_gather(_: Way, futures: list[Any], complete: Callable[[], None]) -> int:
    gathered = torchfut_aio.gather(futures)
    complete()
    return sum(await gathered)


async def asyncio_gather(way: Way, futures: list[Any], complete: Callable[[], None]) -> int:
    gathered = asyncio.gather(*map(way.wait, futures))
    complete()
    return sum(await gathered)


async def our_as_completed(_: Way, futures: list[Any], complete: Callable[[], None]) -> int:
    completed = torchfut_aio.as_completed(futures)
    complete()
    return sum([fut.value() async for fut in completed])


async def asyncio_as_completed(way: Way, futures: list[Any], complete: Callable[[], None]) -> int:
    completed = asyncio.as_completed(list(map(way.wait, futures)))
    complete()
    return sum([await next_one for next_one in completed])


WRAPPED, BRIDGED = "asyncio's, wrap_future", "asyncio's, bridge by hand"
WAYS = {OURS: ours, WRAPPED: wrap_future, BRIDGED: hand_written_bridge}

# ------------------------------------------------------------------------------- reporting


def main() -> None:
    parser = Options("callbacks", __doc__, rounds=21, loops=("asyncio", "uvloop"), one_loop=True)
    options = parser.parse()
    report = Report("callbacks", options)
    loop = asyncio.new_event_loop()
    kind = concurrent.futures.Future
    kinds = {
        OURS: of_torch(torchfut_aio.Future),
        TORCH: of_torch(torch.futures.Future),
        "concurrent.futures": Kind(
            kind, kind.set_result, kind.result, kind.add_done_callback, kind.result
        ),
        "asyncio.Future": of_asyncio(loop),
    }
    counts = (10, 100) if options.quick else (10, 100, 1_000, 10_000)
    most = counts[-1]

    operations = report.table("one future", "us each", x="operation", ours=OURS)
    cases = [
        Case(
            name,
            [operations],
            {peer: partial(each, operation, kind) for peer, kind in kinds.items()},
        )
        for name, operation in OPERATIONS.items()
    ]
    many = partial(report.table, unit="us a future", x="futures", ours=OURS)
    collect_all = many("collect_all, in one thread")
    gather = many(f"gather, on {options.loop}, completed by another thread")
    as_completed = many(f"as_completed, on {options.loop}, completed by another thread")
    for count in counts:
        kinds_to_collect = {
            OURS: (torchfut_aio.Future, torchfut_aio.collect_all),
            TORCH: (torch.futures.Future, torch.futures.collect_all),
        }
        peers = {
            name: partial(collected, kind, function, count)
            for name, (kind, function) in kinds_to_collect.items()
        }
        cases.append(Case(count, [collect_all], peers))
        for table, of_ours, of_asyncio_ in (
            (gather, our_gather, asyncio_gather),
            (as_completed, our_as_completed, asyncio_as_completed),
        ):
            peers = {
                name: partial(
                    run, options.loop, combined, way, of_ours if way is ours else of_asyncio_, count
                )
                for name, way in WAYS.items()
            }
            cases.append(Case(count, [table], peers))
    measure(cases, options.rounds)
    loop.close()

    report.goal(
        f"create, set, read, times {TORCH}",
        operations.gain(TORCH, "create, set, read"),
        at_least=CREATE_GOAL,
    )
    for name, table, least in (
        ("gather", gather, GATHER_GOAL),
        ("as_completed", as_completed, AS_COMPLETED_GOAL),
    ):
        report.goal(
            f"{name} of {most:,}, times {WRAPPED}", table.gain(WRAPPED, most), at_least=least
        )
    of_rounds = f"medians and quartiles of {options.rounds} rounds; less is better"
    report.plot(
        "",
        bars(
            "Futures that nobody awaits",
            f"one thread; {of_rounds}",
            "microseconds each",
            {name: operations.at(name) for name in OPERATIONS},
            ours=OURS,
        ),
    )
    for slug, table in (
        ("collect_all", collect_all),
        ("gather", gather),
        ("as_completed", as_completed),
    ):
        report.plot(
            slug,
            lines(
                f"{slug} of many futures",
                f"{table.title.partition(', ')[2]}; {of_rounds}",
                "futures",
                "microseconds a future",
                table.samples,
                ours=OURS,
            ),
        )
    report.finish()


if __name__ == "__main__":
    main()

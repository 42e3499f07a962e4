"""How many futures a second tasks can await that other threads complete.

    python -m benchmarks.await_throughput [--loop asyncio|uvloop|trio] [--quick] [--rounds N]

The clock starts when the futures are handed to the threads that complete them, with every
task already waiting, and stops in the last task that has resumed. Where the tasks are few,
this is done again and again on the same loop, and only these times are added up. One task
therefore shows how long a thread and a loop take to wake each other, thousands how much work
an await is. The floor has no torch object at all: a deque, and one wake-up of the loop a batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter
from typing import Any

import anyio

from ._options import Options
from ._plot import bars, lines
from ._report import Report
from ._rounds import Case, measure
from ._ways import FLOOR, Way, producers, run, ways

AWAITS = 1_000  # a run, at least
GOALS = {  # how many times what others do, by loop
    "asyncio": {"bridge by hand": 3, "asyncio.wrap_future": 4, "run_in_executor": 8, FLOOR: 0.7},
    "uvloop": {"bridge by hand": 1.5, "asyncio.wrap_future": 2.5, "run_in_executor": 6, FLOOR: 0.7},
}


async def thousands_a_second(
    loop: str, way_of: Callable[[], Way], tasks: int, threads: int
) -> tuple[float]:
    way = way_of()
    waves = -(-AWAITS // tasks)
    with anyio.fail_after(300), producers(way.complete, threads) as hand_out:
        async with way.around:
            seconds = [await wave(loop, way, tasks, threads, hand_out) for _ in range(waves)]
    return (tasks * waves / sum(seconds) / 1e3,)


async def wave(
    loop: str,
    way: Way,
    tasks: int,
    threads: int,
    hand_out: Callable[[Sequence[Sequence[Any]]], None],
) -> float:
    waiting = resumed = 0
    end = 0.0
    all_wait, all_resumed = anyio.Event(), anyio.Event()

    async def task(fut: Any) -> None:
        nonlocal waiting, resumed, end
        waiting += 1
        if waiting == tasks:
            all_wait.set()
        value = await way.wait(fut)
        resumed += value  # which is 1
        if resumed == tasks:
            end = perf_counter()
            all_resumed.set()

    futures = [way.new() for _ in range(tasks)]
    shares = [futures[n::threads] for n in range(threads)]
    async with native_tasks(loop) as start_soon:
        for fut in futures:
            start_soon(task, fut)
        await all_wait.wait()
        start = perf_counter()
        hand_out(shares)
        await all_resumed.wait()
    return end - start


@asynccontextmanager
async def native_tasks(loop: str) -> AsyncIterator[Callable[..., object]]:
    """Gives what starts a task, and waits for the tasks in the end.

    A task group would do more for each task that ends, while the clock runs.
    """
    if loop == "trio":
        import trio

        async with trio.open_nursery() as nursery:
            yield nursery.start_soon
        return
    started: list[asyncio.Task[None]] = []
    yield lambda function, *args: started.append(asyncio.create_task(function(*args)))
    for task in started:
        await task


def main() -> None:
    parser = Options("await_throughput", __doc__, rounds=15, loops=("asyncio", "uvloop", "trio"))
    options = parser.parse()
    report = Report("await_throughput", options)
    all_tasks = (1, 100) if options.quick else (1, 10, 100, 1_000, 10_000)
    typical = 100 if options.quick else 1_000
    tables = {}
    cases = []
    for loop in options.loops:
        for threads in (1, 4):
            title = f"{loop}, completed by {threads} thread{'s' * (threads > 1)}"
            table = report.table(
                title, "thousands of futures awaited a second", x="tasks", more_is_better=True
            )
            tables[loop, threads] = table
            for tasks in all_tasks:
                peers = {
                    name: partial(run, loop, thousands_a_second, loop, way, tasks, threads)
                    for name, way in ways(loop).items()
                }
                cases.append(Case(tasks, [table], peers))
    measure(cases, options.rounds)

    for loop in options.loops:
        for peer, least in GOALS.get(loop, {}).items():
            gain = tables[loop, 1].gain(peer, typical)
            report.goal(f"{loop}, {typical:,} tasks, times {peer}", gain, at_least=least)
    of_rounds = f"medians and quartiles of {options.rounds} rounds"
    report.plot(
        "",
        bars(
            "Futures awaited a second, completed by one other thread",
            f"{typical:,} tasks; {of_rounds}; more is better",
            "thousands of futures a second",
            {loop: tables[loop, 1].at(typical) for loop in options.loops},
            ours="await fut",
            bound=FLOOR,
        ),
    )
    first = options.loops[0]
    report.plot(
        "tasks",
        lines(
            "Futures awaited a second, by how many tasks wait",
            f"{first}, completed by one other thread; {of_rounds}; more is better",
            "tasks",
            "thousands of futures a second",
            tables[first, 1].samples,
            ours="await fut",
            bound=FLOOR,
        ),
    )
    report.finish()


if __name__ == "__main__":
    main()

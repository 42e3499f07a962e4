"""How long from ``set_result`` in a thread to the next line of the task that awaits.

    python -m benchmarks.await_latency [--loop asyncio|uvloop|trio] [--quick] [--rounds N]

One task awaits one future after the other, which one thread completes. The thread waits a
moment first, so that the loop is asleep whenever a future is completed. Then it looks at the
clock, and completes the future with the time: the task subtracts it from the time on its next
line. The bare way is what the loop itself has for this, with no torch object, and cannot be
beaten. Percentiles are those of one run; medians and quartiles are over the runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from statistics import quantiles
from threading import Thread
from time import perf_counter
from typing import Any

import anyio

from ._options import Options
from ._plot import bars
from ._report import Report
from ._rounds import Case, measure
from ._ways import FLOOR, Way, bare, bare_name, run, ways

PAUSE = 0.0001  # seconds; longer than any of the loops takes to fall asleep
WARM_UP = 50  # awaits that do not count
PERCENTILES = {"p50": 500, "p99": 990, "p99.9": 999}  # in thousandths
GOALS = {"p50": 1.15, "p99": 1.3}  # times the bare way's, at most, on asyncio


async def percentiles(way_of: Callable[[], Way], awaits: int) -> list[float]:
    way = way_of()
    to_complete: SimpleQueue[Any] = SimpleQueue()

    def produce() -> None:
        while (fut := to_complete.get()) is not None:
            time.sleep(PAUSE)
            way.complete(fut, perf_counter())

    producer = Thread(target=produce)
    latencies = []
    producer.start()
    try:
        with anyio.fail_after(300):
            async with way.around:
                for _ in range(WARM_UP + awaits):
                    fut = way.new()
                    to_complete.put(fut)
                    begun = await way.wait(fut)
                    latencies.append(perf_counter() - begun)
    finally:
        to_complete.put(None)
        producer.join()
    at = quantiles(latencies[WARM_UP:], n=1000, method="inclusive")
    return [at[thousandth - 1] * 1e6 for thousandth in PERCENTILES.values()]


def main() -> None:
    parser = Options("await_latency", __doc__, rounds=15, loops=("asyncio", "uvloop", "trio"))
    options = parser.parse()
    report = Report("await_latency", options)
    awaits = 200 if options.quick else 3_000
    cases = []
    tables = {}
    for loop in options.loops:
        for name in PERCENTILES:
            tables[loop, name] = report.table(f"{loop}, {name} of {awaits:,} awaits", "us")
        at_work = ways(loop)
        del at_work[FLOOR]  # which is about batches
        at_work[bare_name(loop)] = bare(loop)
        peers = {
            name: partial(run, loop, percentiles, way, awaits) for name, way in at_work.items()
        }
        cases.append(Case(None, [tables[loop, name] for name in PERCENTILES], peers))
    measure(cases, options.rounds)

    for name, most in GOALS.items():
        if "asyncio" in options.loops:
            theirs = tables["asyncio", name].gain(bare_name("asyncio"))
            report.goal(f"asyncio, {name}, times bare", 1 / theirs, at_most=most)
    first = options.loops[0]
    report.plot(
        "",
        bars(
            "From set_result in a thread to the awaiting task's next line",
            f"{first}; of {awaits:,} awaits, medians and quartiles of {options.rounds} rounds; "
            "less is better",
            "microseconds",
            {name: tables[first, name].at(None) for name in ("p50", "p99")},
            ours="await fut",
            bound=bare_name(first),
        ),
    )
    report.finish()


if __name__ == "__main__":
    main()

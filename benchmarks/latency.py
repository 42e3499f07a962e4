"""How long from the first line that completes futures in a thread to a waiting task's next line.

A batch of tasks waits, each for a future of its own. The thread waits a moment first, so that
the loop is asleep. Then it looks at the clock, and completes all futures with the time: each
task subtracts it from the time on its next line. Percentiles are of all tasks of one run.
"""

from __future__ import annotations

from functools import partial
from statistics import quantiles
from time import perf_counter

import anyio

from ._bench import Bench, Case, run
from ._waves import Wave, producers
from ._ways import SET_RESULT, SET_RESULTS, way, ways

PAUSE = 0.0001  # seconds; longer than any of the loops takes to fall asleep
WARM_UP = 20  # batches that do not count


async def percentiles(loop: str, name: str, batch: int, batches: int) -> tuple[float, float]:
    this = way(loop, name)
    latencies: list[float] = []

    def note(begun: float) -> None:
        latencies.append(perf_counter() - begun)

    with anyio.fail_after(300), producers(this, pause=PAUSE) as hand_out:
        for _ in range(WARM_UP + batches):
            await Wave(loop, this, batch, note).complete(hand_out)
    at = quantiles(latencies[WARM_UP * batch :], n=100, method="inclusive")
    return at[49] * 1e6, at[98] * 1e6


def main(bench: Bench) -> None:
    for loop in bench.loops("asyncio", "uvloop", "trio"):
        table = partial(
            bench.table,
            unit="microseconds",
            x="futures in a batch",
            ours=(SET_RESULT, SET_RESULTS),
        )
        p50 = table(f"From completing to the next line on {loop}, p50", plot=True)
        p99 = table(f"From completing to the next line on {loop}, p99")
        for batch in (1, 16, 64, 256):
            batches = 20 if bench.quick else 4_000 // (batch + 3)
            peers = {
                name: partial(run, loop, percentiles, loop, name, batch, batches)
                for name in ways(loop)
            }
            bench.cases.append(Case([(p50, batch), (p99, batch)], peers))
    bench.measure(rounds=15)

"""How many futures a second tasks can await that other threads complete.

A batch of tasks waits; a thread completes all their futures in one go, one by one or at once. The
clock starts when the futures are handed to the thread and stops in the last task that has
resumed. This is done again and again on the same loop, and only these times are added up. A
batch of one therefore shows how long a thread and a loop take to wake each other, one of a
thousand how much work an await is. A bare future is `loop.create_future()`, on trio an Event,
which has no torch object; so has the floor: a deque, and one wake-up of the loop for many.
"""

from __future__ import annotations

from functools import partial

import anyio

from ._bench import Bench, Case, run
from ._waves import Wave, producers
from ._ways import SET_RESULT, SET_RESULTS, way, ways

AWAITS = 1_000  # a run, at least


async def thousands_a_second(loop: str, name: str, batch: int, threads: int) -> list[float]:
    waves = -(-AWAITS // batch)
    got: list[float] = []
    with anyio.fail_after(300), producers(this := way(loop, name), threads) as hand_out:
        seconds = [
            (await Wave(loop, this, batch, got.append).complete(hand_out))[1] for _ in range(waves)
        ]
    assert len(got) == batch * waves
    return [batch * waves / sum(seconds) / 1e3]


def main(bench: Bench) -> None:
    batches = (1, 64) if bench.quick else (1, 16, 64, 256, 1_000, 10_000)
    for loop in bench.loops("asyncio", "uvloop", "trio"):
        for threads in (1, 4):
            by = "one thread" if threads == 1 else f"{threads} threads"
            table = bench.table(
                f"Futures awaited a second on {loop}, completed by {by}",
                "thousands a second",
                x="futures in a batch",
                ours=(SET_RESULT, SET_RESULTS),
                more_is_better=True,
                plot=threads == 1,
            )
            for batch in batches if threads == 1 else (64, 1_000)[: len(batches)]:
                peers = {
                    name: partial(run, loop, thousands_a_second, loop, name, batch, threads)
                    for name in ways(loop)
                }
                bench.cases.append(Case([(table, batch)], peers))
    bench.measure(rounds=15)

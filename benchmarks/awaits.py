"""How fast tasks resume that await futures which another thread completes.

A batch of tasks waits, each for its own future. A thread waits a moment, so that the loop falls
asleep, reads the clock, and completes all futures with that time, one by one or at once. Each task
reads the clock on its next line. The time until the last of them gives the throughput; all of them
give the percentiles. The threads in fut.wait() are those of the loop's default pool: few on
asyncio, 40 on trio.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from time import perf_counter

import anyio

from ._bench import Case, Figures, percentiles, run
from ._waves import producers, wave
from ._ways import way, ways

ROUNDS, BY = 15, "futures completed at once"
PLOTS = {"awaits": "1 thread", "awaits-latency": "p50"}
PAUSE = 0.0001  # seconds; longer than any of the loops takes to fall asleep
WARM_UP = 5  # batches that do not count


async def awaits(loop: str, name: str, batch: int, threads: int, batches: int) -> Figures:
    this = way(loop, name)
    seconds = 0.0
    latencies: list[float] = []
    times: list[tuple[float, float]] = []  # when a thread began, and when a task went on

    def note(begun: float) -> None:
        times.append((begun, perf_counter()))

    with anyio.fail_after(300), producers(this, threads, PAUSE) as hand_out:
        for number in range(WARM_UP + batches):
            await wave(loop, this, batch, hand_out, note)
            if number >= WARM_UP:
                seconds += max(end for _, end in times) - min(begun for begun, _ in times)
                latencies += [end - begun for begun, end in times]
            times.clear()
    assert len(latencies) == batch * batches
    by = f"on {loop}, {threads} thread{'s' * (threads > 1)}"
    figures = {f"Thousands of futures awaited a second {by}": len(latencies) / seconds / 1e3}
    if threads == 1:
        figures |= percentiles(f"Microseconds until the next line on {loop}, {{}}", latencies, 1e-6)
    return {(title, batch): figure for title, figure in figures.items()}


def cases(quick: bool) -> Iterator[Case]:
    batches = {1: (1, 64) if quick else (1, 16, 64, 256, 1_000, 10_000), 4: (64, 1_000)}
    for loop in ("asyncio", "uvloop", "trio"):
        for threads in batches:
            for batch in batches[threads]:
                times = 5 if quick else 1 + 3_000 // (batch + 2)
                yield {
                    name: partial(run, loop, awaits, loop, name, batch, threads, times)
                    for name in ways(loop)
                }

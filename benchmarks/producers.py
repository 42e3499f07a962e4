"""How completions and awaits scale with threads: with more producers, and with more loops.

Tasks of asyncio loops, each loop in its own thread, await a future each. Each loop has some
producers: threads that complete its futures with `set_result`. Without any, the loop's own thread
completes them. The peers are a free-threaded CPython without and with its GIL; other builds have
one peer. The CPU of other processes changes CPU time less than a rate.
"""

from __future__ import annotations

import asyncio
import gc
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

from torchfut_aio import Future

from ._bench import Case, Figures, run_in_process

ROUNDS, BY = 15, ""
PLOTS = {"producers": "Thousands"}
COUNT = 20_000  # futures


def complete(futures: list[Future[int]]) -> None:
    for fut in futures:
        fut.set_result(1)


async def value(fut: Future[int]) -> int:
    return await fut


def measure(loops: int, producers: int) -> tuple[float, float, float]:
    """Return the CPU of the producers and of the loops, and the time it took, in seconds."""
    gc.disable()
    ready = Barrier(loops * (1 + producers))

    def produce(futures: list[Future[int]]) -> float:
        ready.wait()
        begun = time.thread_time()
        complete(futures)
        return time.thread_time() - begun

    async def consume() -> tuple[float, float, float, float]:
        futures: list[Future[int]] = [Future() for _ in range(COUNT // loops)]
        tasks = [asyncio.ensure_future(value(fut)) for fut in futures]
        await asyncio.sleep(0)  # all wait
        with ThreadPoolExecutor(producers or 1) as pool:
            took = [pool.submit(produce, futures[k::producers]) for k in range(producers)]
            ready.wait()
            start, begun = time.perf_counter(), time.thread_time()
            if not producers:
                complete(futures)
            await asyncio.wait(tasks)
            of_loop, end = time.thread_time() - begun, time.perf_counter()
        return sum(each.result() for each in took), of_loop, start, end

    with ThreadPoolExecutor(loops) as pool:
        parts = list(pool.map(lambda _: asyncio.run(consume()), range(loops)))
    of_producers, of_loops, starts, ends = zip(*parts, strict=True)
    return sum(of_producers), sum(of_loops), max(ends) - min(starts)


def measured(gil: str, loops: int, producers: int) -> Figures:
    code = f"from benchmarks.producers import measure; print(*measure({loops}, {producers}))"
    of_producers, of_loops, seconds = run_in_process(code, PYTHON_GIL=gil)
    column = f"loops: {loops}, producers of each: {producers}"
    return {
        ("Thousands of futures awaited a second", column): COUNT / seconds / 1e3,
        ("Microseconds of CPU of the producers for a future", column): of_producers / COUNT * 1e6,
        ("Microseconds of CPU of the loops for a future", column): of_loops / COUNT * 1e6,
    }


def cases(quick: bool) -> Iterator[Case]:
    peers = {"with the GIL": "1"}
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        peers = {"without the GIL": "0", **peers}
    for loops, producers in [(1, 0), (2, 0), (1, 1), (1, 2), (1, 4), (2, 1), (4, 1)][
        : 3 if quick else None
    ]:
        yield {peer: partial(measured, gil, loops, producers) for peer, gil in peers.items()}

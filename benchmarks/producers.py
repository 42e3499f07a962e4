"""How completions and awaits scale with threads: with more producers, and with more loops.

    PYTHON_GIL=0 python -m benchmarks.producers [LOOPSxPRODUCERS ...]

Tasks of asyncio loops, each loop in its own thread, await a future each. Each loop has so many
producers: threads that complete its futures with `set_result`. With 0, the loop's own thread does.
CPU time depends less than a rate on what else the machine does. Without a GIL, loops and producers
run at the same time: the thread with the most work limits the rate, or the number of cores does.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from torchfut_aio import Future

COUNT, ROUNDS = 20_000, 15


def _complete(futures: list[Future[int]]) -> None:
    for fut in futures:
        fut.set_result(1)


async def _value(fut: Future[int]) -> int:
    return await fut


def one_round(loops: int, producers: int) -> tuple[float, float, float]:
    """Return the CPU of the producers and of the loops, and the time it took, in seconds."""
    ready = threading.Barrier(loops * (1 + producers))

    def produce(futures: list[Future[int]]) -> float:
        ready.wait()
        begun = time.thread_time()
        _complete(futures)
        return time.thread_time() - begun

    async def consume() -> tuple[float, float, float, float]:
        futures: list[Future[int]] = [Future() for _ in range(COUNT // loops)]
        tasks = [asyncio.ensure_future(_value(fut)) for fut in futures]
        await asyncio.sleep(0)  # all wait
        with ThreadPoolExecutor(producers or 1) as pool:
            took = [pool.submit(produce, futures[k::producers]) for k in range(producers)]
            ready.wait()
            start, begun = time.perf_counter(), time.thread_time()
            if not producers:
                _complete(futures)
            await asyncio.wait(tasks)
            of_loop, end = time.thread_time() - begun, time.perf_counter()
        return sum(each.result() for each in took), of_loop, start, end

    with ThreadPoolExecutor(loops) as pool:
        parts = list(pool.map(lambda _: asyncio.run(consume()), range(loops)))
    of_producers, of_loops, starts, ends = zip(*parts, strict=True)
    return sum(of_producers), sum(of_loops), max(ends) - min(starts)


def main() -> None:
    """Print a line for each argument."""
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    print(f"CPython {sys.version.split()[0]}, {'with' if has_gil else 'without'} the GIL")
    for argument in sys.argv[1:] or ["1x0", "2x0", "1x1", "1x2", "1x4", "2x1", "4x1"]:
        loops, producers = map(int, argument.split("x"))
        gc.collect()
        gc.disable()
        rounds = [one_round(loops, producers) for _ in range(ROUNDS)]
        gc.enable()
        best = [min(part) / COUNT * 1e6 for part in zip(*rounds, strict=True)]
        print(
            f"{argument}: CPU of the producers {best[0]:.1f} us, of the loops {best[1]:.1f} us a "
            f"future; {1000 / best[2]:.0f} thousand a second",
            flush=True,
        )


if __name__ == "__main__":
    main()

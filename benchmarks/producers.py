"""How much CPU a completion takes, of the threads that complete and of the loop that awaits.

    PYTHON_GIL=0 python -m benchmarks.producers [PRODUCERS ...]

Tasks of one asyncio loop await a future each. So many threads complete them all with `set_result`.
CPU time depends less than a rate on what else the machine does. Without a GIL, the loop and the
threads run at the same time: the dearer of them limits the rate.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time

from torchfut_aio import Future

COUNT, ROUNDS = 20_000, 7


async def _value(fut: Future[int]) -> int:
    return await fut


async def one_round(producers: int) -> tuple[float, float]:
    """Return the CPU of the producers together and of the loop, in seconds."""
    futures: list[Future[int]] = [Future() for _ in range(COUNT)]
    tasks = [asyncio.ensure_future(_value(fut)) for fut in futures]
    await asyncio.sleep(0)  # all wait
    start, took = threading.Event(), [0.0] * producers

    def produce(number: int) -> None:
        start.wait()
        begun = time.thread_time()
        for fut in futures[number::producers]:
            fut.set_result(number)
        took[number] = time.thread_time() - begun

    threads = [threading.Thread(target=produce, args=(number,)) for number in range(producers)]
    for thread in threads:
        thread.start()
    begun = time.thread_time()
    start.set()
    await asyncio.wait(tasks)
    of_loop = time.thread_time() - begun
    for thread in threads:
        thread.join()
    return sum(took), of_loop


def main() -> None:
    """Print a line for each number of producers: by default 1, 2 and 4."""
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    print(f"CPython {sys.version.split()[0]}, {'with' if has_gil else 'without'} the GIL")
    for producers in [int(number) for number in sys.argv[1:]] or [1, 2, 4]:
        gc.collect()
        gc.disable()
        rounds = [asyncio.run(one_round(producers)) for _ in range(ROUNDS)]
        gc.enable()
        of_producers, of_loop = (min(part) / COUNT * 1e6 for part in zip(*rounds, strict=True))
        print(f"{producers} producers: {of_producers:.1f} us, the loop: {of_loop:.1f} us a future")


if __name__ == "__main__":
    main()

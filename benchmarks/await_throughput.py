"""How long it takes until a thousand awaiting tasks have a thousand results of one thread.

    python -m benchmarks.await_throughput

Compares this package with what is written by hand today, in one run, interleaved, so
that a machine whose speed drifts is as unkind to all. The clock starts when the producer
thread does, with every task already waiting, and stops when the last task has resumed.
The floor has no torch object at all: a deque, and one wake-up of the loop a batch.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import platform
import statistics
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any

import torch

import torchfut_aio

TASKS = 1_000

# What each way of doing it is made of: futures, how a task awaits one, and how a thread
# completes one.
Way = tuple[list[Any], Callable[[Any], Awaitable[Any]], Callable[[Any, int], None]]


def ours() -> Way:
    futures = [torchfut_aio.Future[int]() for _ in range(TASKS)]
    return futures, lambda fut: fut, torchfut_aio.Future.set_result


def hand_written_bridge() -> Way:
    loop = asyncio.get_running_loop()

    def bridged(fut: torch.futures.Future[int]) -> asyncio.Future[int]:
        waiter: asyncio.Future[int] = loop.create_future()

        def resume(value: int) -> None:
            if not waiter.done():
                waiter.set_result(value)

        def bridge(fut: torch.futures.Future[int]) -> None:
            loop.call_soon_threadsafe(resume, fut.value())

        fut.add_done_callback(bridge)
        return waiter

    futures = [torch.futures.Future[int]() for _ in range(TASKS)]
    return futures, bridged, torch.futures.Future.set_result


def wrap_future() -> Way:
    futures = [concurrent.futures.Future[int]() for _ in range(TASKS)]
    return futures, asyncio.wrap_future, concurrent.futures.Future.set_result


def run_in_executor() -> Way:
    loop = asyncio.get_running_loop()
    futures = [torch.futures.Future[int]() for _ in range(TASKS)]
    return (
        futures,
        lambda fut: loop.run_in_executor(None, fut.wait),
        torch.futures.Future.set_result,
    )


def floor() -> Way:
    loop = asyncio.get_running_loop()
    arrived: deque[tuple[asyncio.Future[int], int]] = deque()
    armed = False

    def serve() -> None:
        nonlocal armed
        armed = False
        for _ in range(len(arrived)):
            fut, value = arrived.popleft()
            fut.set_result(value)

    def complete(fut: asyncio.Future[int], value: int) -> None:
        nonlocal armed
        arrived.append((fut, value))
        if not armed:
            armed = True
            loop.call_soon_threadsafe(serve)

    return [loop.create_future() for _ in range(TASKS)], lambda fut: fut, complete


WAYS = [ours, hand_written_bridge, wrap_future, run_in_executor, floor]


async def microseconds_per_await(way: Callable[[], Way]) -> float:
    futures, awaitable, complete = way()

    async def task(fut: Any) -> Any:
        return await awaitable(fut)

    def produce() -> None:
        for n, fut in enumerate(futures):
            complete(fut, n)

    tasks = [asyncio.ensure_future(task(fut)) for fut in futures]
    await asyncio.sleep(0)  # each of them is waiting now
    producer = threading.Thread(target=produce)
    start = perf_counter()
    producer.start()
    results = await asyncio.gather(*tasks)
    elapsed = perf_counter() - start
    producer.join()
    assert results == list(range(TASKS))
    return elapsed / TASKS * 1e6


def loops() -> dict[str, Callable[..., float]]:
    runners: dict[str, Callable[..., float]] = {"asyncio": asyncio.run}
    try:
        import uvloop
    except ImportError:
        print("uvloop is not installed: asyncio only", file=sys.stderr)
    else:
        runners["uvloop"] = uvloop.run
    return runners


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=41, help="runs of each (default: 41)")
    rounds = parser.parse_args().rounds
    print(
        f"{TASKS} tasks, one producer thread, {rounds} interleaved rounds; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    for name, run in loops().items():
        times: dict[str, list[float]] = {way.__name__: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                times[way.__name__].append(run(microseconds_per_await(way)))
        base = statistics.median(times["ours"])
        print(f"\n{name:22}   us/await   quartiles      against ours")
        for way_name, measured in times.items():
            low, median, high = statistics.quantiles(measured, n=4)
            label = way_name.replace("_", " ")
            print(f"  {label:20} {median:10.1f}   {low:5.1f} {high:6.1f}   {median / base:10.2f}")


if __name__ == "__main__":
    main()

"""Waves: many tasks, each of which awaits a future that another thread completes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from queue import SimpleQueue
from threading import Thread
from time import perf_counter
from typing import Any

import anyio
import trio

from ._ways import Way

Act = Callable[[list[Any], Callable[[], object]], object]


async def wave(
    loop: str, way: Way, count: int, act: Act, note: Callable[[Any], object] = id
) -> tuple[float, float]:
    """Start tasks that await a future each, and end them by ``act(futures, cancel)``.

    ``note`` is called with each value. Return the seconds until all wait, and from then until the
    last has ended.
    """
    waiting = ended = 0
    last = 0.0
    all_wait, all_ended = anyio.Event(), anyio.Event()

    async def task(fut: Any) -> None:
        nonlocal waiting, ended, last
        waiting += 1
        if waiting == count:
            all_wait.set()
        try:
            note(await way.wait(fut))
        finally:
            ended += 1
            if ended == count:
                last = perf_counter()
                all_ended.set()

    async with native_tasks(loop) as (start_soon, cancel):
        begin = perf_counter()
        futures = [way.new() for _ in range(count)]
        for fut in futures:
            start_soon(task, fut)
        await all_wait.wait()
        started = perf_counter()
        act(futures, cancel)
        await all_ended.wait()
    return started - begin, last - started


@asynccontextmanager
async def native_tasks(loop: str) -> AsyncIterator[tuple[Callable[..., object], Callable[[], Any]]]:
    """Yield functions that start a task and cancel all; a TaskGroup would do more for each."""
    if loop == "trio":
        async with trio.open_nursery() as nursery:
            yield nursery.start_soon, nursery.cancel_scope.cancel
        return
    tasks: list[asyncio.Task[None]] = []
    yield (
        lambda function, *args: tasks.append(asyncio.create_task(function(*args))),
        lambda: [task.cancel() for task in tasks],
    )
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):  # rather than cancelled
            raise ended


@contextmanager
def producers(way: Way, threads: int = 1, pause: float = 0.0) -> Iterator[Act]:
    """Yield an act that hands futures to threads, which complete a share each, in one go.

    The value is the time at which the thread began, ``pause`` seconds after it got them.
    """
    queues: list[SimpleQueue[list[Any]]] = [SimpleQueue() for _ in range(threads)]

    def produce(queue: SimpleQueue[list[Any]]) -> None:
        while futures := queue.get():
            time.sleep(pause)
            way.complete(futures, [perf_counter()] * len(futures))
            del futures  # or they would be freed while the clock runs again

    def hand_out(futures: list[Any], _cancel: object = None) -> None:
        for n, queue in enumerate(queues):
            if share := futures[n::threads]:
                queue.put(share)

    for queue in queues:
        Thread(target=produce, args=(queue,)).start()
    try:
        yield hand_out
    finally:
        for queue in queues:
            queue.put([])

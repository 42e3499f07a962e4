"""Waves: as many tasks, each of which awaits a future that another thread completes."""

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

from ._ways import Way

HandOut = Callable[[list[Any]], None]


class Wave:
    """Tasks that each await a future of their own; `note` is called with what each got."""

    def __init__(self, loop: str, way: Way, count: int, note: Callable[[Any], object]) -> None:
        self.futures: list[Any] = []
        self._loop, self._way, self._count, self._note = loop, way, count, note
        self._waiting = self._ended = 0
        self._all_wait, self._all_ended = anyio.Event(), anyio.Event()
        self._last = 0.0

    async def complete(self, hand_out: HandOut) -> tuple[float, float]:
        """Returns seconds until all wait, and from the first completed to the last resumed."""
        async with native_tasks(self._loop) as (start_soon, _):
            starting = await self._start(start_soon)
            begin = perf_counter()
            hand_out(self.futures)
            await self._all_ended.wait()
        return starting, self._last - begin

    async def cancel(self, while_pending: Callable[[], object]) -> float:
        """Returns seconds from when the tasks are cancelled until the last has ended."""
        async with native_tasks(self._loop) as (start_soon, cancel):
            await self._start(start_soon)
            while_pending()
            begin = perf_counter()
            cancel()
        return self._last - begin

    async def _start(self, start_soon: Callable[..., object]) -> float:
        begin = perf_counter()
        self.futures = [self._way.new() for _ in range(self._count)]
        for fut in self.futures:
            start_soon(self._task, fut)
        await self._all_wait.wait()
        return perf_counter() - begin

    async def _task(self, fut: Any) -> None:
        self._waiting += 1
        if self._waiting == self._count:
            self._all_wait.set()
        try:
            self._note(await self._way.wait(fut))
        finally:
            self._ended += 1
            if self._ended == self._count:
                self._last = perf_counter()
                self._all_ended.set()


@asynccontextmanager
async def native_tasks(loop: str) -> AsyncIterator[tuple[Callable[..., object], Callable[[], Any]]]:
    """Gives what starts a task and what cancels all, and waits for them in the end.

    A task group would do more for each task that ends, while the clock runs.
    """
    if loop == "trio":
        import trio

        async with trio.open_nursery() as nursery:
            yield nursery.start_soon, nursery.cancel_scope.cancel
        return
    tasks: list[asyncio.Task[None]] = []
    yield (
        lambda function, *args: tasks.append(asyncio.create_task(function(*args))),
        lambda: [task.cancel() for task in tasks],
    )
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()  # or its error


@contextmanager
def producers(way: Way, threads: int = 1, pause: float = 0) -> Iterator[HandOut]:
    """Gives what hands futures to threads that complete them, a share each, in one go.

    The value is the time at which the thread began, ``pause`` seconds after it was asked to.
    """
    queues: list[SimpleQueue[list[Any] | None]] = [SimpleQueue() for _ in range(threads)]

    def produce(queue: SimpleQueue[list[Any] | None]) -> None:
        while (futures := queue.get()) is not None:
            if pause:
                time.sleep(pause)
            way.complete(futures, [perf_counter()] * len(futures))
            futures = None  # nobody pays for freeing them while the clock runs again

    def hand_out(futures: list[Any]) -> None:
        for n, queue in enumerate(queues):
            queue.put(futures[n::threads])

    running = [Thread(target=produce, args=(queue,)) for queue in queues]
    for thread in running:
        thread.start()
    try:
        yield hand_out
    finally:
        for queue in queues:
            queue.put(None)
        for thread in running:
            thread.join()

"""Micro-batching: each item that is submitted is a future, and a function runs on many items.

The thread of ``_batch_worker.py`` makes the batches. Of an async function it has the loop make a
task for each batch, and waits for it.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, Generic, NamedTuple, TypeVar

from . import _loops
from ._arguments import timeout_checked
from ._batch_worker import BatchWorker
from ._errors import BatcherClosedError, QueueFullError
from ._future import Future, InternalFuture
from ._tasks import Promise, run_contained

T = TypeVar("T")
R = TypeVar("R")

_LOOK = 0.1  # seconds after which the thread looks whether the loop can still run a task


class BatcherStatistics(NamedTuple):
    """What a `Batcher` has done so far.

    Attributes:
        queued: How many items wait now.
        running: How many are in the batch that runs now.
        batches: How many times the function has run.
        items: On how many items in all.
        rejected: How many items were refused because the queue was full.
        skipped: How many were given up before they were run.
        waited: For how many seconds the items that were run had waited, in all.
        ran: For how many seconds the function has run.
    """

    queued: int
    running: int
    batches: int
    items: int
    rejected: int
    skipped: int
    waited: float
    ran: float

    @property
    def mean_batch_size(self) -> float:
        """How many items a batch had on average; 0.0 before the first."""
        return self.items / self.batches if self.batches else 0.0


class Batcher(Generic[T, R]):
    """Runs a function on many items at once, and makes a future of each item's result.

    A batch begins when ``max_batch`` items are there, or when the first of them has waited for
    ``max_wait`` seconds. One batch runs at a time, in a thread of the batcher; what comes meanwhile
    waits for the next. The thread ends when it has had nothing to do for some seconds, and another
    starts when there is something.

    An async function runs as a task of the loop that has entered the batcher, ``async with``.

    Every future completes. If the function raises, all items of the batch fail with its error. If
    a result is an exception, that item fails with it. An item whose future is done before its
    batch begins is skipped: to give one up, cancel its future. Leaving ``with`` or
    ``async with`` closes the batcher, and drains it if no error is under way. So does dropping
    it, or the exit of the interpreter, which waits for the thread. A process that forks keeps all
    this for itself: the child begins with nothing queued.

    Args:
        function: Called with a list of items; returns as many results, in that order, as a list
            or as a tensor of that many rows. Kernels may still fill the results, on the streams
            that are current when it returns. If it works on a stream of its own, it has the
            current one wait for that.
        max_batch: The most items in a batch.
        max_wait: How many seconds an item may wait for more to come. With 0 or less, a batch is
            what has come while the batch before it ran.
        max_queue: The most items that may wait, at least ``max_batch``; `submit` refuses more.
            Threads that submit at the same time may exceed it by one each.
        name: The name of the thread, or of the task.

    Raises:
        TypeError, ValueError: An argument is of another type, or out of range.

    Example:
        >>> import asyncio, torch
        >>> def double(items):
        ...     return (2 * torch.tensor(items)).tolist()
        >>> async def main():
        ...     async with torchfut_aio.Batcher(
        ...         double, max_batch=64, max_wait=0.001, max_queue=1000
        ...     ) as batcher:
        ...         futures = [batcher.submit(n) for n in range(100)]
        ...         return sum(await torchfut_aio.gather(futures))
        >>> asyncio.run(main())
        9900
    """

    def __init__(
        self,
        function: Callable[[list[T]], Iterable[R | BaseException]]
        | Callable[[list[T]], Awaitable[Iterable[R | BaseException]]],
        *,
        max_batch: int,
        max_wait: float,
        max_queue: int,
        name: str | None = None,
    ) -> None:
        if not callable(function):
            raise TypeError(
                f"a batcher takes a function of a list of items, not {type(function).__qualname__}"
            )
        for argument, value, least in (
            ("max_batch", max_batch, 1),
            ("max_queue", max_queue, max_batch),
        ):
            if not isinstance(value, int):
                raise TypeError(f"{argument} must be an int, not {type(value).__qualname__}")
            if value < least:
                raise ValueError(f"{argument} must be at least {least}, not {value}")
        if name is None:
            called = getattr(function, "__qualname__", type(function).__qualname__)
            name = f"torchfut_aio batcher of {called}"
        wait = timeout_checked(max_wait, "max_wait must be a number of seconds")
        self._max_queue = max_queue
        self._worker = BatchWorker(function, max_batch, wait, name)
        self._needs_loop = _is_async(function)
        self._home: _Home | None = None

    # ------------------------------------------------------------------------------ items

    def submit(self, item: T) -> Future[R]:
        """Queues an item, from any thread, and returns the future of its result.

        Raises:
            QueueFullError: ``max_queue`` items wait.
            BatcherClosedError: The batcher is closed, or is being closed.
            RuntimeError: The function is async and no loop has entered the batcher, or no thread
                could be started.
        """
        worker = self._worker
        if worker.closing:
            raise BatcherClosedError("the batcher is closed and takes no more items")
        if self._needs_loop and self._home is None:
            raise RuntimeError("the function is async: enter the batcher first, by async with")
        if len(worker.work) >= self._max_queue and not worker.make_room(self._max_queue):
            worker.rejected += 1
            raise QueueFullError(f"the queue is full: {self._max_queue} items wait")
        future: Future[R] = Future()
        worker.submit(future, (item, time.monotonic()))
        if worker.ended.done():  # it may have ended meanwhile: rule 3 of `_batch_worker.py`
            worker.fail_queued(BatcherClosedError("the batcher is closed"))
        return future

    def statistics(self) -> BatcherStatistics:
        """Returns what the batcher has done so far, from any thread."""
        worker = self._worker
        return BatcherStatistics(
            len(worker.work),
            len(worker.batch),
            worker.batches,
            worker.items,
            worker.rejected,
            worker.skipped,
            worker.waited,
            worker.ran,
        )

    # ---------------------------------------------------------------------------- closing

    def close(self, drain: bool = True, *, timeout: float | None = None) -> None:
        """Takes no more items, and returns when the function runs no more.

        It may be called again, to wait again. The function itself, and callbacks of the futures,
        may call it; then it does not wait.

        Args:
            drain: Whether what is queued is run; otherwise it fails with `BatcherClosedError`.
            timeout: For how many seconds to wait. After that everything that is pending fails
                with `BatcherClosedError`, the batch that runs included.

        Raises:
            TimeoutError: The function still runs. The interpreter will wait for it to return.
            RuntimeError: The function is async, and needs the loop that runs in this thread.

        Warns:
            BlockingWaitWarning: This thread runs an event loop: ``await aclose()`` there.
        """
        if self._home is not None and _loops.loop_in_this_thread():
            raise RuntimeError("close() would wait for this thread's event loop: await aclose()")
        ended = self._begin_to_close(drain)
        if threading.current_thread() in self._worker.threads():
            return
        try:
            ended.wait(timeout)
        except TimeoutError:
            raise self._abandon(timeout) from None

    async def aclose(self, drain: bool = True, *, timeout: float | None = None) -> None:
        """Does what `close` does, and waits without blocking the loop.

        Args:
            drain: Whether what is queued is run; otherwise it fails with `BatcherClosedError`.
            timeout: For how many seconds to wait. After that everything that is pending fails
                with `BatcherClosedError`, the batch that runs included.

        Raises:
            TimeoutError: The function still runs. The interpreter will wait for it to return.
        """
        ended = self._begin_to_close(drain)
        if timeout is None:
            await ended
            return
        import anyio  # whoever never sets a timeout does not need it

        try:
            with anyio.fail_after(timeout_checked(timeout)):
                await ended
        except TimeoutError:
            raise self._abandon(timeout) from None

    def _begin_to_close(self, drain: bool) -> Future[None]:
        worker = self._worker
        if not worker.ended.done():
            worker.closing = True
            if not drain:
                worker.fail_queued(BatcherClosedError("the batcher was closed, and not drained"))
            worker.begin_to_close()
        return worker.ended

    def _abandon(self, timeout: float | None) -> TimeoutError:
        text = "the batcher was closed, and its function did not return in time"
        self._worker.abandon(BatcherClosedError(text))
        seconds = timeout_checked(timeout or 0.0)
        return TimeoutError(
            f"the function of the batcher did not return within {seconds:g} s; what was pending "
            "has failed"
        )

    def __enter__(self) -> Batcher[T, R]:
        if self._needs_loop:
            raise RuntimeError("the function is async: enter the batcher by async with")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(drain=kind is None)

    async def __aenter__(self) -> Batcher[T, R]:
        if self._needs_loop:
            if self._home is not None:
                raise RuntimeError("a loop has entered the batcher already")
            worker = self._worker
            self._home = _Home(worker.ended)
            worker.function = functools.partial(
                _run_on_loop, self._home, worker.function, worker.name
            )
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        await self.aclose(drain=kind is None)

    def __del__(self) -> None:
        worker = getattr(self, "_worker", None)  # None if an argument was wrong
        if worker is not None and worker.threads():
            worker.closing = True
            worker.ring()


def _is_async(function: Any) -> bool:
    call = getattr(type(function), "__call__")  # noqa: B004, B009
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


class _Home:
    """The loop that has entered a batcher, until it ends, or the batcher does.

    A loop that ends cancels its tasks once. It still runs for a while, but would never finish a
    task that it is given then; so one task waits to be cancelled.
    """

    def __init__(self, batcher_ended: Future[None]) -> None:
        self._loop = _loops.current()
        self._thread = threading.current_thread()
        self._has_ended = False
        self._loop.spawn(self._end, self._wait, batcher_ended)

    async def _wait(self, batcher_ended: Future[None]) -> None:
        try:
            await batcher_ended
        finally:
            self._end()

    def _end(self) -> None:
        self._has_ended = True

    def runs(self) -> bool:
        """Tells whether the loop still runs, from any thread."""
        # A loop that closes may keep a call, and not make it; one that has stopped may stay open.
        return not self._has_ended and self._thread.is_alive() and self._loop.call_soon(_nothing)

    def start(self, promise: Promise, function: Any, items: list[Any]) -> None:
        """Has the loop make a task of ``function(items)``."""

        def start() -> None:
            if self._has_ended:
                promise.cancel("its event loop has ended")
                return
            try:
                self._loop.spawn(promise.end, run_contained, promise, function, (items,))
            except Exception as error:  # the loop is about to close
                promise.fail(error)

        if not self._loop.call_soon(start):
            raise RuntimeError("the event loop that entered the batcher has ended")


def _nothing() -> None:
    pass


def _run_on_loop(home: _Home, function: Any, name: str, items: list[Any]) -> Any:
    """Runs an async function as a task, and returns what it does, to the batcher's thread."""
    future = _start_on_loop(home, function, name, items)
    while not future.done():
        with suppress(TimeoutError):
            future.wait(_LOOK)
        if not home.runs() and not future.done():
            raise RuntimeError("the event loop that entered the batcher has ended")
    return future.wait()


def _start_on_loop(home: _Home, function: Any, name: str, items: list[Any]) -> Future[Any]:
    """As a function of its own, that nothing but the loop refers to the promise afterwards."""
    future: Future[Any] = InternalFuture()
    home.start(Promise(future, name), function, items)
    return future

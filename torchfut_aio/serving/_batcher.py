"""Micro-batching: one call of a function for many items, and a result for each of them.

The queue of ``_batch_queue.py`` makes the batches, and the workers of ``_batch_worker.py`` run
them, each in a thread. If the function is async, a worker lets the loop of ``_owner_loop.py`` run a
task for each batch, and waits for it.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .. import _core
from .._absent import Absent
from .._arguments import async_checked, number_checked, size_checked, timeout_checked
from .._dependent import DependentFuture
from .._errors import BatcherClosedError, own_copy
from .._future import Future, InternalFuture
from .._process_local import ProcessLocal
from .._repr import function_name
from ._batch_queue import BatchQueue, Limits
from ._batch_worker import BatchReport, BatchWorker
from ._owner_loop import OwnerLoop

T = TypeVar("T")
R = TypeVar("R")

_CLOSE_BLOCKS = (
    "closing a batcher blocks the event loop that this thread runs; use `async with`, or await "
    "aclose()"
)
_INITIALIZER_BLOCKS = (
    "the initializer of a batcher blocks the event loop that this thread runs; use `async with`"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatcherStatistics:
    """What a `Batcher` has done so far.

    Attributes:
        queued: The number of items that wait now.
        running: The number of items in the batches that run now.
        batches: The number of times that the function has run.
        items: The number of items on which it has run.
        rejected: The number of items that were refused because the queue was full.
        given_up: The number of items that were given up before they were run.
        failed: The number of items that failed: with their batch, by a result that is an exception,
            or because of their cost. Items that fail because the batcher closes do not count.
        wait_time: The total time that items waited before they were run, in seconds.
        run_time: The total time that the function ran, in seconds.
        mean_batch_size: The mean number of items in a batch; 0.0 before the first.
        oldest: The time that the oldest queued item has waited, in seconds; 0.0 if none waits.
        running_for: The time that the present batch has run, in seconds; the longest of several,
            and 0.0 if none runs.

    Example:
        >>> import dataclasses, json
        >>> with torchfut_aio.Batcher(list, max_batch_size=8, max_queue_size=8) as batcher:
        ...     _ = batcher.submit(5).wait()
        ...     text = json.dumps(dataclasses.asdict(batcher.statistics()))
        >>> json.loads(text)["items"]
        1
    """

    queued: int
    running: int
    batches: int
    items: int
    rejected: int
    given_up: int
    failed: int
    wait_time: float
    run_time: float
    mean_batch_size: float
    oldest: float
    running_for: float


class Batcher(ProcessLocal, Generic[T, R]):
    """Run a function on many items at once, and return each item's result.

    ``await batcher(item)`` waits for a result, and gives the item up if the wait ends before.
    `submit` returns a future of the result instead.

    A batch begins when ``max_batch_size`` items wait, when no further item fits into
    ``max_batch_cost``, or when the first item has waited for ``max_wait`` seconds. Items form
    batches in the order in which they were submitted. While as many batches run as may run at the
    same time, items wait for the next one.

    The function is called in a thread of the batcher, always the same one. The thread starts when
    the batcher is entered, or with the first item, and ends when the batcher is closed. So models
    and settings that belong to a thread stay. Until an item comes, the thread sleeps. With
    ``max_concurrent_batches``, there are as many threads, and each runs one batch at a time. An
    async function runs instead as a task of the loop that has entered the batcher by
    ``async with``. No function sees the context (``contextvars``) of a caller, as a batch has many
    callers.

    Every future completes. If the function raises, all items of the batch fail with its error,
    each with a separate copy of the exception. A result that is an exception fails its item. An
    item whose future is done before its batch begins is not run.

    The end of the ``with`` or ``async with`` block closes the batcher, and runs queued items unless
    the block raises. Garbage collection and the exit of the interpreter also close it; the exit
    waits for the threads. (A batcher is not collected if its function refers to it, such as a
    method of the object that owns it.) A forked child begins with an empty queue and with threads
    of its own. It has to enter the batcher again if the function is async.

    Args:
        func: Called with a list of n items. It returns n results in the same order: a list, tuple
            or other sequence that is not text, or a tensor or array of shape (n, ...).
            Anything else, such as a dict, fails the batch with a TypeError. If it returns a tensor,
            each item gets a ``.clone()`` of its row, as rows share storage; to return the rows
            themselves, return ``list(tensor)``. Kernels on the streams that are current when it
            returns may still fill the results. If it uses another stream, let the current one wait
            for that before the return: a ``with stream:`` around ``return`` has ended by then.
            Return clones of the static output of a CUDA graph: the next replay changes it.
        max_batch_size: The largest number of items in a batch.
        max_queue_size: The largest number of items that wait, at least ``max_batch_size``. When so
            many wait, `submit` raises `QueueFullError`. If n threads submit at the same time, they
            may exceed it by n. None sets no limit.
        max_wait: The longest time that an item waits for others, in seconds. With 0 or less, a
            batch has the items that came while the last ones ran.
        cost: Called with a list of items; returns what a batch of them would cost, such as the
            number of tokens after padding. The cost must not be negative, nor fall when an item is
            added. It is called in a thread of the batcher as a batch is made, often for parts of
            the batch too. An item fails if it alone costs more than ``max_batch_cost``, or if
            ``cost`` raises, or returns no number, for it alone.
        max_batch_cost: The largest cost of a batch, in the unit of ``cost``. Required with
            ``cost``.
        max_concurrent_batches: The number of batches that may run at the same time. With more than
            one, the function is called from several threads, or in several tasks.
        initializer: Called in each thread before its first batch, with the number of the thread,
            from 0 to ``max_concurrent_batches`` - 1: to load a model, choose a device, or set the
            number of torch's threads. Several threads call it at the same time. The block of
            ``with`` or ``async with`` begins when it has returned in all threads. If it raises, the
            statement raises the same error, and the batcher is closed. Without a block, every item
            fails with its error. Not for async functions.
        on_batch: Called with a `BatchReport` after each batch, in the thread that ran it, when the
            futures are done. That thread runs no other batch until it returns. An error that it
            raises is logged.
        name: The name of the threads, or of the tasks. By default, ``torchfut_aio batcher of`` and
            the name of the function.

    Raises:
        TypeError, ValueError: An argument is of another type, or out of range.

    Example:
        >>> import asyncio, torch
        >>> def double(items):
        ...     return (2 * torch.tensor(items)).tolist()
        >>> async def main():
        ...     async with torchfut_aio.Batcher(
        ...         double, max_batch_size=64, max_wait=0.001, max_queue_size=1000
        ...     ) as batcher:
        ...         return sum(await asyncio.gather(*[batcher(n) for n in range(100)]))
        >>> asyncio.run(main())
        9900
    """

    def __init__(
        self,
        func: Callable[[list[T]], Iterable[R | BaseException]]
        | Callable[[list[T]], Awaitable[Iterable[R | BaseException]]],
        *,
        max_batch_size: int,
        max_queue_size: int | None,
        max_wait: float = 0.0,
        cost: Callable[[list[T]], float] | None = None,
        max_batch_cost: float | None = None,
        max_concurrent_batches: int = 1,
        initializer: Callable[[int], object] | None = None,
        on_batch: Callable[[BatchReport[T]], object] | None = None,
        name: str | None = None,
    ) -> None:
        if not callable(func):
            raise TypeError(
                f"a batcher takes a function of a list of items, not {type(func).__qualname__}"
            )
        async_checked(func)
        limits = _limits(max_batch_size, max_queue_size, max_wait, cost, max_batch_cost)
        workers = size_checked(max_concurrent_batches, "max_concurrent_batches")
        for each, what in ((cost, "cost"), (initializer, "initializer"), (on_batch, "on_batch")):
            _check_plain_function(each, what)
        self._needs_loop = _is_async(func)
        if self._needs_loop and initializer is not None:
            raise TypeError(
                "an initializer is for threads, and an async function runs in tasks: prepare what "
                "it needs before the batcher is entered"
            )
        if not isinstance(name, str | None):
            raise TypeError(f"name must be a str or None, not {type(name).__qualname__}")
        if name is None:
            name = (
                f"torchfut_aio batcher of {getattr(func, '__qualname__', type(func).__qualname__)}"
            )
        self._queue = BatchQueue(name, limits)
        for _ in range(workers):
            self._queue.workers.append(BatchWorker(self._queue, func, initializer, on_batch))

    _what = "a Batcher"
    _cure = "create it in the process that submits; a child that is forked begins with none queued"

    if not TYPE_CHECKING:  # names of executors
        map = Absent("a Batcher has no map(): submit each item, and gather() the futures")
        shutdown = Absent(
            "a Batcher has no shutdown(): leave its block, or await aclose(), or close()"
        )

    # ------------------------------------------------------------------------------ items

    async def __call__(self, item: T, /) -> R:
        """Wait for the result of an item.

        The item is queued when the coroutine takes its first step. If the wait ends without a
        result, for example because the task is cancelled or a timeout around the wait expires, the
        item leaves the queue at once, and is not run unless its batch has begun.

        Raises:
            BaseException: The error of the item or of its batch.
            QueueFullError, BatcherClosedError, RuntimeError: As for `submit`.

        Example:
            >>> import asyncio
            >>> async def main():
            ...     async with torchfut_aio.Batcher(
            ...         sorted, max_batch_size=8, max_queue_size=100
            ...     ) as batcher:
            ...         async with asyncio.timeout(1):
            ...             return await batcher(5)
            >>> asyncio.run(main())
            5
        """
        future: Future[R] = Future() if not self._needs_loop else self._future_of_loop()
        try:
            self._queue.put(future, item)
            return await future
        except BaseException:
            try:  # `del` and not a call, as an interrupt can come when a call begins
                del self._queue.items[future]
            except KeyError:
                pass  # its batch has begun, or it was not queued
            else:
                self._queue.given_up.add()
            _core.ignore_error(future)  # if its batch has begun, and fails
            raise
        finally:
            del future  # the frames of its error lead here

    def submit(self, item: T, /) -> Future[R]:
        """Queue an item, from any thread, and return the future of its result.

        To give the item up, cancel the future. The item is not run, and leaves the queue when its
        batch would begin. A full queue drops such items earlier. It searches for them at most 5% of
        the time, so it may still raise `QueueFullError` shortly after a search.

        Raises:
            QueueFullError: ``max_queue_size`` items wait.
            BatcherClosedError: The batcher was closed.
            RuntimeError: The function is async, and no loop of this process has entered the
                batcher, or that loop cannot run because this thread runs another loop. Or no thread
                could be started, for example because the interpreter is shutting down.
        """
        future: Future[R] = Future() if not self._needs_loop else self._future_of_loop()
        self._queue.put(future, item)
        return future

    def _future_of_loop(self) -> DependentFuture[R]:
        self._queue.check_open()
        owner = self._queue.owner
        if owner is None:
            raise RuntimeError(
                "the function is async: enter the batcher first, by async with; a process that was "
                "forked has to enter it again"
            )
        owner.check()
        future: DependentFuture[R] = DependentFuture()
        future.depend_on(owner)
        return future

    @property
    def closed(self) -> bool:
        """True if the batcher takes no more items. Some may still run."""
        return self._queue.closing

    @property
    def name(self) -> str:
        """The name of the batcher's threads, or of its tasks."""
        return self._queue.name

    def __repr__(self) -> str:
        queue = self._queue
        state = "closed" if self.closed else "open"
        limit = queue.limits.max_queue_size
        of = "" if limit == math.inf else f"/{limit}"
        running = sum(worker.running() for worker in queue.workers)
        return (
            f"<{type(self).__qualname__} {self.name!r} {state} queued={len(queue.items)}{of} "
            f"running={running}>"
        )

    def statistics(self) -> BatcherStatistics:
        """Return a snapshot of what the batcher has done so far. Call it from any thread."""
        queue, now = self._queue, time.monotonic()
        workers = queue.workers
        oldest = queue.oldest()  # first, as it drops items that were given up
        batches = sum(worker.batches for worker in workers)
        items = sum(worker.items for worker in workers)
        began = [each for each in [worker.began for worker in workers] if each is not None]
        return BatcherStatistics(
            queued=len(queue.items),
            running=sum(worker.running() for worker in workers),
            batches=batches,
            items=items,
            rejected=queue.rejected.total(),
            given_up=queue.given_up.total(),
            failed=sum(worker.failed for worker in workers),
            wait_time=sum((worker.wait_time for worker in workers), 0.0),
            run_time=sum((worker.run_time for worker in workers), 0.0),
            mean_batch_size=items / batches if batches else 0.0,
            oldest=max(now - (oldest or now), 0.0),
            running_for=max(now - min(began, default=now), 0.0),
        )

    # ---------------------------------------------------------------------------- closing

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Close the batcher to new items, and block until the last batch has run.

        A second call waits again. A call in the function itself, or in a callback of a future, does
        not wait.

        Args:
            drain: Run queued items. If False, they fail with `BatcherClosedError`.
            timeout: The longest time to wait, in seconds. Then every pending item fails with
                `BatcherClosedError`, also those in the batch that runs.

        Raises:
            TimeoutError: The function still runs. At exit, the interpreter waits for it to return.
            TypeError, ValueError: ``timeout`` is not a number, or is NaN; the batcher stays open.
            RuntimeError: The function is async, and needs the event loop of this thread.

        Warns:
            BlockingWaitWarning: This thread runs an event loop: ``await aclose()`` there.
        """
        seconds = None if timeout is None else timeout_checked(timeout)
        if self._queue.is_inside():
            self._begin_to_close(drain)
            return
        owner = self._queue.owner
        if owner is not None and owner.needs_caller(self._queue.has_work()):
            raise RuntimeError(
                "close() would wait for this thread's event loop, which entered the batcher: await "
                "aclose() on it"
            )
        ended = self._begin_to_close(drain)
        try:
            ended.block(seconds, _CLOSE_BLOCKS)
        except TimeoutError:
            self._abandon(seconds)

    async def aclose(self, *, drain: bool = True, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Do what `close` does, and wait without blocking the loop.

        Args:
            drain: As for `close`.
            timeout: As for `close`.

        Raises:
            TimeoutError, TypeError, ValueError: As for `close`.
            RuntimeError: The function is async, and its loop cannot run the items that are left,
                because this thread runs another loop. The batcher stays open.
        """
        seconds = None if timeout is None else timeout_checked(timeout)
        if self._queue.is_inside():
            self._begin_to_close(drain)
            return
        owner = self._queue.owner
        if owner is not None and self._queue.has_work():
            owner.check()
        ended = self._begin_to_close(drain)
        if seconds is None:
            await ended
            return
        import anyio  # only a timeout needs it

        try:
            with anyio.fail_after(seconds):
                await ended
        except TimeoutError:
            self._abandon(seconds)

    def _begin_to_close(self, drain: bool) -> InternalFuture[None]:
        queue = self._queue
        if not queue.ended.done():
            queue.closing = True
            if not drain:
                queue.fail_queued(BatcherClosedError("the batcher was closed with drain=False"))
            queue.begin_to_close()
        return queue.ended

    def _abandon(self, seconds: float | None) -> None:
        had_work = self._queue.has_work()
        text = "the batcher was closed, and its function did not return in time"
        self._queue.abandon(BatcherClosedError(text))
        if had_work:  # otherwise the function does not run, and only the end of a thread is late
            raise TimeoutError(
                f"the function of the batcher did not return within {seconds:g} s; what was "
                "pending has failed"
            ) from None

    def __enter__(self) -> Batcher[T, R]:
        if self._needs_loop:
            raise RuntimeError("the function is async: enter the batcher by async with")
        self._start().block(None, _INITIALIZER_BLOCKS)
        self._check_initialized()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(drain=kind is None)

    async def __aenter__(self) -> Batcher[T, R]:
        queue = self._queue
        ready = self._start()
        if not self._needs_loop:
            await ready
            self._check_initialized()
        elif queue.owner is not None and queue.owner.runs():
            raise RuntimeError("a loop has entered the batcher already")
        else:
            # Last: if an interrupt comes before, the entry can be repeated.
            queue.owner = OwnerLoop(queue.ended, queue.name)
        return self

    def _start(self) -> InternalFuture[None]:
        if self.closed:
            raise BatcherClosedError(
                "the batcher was closed, and cannot be entered again: create one for each block"
            )
        return self._queue.start()

    def _check_initialized(self) -> None:
        if self._queue.broken is not None:
            self._begin_to_close(drain=False)
            raise own_copy(self._queue.broken)

    async def __aexit__(self, kind: object, *_: object) -> None:
        await self.aclose(drain=kind is None)

    def __del__(self) -> None:
        queue: BatchQueue | None = getattr(self, "_queue", None)  # None if __init__() has raised
        if queue is not None and any(worker.threads() for worker in queue.workers):
            queue.closing = True
            queue.wake()
        elif queue is not None and queue.owner is not None:
            queue.finish()  # ends the task of the loop that waits for it


def _limits(
    max_batch_size: int,
    max_queue_size: int | None,
    max_wait: float,
    cost: Callable[[list[Any]], float] | None,
    max_batch_cost: float | None,
) -> Limits:
    """Return these arguments of a batcher, or raise TypeError or ValueError."""
    max_batch_size = size_checked(max_batch_size, "max_batch_size")
    if max_queue_size is not None:
        max_queue_size = size_checked(max_queue_size, "max_queue_size", "an int or None")
        if max_queue_size < max_batch_size:
            raise ValueError(
                "max_queue_size must be at least max_batch_size, which is "
                f"{max_batch_size}; not {max_queue_size}"
            )
    wait = max(number_checked(max_wait, "max_wait must be a number of seconds"), 0.0)
    if (cost is None) != (max_batch_cost is None):
        missing = "cost" if cost is None else "max_batch_cost"
        raise TypeError(f"cost and max_batch_cost are needed together: {missing} is missing")
    most = math.inf
    if max_batch_cost is not None:
        most = number_checked(max_batch_cost, "max_batch_cost must be a number")
        if most <= 0:
            raise ValueError(f"max_batch_cost must be positive, not {most:g}")
    limit = math.inf if max_queue_size is None else max_queue_size
    return Limits(max_batch_size, limit, wait, cost, most)


def _check_plain_function(function: Any, name: str) -> None:
    if function is None:
        return
    if not callable(function):
        raise TypeError(f"{name} must be a function or None, not {type(function).__qualname__}")
    async_checked(function)
    if _is_async(function):
        raise TypeError(
            f"{name} is called in a thread of the batcher, so it cannot be an async function: "
            f"{function_name(function)}"
        )


def _is_async(function: Any) -> bool:
    call = getattr(type(function), "__call__")  # noqa: B004, B009
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)

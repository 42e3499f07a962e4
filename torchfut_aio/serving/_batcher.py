"""Micro-batching: one call of a function for many items, and a future for each of them.

The thread of ``_batch_worker.py`` makes the batches. If the function is async, the thread lets the
loop of ``_owner_loop.py`` run a task for each batch, and waits for it.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .._arguments import async_checked, size_checked, timeout_checked
from .._dependent import DependentFuture
from .._errors import BatcherClosedError, QueueFullError
from .._future import Future, InternalFuture
from .._process_local import ProcessLocal
from ._batch_worker import BatchWorker
from ._owner_loop import OwnerLoop

T = TypeVar("T")
R = TypeVar("R")

_CLOSE_BLOCKS = (
    "closing a batcher blocks the event loop that this thread runs; use `async with`, or await "
    "aclose()"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatcherStatistics:
    """What a `Batcher` has done so far.

    Attributes:
        queued: The number of items that wait now.
        running: The number of items in the batch that runs now.
        batches: The number of times that the function has run.
        items: The number of items on which it has run.
        rejected: The number of items that were refused because the queue was full.
        skipped: The number of items that were given up before they were run.
        wait_time: The time that the items that were run had waited, in seconds, in all.
        run_time: The time for which the function has run, in seconds.
        mean_batch_size: The mean number of items in a batch; 0.0 before the first.

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
    skipped: int
    wait_time: float
    run_time: float
    mean_batch_size: float


class Batcher(ProcessLocal, Generic[T, R]):
    """Run a function on many items at once, and return a future of each item's result.

    A batch begins when ``max_batch_size`` items wait, or when the first of them has waited for
    ``max_wait`` seconds. One batch runs at a time, in a thread of the batcher. Items that come
    while it runs wait for the next one. The thread ends after some idle seconds; the next item
    starts another.

    An async function runs as a task of the loop that has entered the batcher by ``async with``. No
    function sees the context (``contextvars``) of a caller, as a batch has many callers.

    Every future completes. If the function raises, all items of the batch fail with its error,
    each with a separate copy of the exception. A result that is an exception fails its item. An
    item whose future is done before its batch begins is skipped: to give one up, cancel its future.

    The end of the ``with`` or ``async with`` block closes the batcher, and runs queued items unless
    the block raises. Garbage collection and the exit of the interpreter also close it; the exit
    waits for the thread. A forked child begins with an empty queue. It has to enter the batcher
    again if the function is async.

    Args:
        func: Called with a list of items. It returns as many results in the same order: a list,
            tuple or other sequence that is not text, or a tensor or array of that many rows.
            Anything else, such as a dict, fails the batch with a TypeError. If it returns a tensor,
            each item gets a ``.clone()`` of its row, as rows share storage; to return the rows
            themselves, return ``list(tensor)``. Kernels on the streams that are current when it
            returns may still fill the results. If it uses another stream, let the current one wait
            for that before the return: a ``with stream:`` around ``return`` has ended by then.
            Return clones of the static output of a CUDA graph: the next replay changes it.
        max_batch_size: The largest number of items in a batch.
        max_queue_size: The largest number of items that wait, at least ``max_batch_size``; `submit`
            refuses more. If n threads submit at the same time, they may exceed it by n. None sets
            no limit.
        max_wait: The longest time that an item waits for others, in seconds. With 0 or less, a
            batch has the items that came while the last one ran.
        name: The name of the thread, or of the task. By default, ``torchfut_aio batcher of`` and
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
        ...         futures = [batcher.submit(n) for n in range(100)]
        ...         return sum(await torchfut_aio.gather(futures))
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
        name: str | None = None,
    ) -> None:
        if not callable(func):
            raise TypeError(
                f"a batcher takes a function of a list of items, not {type(func).__qualname__}"
            )
        async_checked(func)
        max_batch_size = size_checked(max_batch_size, "max_batch_size")
        if max_queue_size is not None:
            max_queue_size = size_checked(max_queue_size, "max_queue_size", "an int or None")
            if max_queue_size < max_batch_size:
                raise ValueError(
                    "max_queue_size must be at least max_batch_size, which is "
                    f"{max_batch_size}; not {max_queue_size}"
                )
        if name is None:
            called = getattr(func, "__qualname__", type(func).__qualname__)
            name = f"torchfut_aio batcher of {called}"
        wait = timeout_checked(max_wait, "max_wait must be a number of seconds")
        self._max_queue_size = math.inf if max_queue_size is None else max_queue_size
        self._worker = BatchWorker(func, max_batch_size, wait, name)
        self._needs_loop = _is_async(func)

    _what = "a Batcher"
    _cure = "create it in the process that submits; a child that is forked begins with none queued"

    # ------------------------------------------------------------------------------ items

    def submit(self, item: T, /) -> Future[R]:
        """Queue an item, from any thread, and return the future of its result.

        Raises:
            QueueFullError: ``max_queue_size`` items wait.
            BatcherClosedError: The batcher was closed.
            RuntimeError: The function is async, and no loop of this process has entered the
                batcher, or that loop cannot run because this thread runs another loop. Or no thread
                could be started, for example because the interpreter is shutting down.
        """
        worker = self._worker
        if worker.closing:
            raise BatcherClosedError("the batcher is closed and takes no more items")
        future: Future[R] = self._future_of_loop() if self._needs_loop else Future()
        if len(worker.work) >= self._max_queue_size and not worker.make_room(self._max_queue_size):
            worker.rejected.add()
            raise QueueFullError(f"the queue is full: {self._max_queue_size} items wait")
        worker.submit(future, (item, time.monotonic()))
        if worker.has_ended:  # rule 3 of _batch_worker.py
            worker.fail_queued(BatcherClosedError("the batcher is closed"))
        return future

    def _future_of_loop(self) -> DependentFuture[R]:
        owner = self._worker.owner
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
        return self._worker.closing

    @property
    def name(self) -> str:
        """The name of the batcher's thread, or of its tasks."""
        return self._worker.name

    def __repr__(self) -> str:
        worker = self._worker
        state = "closed" if self.closed else "open"
        limit = "" if self._max_queue_size == math.inf else f"/{self._max_queue_size}"
        return (
            f"<{type(self).__qualname__} {self.name!r} {state} queued={len(worker.work)}{limit} "
            f"running={len(worker.batch)}>"
        )

    def statistics(self) -> BatcherStatistics:
        """Return what the batcher has done so far, from any thread."""
        worker = self._worker
        return BatcherStatistics(
            queued=len(worker.work),
            running=len(worker.batch),
            batches=worker.batches,
            items=worker.items,
            rejected=worker.rejected.total(),
            skipped=worker.skipped.total(),
            wait_time=worker.wait_time,
            run_time=worker.run_time,
            mean_batch_size=worker.items / worker.batches if worker.batches else 0.0,
        )

    # ---------------------------------------------------------------------------- closing

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more items, and block until the function runs no more.

        A second call waits again. The function itself and callbacks of the futures may call it;
        then it does not wait.

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
        if self._worker.is_inside():
            self._begin_to_close(drain)
            return
        owner = self._worker.owner
        if owner is not None and owner.needs_caller(self._has_work()):
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
        if self._worker.is_inside():
            self._begin_to_close(drain)
            return
        owner = self._worker.owner
        if owner is not None and self._has_work():
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

    def _has_work(self) -> bool:
        return bool(self._worker.work or self._worker.batch)

    def _begin_to_close(self, drain: bool) -> InternalFuture[None]:
        worker = self._worker
        if not worker.ended.done():
            worker.closing = True
            if not drain:
                worker.fail_queued(BatcherClosedError("the batcher was closed with drain=False"))
            worker.begin_to_close()
        return worker.ended

    def _abandon(self, seconds: float | None) -> None:
        had_work = self._has_work()
        text = "the batcher was closed, and its function did not return in time"
        self._worker.abandon(BatcherClosedError(text))
        if had_work:  # otherwise the function does not run, and only the end of the thread is late
            raise TimeoutError(
                f"the function of the batcher did not return within {seconds:g} s; what was "
                "pending has failed"
            ) from None

    def __enter__(self) -> Batcher[T, R]:
        if self._needs_loop:
            raise RuntimeError("the function is async: enter the batcher by async with")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(drain=kind is None)

    async def __aenter__(self) -> Batcher[T, R]:
        if self._needs_loop:
            worker = self._worker
            if worker.owner is not None and worker.owner.runs():
                raise RuntimeError("a loop has entered the batcher already")
            # Last: if an interrupt comes before, the entry can be repeated.
            worker.owner = OwnerLoop(worker.ended, worker.name)
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        await self.aclose(drain=kind is None)

    def __del__(self) -> None:
        worker = getattr(self, "_worker", None)  # None if __init__() has raised
        if worker is not None and worker.threads():
            worker.closing = True
            worker.wake()
        elif worker is not None and worker.owner is not None:
            worker.finish()  # ends the task of the loop that waits for it


def _is_async(function: Any) -> bool:
    call = getattr(type(function), "__call__")  # noqa: B004, B009
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)

"""The event loop that has entered a batcher of an async function: it runs batches as tasks."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Any

from .. import _loops
from .._core import Promise
from .._future import Future, InternalFuture
from .._tasks import run_contained

_POLL_INTERVAL = 0.1  # seconds between two checks of whether the loop can still run a task

# The batch, in the context of its task.
in_batch: ContextVar[object] = ContextVar("torchfut_aio batch", default=None)


class OwnerLoop:
    """The loop that has entered a batcher, until the loop or the batcher ends."""

    def __init__(self, batcher_ended: Future[None], name: str) -> None:
        self._name = name
        self._loop = _loops.current()
        self._thread = threading.current_thread()
        self._has_ended = False
        # A loop that ends cancels its tasks once. It runs for a while after that, but would never
        # finish a new task. So we let a task wait to be cancelled.
        self._loop.spawn(self._end, self._wait, batcher_ended)

    async def _wait(self, batcher_ended: Future[None]) -> None:
        try:
            await batcher_ended
        finally:
            self._end()

    def _end(self) -> None:
        self._has_ended = True

    def runs(self) -> bool:
        """Return True if the loop still runs tasks, from any thread."""
        return not self._has_ended and self._is_open()

    def _is_open(self) -> bool:
        # A closing loop may accept a call and never make it, and a stopped loop may stay open. So
        # check the thread as well.
        return self._thread.is_alive() and self._loop.call_soon(_nothing)

    def check(self, blocks: bool = False) -> None:
        """Raise RuntimeError if the loop cannot run because the calling thread runs another loop.

        If ``blocks``, the calling thread is about to block. Raise if that would stop the loop.
        """
        in_its_thread = threading.current_thread() is self._thread
        if blocks and in_its_thread and not _loops.loop_in_this_thread() and self.runs():
            raise RuntimeError(
                "wait() would block the thread of the event loop that entered the batcher, and has "
                "to run its function: await the future on that loop"
            )
        if self._loop.stands_still():
            raise RuntimeError(
                "the batcher's function is async, and the event loop that entered the batcher "
                "cannot run it while this thread runs another loop: use the batcher on its own "
                "loop, or run that in a thread of its own"
            )

    def needs_caller(self, has_work: bool) -> bool:
        """Return True if the batcher could not end while the calling thread blocks."""
        if threading.current_thread() is not self._thread:
            return False
        return _loops.loop_in_this_thread() or (has_work and self.runs())

    def run(self, function: Any, items: list[Any], batch: object) -> Any:
        """Run an async function as a task, and block the batcher's thread until it returns."""
        future = self._start(function, items, batch)
        try:
            self._await(future)
            return future.wait()
        finally:
            del future  # the frames of its error lead here

    def _start(self, function: Any, items: list[Any], batch: object) -> Future[Any]:
        # A separate function, so that only the loop keeps a reference to the promise.
        future: Future[Any] = InternalFuture()
        promise = Promise(future, self._name)

        def start() -> None:
            if self._has_ended:
                promise.fail(RuntimeError(self._why()))
                return
            try:
                args = batch, function, items
                self._loop.spawn(promise.end, run_contained, promise, _call_for_batch, args)
            except Exception as error:  # the loop is closing
                promise.fail(error)

        if not self._loop.call_soon(start):
            raise RuntimeError(self._why())
        return future

    def _await(self, future: Future[Any]) -> None:
        waiter = _loops.ThreadWaiter()
        future.add_done_callback(lambda _: waiter.unblock())
        while not future.done():
            waiter.block(_POLL_INTERVAL)
            if not self.runs() and not future.done():
                raise RuntimeError(self._why())

    def _why(self) -> str:
        if self._is_open():
            return (
                "the tasks of the event loop that entered the batcher were cancelled, and among "
                "them the batcher's own: the loop is ending, or the program has cancelled all tasks"
            )
        return "the event loop that entered the batcher has ended"


async def _call_for_batch(batch: object, function: Any, items: list[Any]) -> Any:
    in_batch.set(batch)  # in the context of this task
    return await function(items)


def _nothing() -> None:
    pass

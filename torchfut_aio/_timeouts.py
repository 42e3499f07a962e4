"""Futures with a deadline. While any are pending, one thread waits for all of them.

The thread keeps the deadlines in a heap.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar, overload

from . import _core
from ._adopt import Source, as_future
from ._arguments import timeout_checked
from ._dependent import DependentFuture, dependent
from ._future import Future
from ._threads import QueueWorker, WorkerThread, call_contained

T = TypeVar("T")


@overload
def with_timeout(future: Source[T], timeout: float | None) -> Future[T]: ...
@overload
def with_timeout(future: object, timeout: float | None) -> Future[Any]: ...
def with_timeout(future: object, timeout: float | None) -> Future[Any]:
    """Return a future that completes like ``future``, or fails with TimeoutError when time is up.

    For chains that no task awaits; a task may use the timeouts of its loop. A timeout does not
    cancel ``future``, and leaves no callback with it. While timeouts are pending, one thread waits
    for all of them. Callbacks of a future that has timed out run in that thread, and delay other
    timeouts.

    Args:
        future: A future, or anything that `as_future` adopts.
        timeout: How long from now, in seconds. If not positive, ``future`` must be done now. None
            sets no limit.

    Example:
        >>> fut = torchfut_aio.Future()
        >>> late = torchfut_aio.with_timeout(fut, 0.01).then(lambda f: type(f.exception()))
        >>> late.wait()
        <class 'TimeoutError'>
        >>> fut
        <Future pending waiters=0 callbacks=0>
    """
    seconds = math.inf if timeout is None else timeout_checked(timeout)
    source = as_future(future)
    deadline = _Deadline(source, seconds)
    child: Future[Any] = deadline.child
    try:
        _core.add_callback(source, deadline)
        if seconds <= 0:
            deadline.expire()
        elif seconds < math.inf and not source.done():
            _timer.submit(deadline)
            if source.done():  # perhaps before the timer had it, so that it forgot nothing
                _timer.forget(deadline)
    except BaseException:  # no thread could be started, or Ctrl-C
        _core.remove(source, deadline)
        _timer.forget(deadline)
        raise
    return child


class _Deadline(_core.DoneCallback):
    """Waits for the source and for the timer."""

    __slots__ = ("child", "is_late", "seconds", "source", "when")

    def __init__(self, source: Future[Any], seconds: float) -> None:
        self.source: Any = source
        self.child: Any
        if seconds == math.inf and isinstance(source, DependentFuture):  # no timer completes it
            self.child = dependent(source, _core.devices_of(source))
        else:
            self.child = Future(devices=_core.devices_of(source))
        self.is_late = False
        self.seconds = seconds
        self.when = time.monotonic() + seconds

    def __lt__(self, other: _Deadline) -> bool:
        return self.when < other.when

    def run(self, source: Future[Any]) -> None:
        self._complete(_core.try_complete_as, source)

    def fail(self, _source: Future[Any], error: BaseException) -> None:
        self._complete(_core.try_complete_with_error, error)

    def expire(self) -> None:
        """Fail the child, unless the source has completed; may be repeated if it raises."""
        source = self.source
        # The one that removes it from the source completes the child: we or the source.
        if source is not None and (self.is_late or _core.remove(source, self)):
            self.is_late = True  # so that a repetition need not remove it again
            text = f"the future was not done within {self.seconds:g} s; it stays pending"
            self._complete(_core.try_complete_with_error, TimeoutError(text))

    def _complete(self, try_complete: Callable[..., bool], outcome: object) -> None:
        child = self.child
        if child is not None:
            try_complete(child, outcome)  # unless the program has completed it
            _timer.forget(self)
            self.source = self.child = None  # the heap of the timer may keep this object


class _Timer(QueueWorker):
    """Expires the deadlines in ``work``."""

    timeout_at_exit = 1.0
    survives_fork = True
    _wakes_at = math.inf

    def needs_wakeup(self, deadline: _Deadline) -> bool:
        # A later deadline only has to wake the thread if many that were forgotten have piled up.
        return deadline.when < self._wakes_at or len(self.new) > 2 * len(self.work) + 1000

    def forget(self, deadline: _Deadline) -> None:
        self.work.pop(deadline, None)
        if not self.work:
            self.wake()  # so that the thread ends

    def run(self, thread: WorkerThread) -> None:
        try:
            self._expire_all(thread)
        finally:
            self._wakes_at = math.inf  # or a submitter would compare with a time that has passed

    def _expire_all(self, thread: WorkerThread) -> None:
        heap: list[_Deadline] = []
        while True:
            self._take_into(heap)
            while heap and (heap[0].when <= time.monotonic() or heap[0] not in self.work):
                self._expire(heapq.heappop(heap))
            if thread.should_end or not self.work:
                return
            self._wakes_at = heap[0].when if heap else math.inf
            # Check for new deadlines *after* setting the time. A thread that submitted before may
            # have compared with an earlier time, and not have called wake().
            if not self._take_into(heap):
                self.rest(self._wakes_at - time.monotonic())

    def _take_into(self, heap: list[_Deadline]) -> bool:
        new = self.take()
        for deadline in new:
            if deadline in self.work:
                heapq.heappush(heap, deadline)
        if len(heap) > 2 * len(self.work) + 1000:  # most of them were forgotten
            heap[:] = [deadline for deadline in heap if deadline in self.work]
            heapq.heapify(heap)
        return bool(new)

    def _expire(self, deadline: _Deadline) -> None:
        if deadline in self.work:
            try:
                call_contained(deadline.expire)
            finally:  # again, in case there was no memory: the future is another thread's
                call_contained(deadline.expire)
            # Last, so that another thread would repeat it if an error ended this one before.
            self.work.pop(deadline, None)


_timer = _Timer("torchfut_aio timeouts")

"""Futures with a deadline: one thread looks after all of them, while there are any.

Nothing here takes a lock, for a future may be completed by a finaliser or a signal handler
in the middle of any step. Whoever starts or stops to be one of the futures that are looked
after enters `_Timer.live`, or leaves it. The thread alone keeps them in order of time, and
hears of new ones through a deque; it is rung for only if it would wake too late, or if it
is to end, or if much has piled up. To end, it gives back the token that stands for it, and
looks once more: who brings a future does these in the opposite order.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TypeVar

import torch

from . import _core
from ._adopt import as_future
from ._arguments import timeout_checked
from ._errors import InvalidStateError
from ._future import Future

__all__ = ["with_timeout"]

T = TypeVar("T")


def with_timeout(future: torch.futures.Future[T], seconds: float) -> Future[T]:
    """Returns a future that completes as ``future`` does, or in time with TimeoutError.

    For those who chain and never await; who awaits may use the loop's own timeouts. What
    has timed out leaves nothing behind with ``future``, which goes on undisturbed. One
    thread looks after all timeouts, and there is none while nothing is pending. Callbacks
    of a future that has timed out run in that thread, and hold up other timeouts.

    Args:
        future: A future, or anything that `as_future` adopts.
        seconds: How long from now. If not positive, ``future`` must be done now.

    Raises:
        NotAFutureError: ``future`` is not one.
        TypeError, ValueError: ``seconds`` is not a number, or is NaN.

    Example:
        >>> fut = torchfut_aio.Future()
        >>> late = torchfut_aio.with_timeout(fut, 0.01).then(lambda f: type(f.exception()))
        >>> late.wait()
        <class 'TimeoutError'>
        >>> fut
        <Future pending waiters=0 callbacks=0>
    """
    seconds = timeout_checked(seconds, "with_timeout() takes a number of seconds")
    source: Future[T] = as_future(future)
    deadline = _Deadline(source, seconds)
    child: Future[T] = deadline.child
    _core.add_callback(source, deadline)
    if seconds <= 0:
        deadline.expire(_too_late(seconds))
    elif seconds < math.inf and not source.done():
        try:
            _timer.add(deadline)
        except BaseException:  # no thread could be started
            _core.remove(source, deadline)
            _timer.forget(deadline)
            raise
        if source.done():  # perhaps before it was added
            _timer.forget(deadline)
    return child


class _Deadline(_core.DoneCallback):
    """Stays with the source, and with the timer, until one of them has it.

    The timer may keep it for longer, so it lets go of both futures then.
    """

    __slots__ = ("child", "seconds", "source", "when")

    def __init__(self, source: Future[Any], seconds: float) -> None:
        self.source: Any = source
        self.child: Any = Future(devices=_core.devices_of(source))
        self.seconds = seconds
        self.when = time.monotonic() + seconds

    def run(self, source: Future[Any]) -> None:
        _timer.forget(self)
        error = source.exception()
        if error is not None:
            self._fail_child(error)
            return
        with suppress(InvalidStateError):  # somebody has completed it instead
            _core.complete_with_parts(self.child, source.value(), (source,))
        self.source = self.child = None

    def fail(self, _source: Future[Any], error: BaseException) -> None:
        _timer.forget(self)
        if self.child is not None:
            self._fail_child(error)

    def expire(self, error: BaseException) -> None:
        source = self.source
        if source is not None and _core.remove(source, self):
            self._fail_child(error)

    def _fail_child(self, error: BaseException) -> None:
        with suppress(InvalidStateError):  # somebody has completed it instead
            _core.complete_with_error(self.child, error)
        self.source = self.child = None


def _too_late(seconds: float) -> TimeoutError:
    return TimeoutError(f"the future was not done within {seconds:g} s; it stays pending")


class _Timer:
    """The deadlines that are looked after, and the thread that does."""

    def __init__(self) -> None:
        self.live: dict[_Deadline, None] = {}
        self._new: deque[_Deadline] = deque()
        # A put may interrupt a put, or a get.
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._wakes_at = math.inf
        self._token = [None]

    def add(self, deadline: _Deadline) -> None:
        self.live[deadline] = None
        self._new.append(deadline)
        if self._start():
            return
        if deadline.when < self._wakes_at or len(self._new) > 2 * len(self.live) + 1000:
            self._bell.put(None)

    def forget(self, deadline: _Deadline) -> None:
        if self.live.pop(deadline, deadline) is None and not self.live:
            self._bell.put(None)

    def _start(self) -> bool:
        """Starts the thread, unless there is one."""
        try:
            self._token.pop()
        except IndexError:
            return False
        thread = threading.Thread(target=self._run, name="torchfut_aio timeouts", daemon=True)
        try:
            thread.start()
        except BaseException as error:
            self._token.append(None)
            for deadline in list(self.live):  # others may have relied on this thread
                self._drop(deadline, error)
                with suppress(ValueError):
                    self._new.remove(deadline)
            raise
        return True

    def _run(self) -> None:
        number = itertools.count()
        heap: list[tuple[float, int, _Deadline]] = []
        while True:
            self._take_in(heap, number)
            while heap and (heap[0][0] <= time.monotonic() or heap[0][2] not in self.live):
                deadline = heapq.heappop(heap)[2]
                self._drop(deadline, _too_late(deadline.seconds))
            if not self.live:
                self._token.append(None)
                if not self._new:
                    return
                try:
                    self._token.pop()
                except IndexError:  # another thread looks after what is new
                    return
                continue
            self._wakes_at = heap[0][0] if heap else math.inf
            if self._take_in(heap, number):
                continue
            # Until the earliest is due, or longer than a platform's clock can count.
            timeout = min(self._wakes_at - time.monotonic(), threading.TIMEOUT_MAX)
            with suppress(queue.Empty):
                self._bell.get(timeout=max(timeout, 0))

    def _take_in(self, heap: list[tuple[float, int, _Deadline]], number: Iterator[int]) -> bool:
        """Takes what is new; tells whether there was anything.

        By taking out, as that locks the deque where there is no GIL: what is not seen here comes
        from one who sees what this thread has written before.
        """
        found = False
        while (deadline := self._next_new()) is not None:
            found = True
            if deadline in self.live:
                heapq.heappush(heap, (deadline.when, next(number), deadline))
        if len(heap) > 2 * len(self.live) + 1000:  # the rest has been forgotten
            heap[:] = [entry for entry in heap if entry[2] in self.live]
            heapq.heapify(heap)
        return found

    def _next_new(self) -> _Deadline | None:
        try:
            return self._new.popleft()
        except IndexError:
            return None

    def _drop(self, deadline: _Deadline, error: BaseException) -> None:
        if self.live.pop(deadline, deadline) is None:
            # Nobody is above to take what a callback of a future may pass on.
            with suppress(KeyboardInterrupt, SystemExit):
                deadline.expire(error)


_timer = _Timer()


def _forget_thread() -> None:
    global _timer
    _timer = _Timer()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_thread)

"""Futures one after the other, in the order in which they complete.

An iterator leaves one callback with all of its futures. A future that completes *arrives*: it is
appended to ``arrived``, and whoever waits for an arrival is woken. Whoever deletes a future from
``left`` yields it, and then deletes it from the head of ``arrived``. Between the two statements
CPython checks for no signal, so nobody is interrupted there; and nobody else can delete the head,
as only who yields it does. So an iterator that was interrupted anywhere goes on where it was.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterable, Iterator
from typing import Any, TypeVar, overload

from . import _core, _loops
from ._adopt import Source
from ._collect import adopted, not_done_within, timeout_of
from ._errors import warn_that_wait_blocks_a_loop
from ._future import Future
from ._process_local import ProcessLocal

T = TypeVar("T")


@overload
def as_completed(futures: Iterable[Source[T]], timeout: float | None = None) -> _AsCompleted[T]: ...
@overload
def as_completed(futures: Iterable[Any], timeout: float | None = None) -> _AsCompleted[Any]: ...
def as_completed(
    futures: Iterable[Any], timeout: float | None = None, *_others: object
) -> _AsCompleted[Any]:
    """Iterates over ``futures`` in the order in which they complete.

    Use it with ``async for`` on an event loop, with ``for`` in a thread. It may be
    abandoned half way, and then leaves nothing behind with the futures still pending.
    Several tasks or threads may share one: each future goes to one of them. Where they
    complete faster than a task takes them, one on asyncio or uvloop lets them gather for
    up to a millisecond when it has taken all.

    Args:
        futures: As for `collect_all`. A future that is named twice is yielded once.
        timeout: How long from now to go on at most, in seconds; None is for ever.

    Returns:
        An iterator, for ``for`` and ``async for``, of futures of this package that are
        done: those passed in, and for those of another kind what `as_future` makes of
        them. To know which is which, pass what you got from `as_future` yourself.

    Raises:
        NotAFutureError: One of them is None, or cannot be adopted.
        TimeoutError: When all that had arrived in time is yielded, and some is pending still:
            from ``for`` and ``async for``. The iterator has left these then, and they go on.
        TypeError, ValueError: ``timeout`` is not a number, or is NaN.

    Example:
        >>> fut0, fut1 = torchfut_aio.Future(), torchfut_aio.Future()
        >>> completed = torchfut_aio.as_completed([fut0, fut1])
        >>> fut1.set_result("first")
        >>> fut0.set_result("second")
        >>> [fut.value() for fut in completed]
        ['first', 'second']
    """
    timeout = timeout_of("as_completed", futures, timeout, _others)
    return _AsCompleted(adopted(futures), timeout)


class _Arrivals(_core.DoneCallback):
    """The futures of one iterator: those still pending, and those that have arrived."""

    __slots__ = ("arrived", "deadline", "left", "pending", "streak", "timeout", "waiters")

    def __init__(self, futures: Iterable[Future[Any]], timeout: float | None) -> None:
        self.timeout = timeout
        self.deadline = math.inf if timeout is None else time.monotonic() + timeout
        # By identity, as a class may define `==`.
        self.pending = {id(future): future for future in futures}
        self.left = self.pending.copy()  # those that have not been yielded
        self.arrived: deque[Future[Any]] = deque()
        self.waiters: dict[object, _loops.Waker] = {}
        # How many were yielded since somebody last had to wait.
        self.streak = 0

    @property
    def name(self) -> str:
        """Name what waits, too: ``as_completed() for task Task-1 in handler, app.py:42``."""
        wakers = [(waiter, self.waiters.get(waiter)) for waiter in [*self.waiters]]
        who = [str(waker.who(waiter)) for waiter, waker in wakers if waker is not None]
        return f"as_completed() for {', '.join(who)}" if who else "as_completed()"

    def run(self, future: Future[Any]) -> None:
        # Not with append(): an interrupt may strike after a call, and these go together.
        key = id(future)
        self.arrived += (future,)
        del self.pending[key]
        self.wake()

    def fail(self, future: Future[Any], _error: BaseException) -> None:
        key = id(future)
        if key in self.pending:
            self.arrived += (future,)
            del self.pending[key]
        self.wake()

    def wake(self) -> None:
        # A list of them, as that locks the dict where there is no GIL: see `worth_waiting`.
        for waiter in [*self.waiters]:
            waker = self.waiters.get(waiter)
            if waker is not None:
                waker.wake(waiter)

    def worth_waiting(self, waiter: object, waker: _loops.Waker) -> bool:
        """Has ``waiter`` woken by the next arrival; False if there is no need to wait for one.

        First it is stored, then this looks whether a future has arrived. Whoever brings one does
        these in the opposite order.
        """
        self.waiters[waiter] = waker
        # A copy, as that locks the deque where there is no GIL.
        return not self.arrived.copy() and bool(self.pending)

    def expire(self) -> None:
        """Lets go of the futures that are pending, for which it is too late."""
        self.deadline = -math.inf
        self.withdraw()
        self.wake()

    def withdraw(self) -> None:
        for future in [*self.pending.values()]:
            _core.remove(future, self)

    def time_left(self) -> float | None:
        """Returns how many seconds there are to wait for the next arrival; None is for ever.

        Raises:
            TimeoutError: There are none.
        """
        if self.deadline == math.inf:
            return None
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            self.expire()
            if self.pending and not self.arrived:
                raise not_done_within(self.timeout, len(self.pending))
        return max(seconds, 0.0)

    def block(self) -> None:
        """Blocks the calling thread until a future has arrived, or none is pending."""
        # Callbacks that this thread has put off may be the next to arrive.
        _core.run_deferred()
        if self.arrived or not self.pending:
            return
        seconds = self.time_left()
        if _loops.loop_in_this_thread():
            warn_that_wait_blocks_a_loop()
        waiter = _loops.ThreadWaiter()
        try:
            if self.worth_waiting(waiter, _loops.THREADS):
                waiter.block(seconds)
        finally:
            self.waiters.pop(waiter, None)

    def __await__(self) -> Generator[Any, Any, None]:
        """Does for a task what `block` does for a thread."""
        loop = _loops.current()
        seconds = self.time_left()
        waiter = loop.waiter()
        streak, self.streak = self.streak, 0
        if self.pending and loop.wake_later(waiter, streak):
            # They come faster than they are taken, so there will be many more then.
            yield from waiter
            return
        alarm = None
        try:
            if seconds is not None:
                alarm = loop.call_later(seconds, self.expire)
            if self.worth_waiting(waiter, loop):
                yield from waiter
            else:
                yield from loop.checkpoint()
        finally:
            self.waiters.pop(waiter, None)
            if alarm is not None:
                alarm.cancel()


class _AsCompleted(ProcessLocal, AsyncIterator[Future[T]], Iterator[Future[T]]):
    """What `as_completed` returns."""

    __slots__ = ("__weakref__", "_arrivals")

    _what = "the iterator of as_completed()"
    _cure = "call as_completed() again for another iterator; tasks and threads may share this one"

    def __init__(self, futures: list[Future[T]], timeout: float | None) -> None:
        self._arrivals = _Arrivals(futures, timeout)
        for future in [*self._arrivals.left.values()]:
            _core.add_callback(future, self._arrivals)

    def __iter__(self) -> _AsCompleted[T]:
        return self

    def __aiter__(self) -> _AsCompleted[T]:
        return self

    def __next__(self) -> Future[T]:
        arrivals = self._arrivals
        del self  # or a traceback that is kept would keep the iterator
        arrived, left = arrivals.arrived, arrivals.left
        while left:
            if not arrived:
                arrivals.block()
                continue
            try:
                future = arrived[0]
                key = id(future)
                del left[key]
            except (KeyError, IndexError):  # another thread yields it
                continue
            del arrived[0]
            arrivals.streak += 1
            return future
        raise StopIteration

    async def __anext__(self) -> Future[T]:
        arrivals = self._arrivals
        del self  # or a traceback that is kept would keep the iterator
        arrived, left = arrivals.arrived, arrivals.left
        if not arrivals.streak:
            await arrivals  # at the beginning, as a checkpoint, although one may have arrived
        while left:
            if not arrived:
                await arrivals
                continue
            try:
                future = arrived[0]
                key = id(future)
                del left[key]
            except (KeyError, IndexError):  # another task yields it
                continue
            del arrived[0]
            arrivals.streak += 1
            return future
        raise StopAsyncIteration

    def __del__(self) -> None:
        arrivals: Any = getattr(self, "_arrivals", None)
        if arrivals is not None:  # it was not interrupted at the very beginning
            arrivals.withdraw()

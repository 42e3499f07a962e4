"""Futures one after the other, in the order in which they complete.

An iterator leaves one callback with all of its futures. A future that completes *arrives*: it is
appended to ``arrived``, and whoever waits for an arrival is woken. Whoever deletes a future from
``left`` yields it, and then deletes it from the head of ``arrived``. Between the two statements
CPython checks for no signal, so nobody is interrupted there; and nobody else can delete the head,
as only who yields it does. So an iterator that was interrupted anywhere goes on where it was.

A future whose kernels may still run is in ``running`` first. A task waits until it arrives: the
watchers of all loops whose tasks wait look after it. A thread takes it from there, and orders its
streams after the kernels. To delete it there is to have taken it, for either.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Sized
from functools import partial
from typing import Any, TypeVar, overload
from weakref import WeakMethod

from . import _core, _loops
from ._adopt import Source
from ._arguments import timeout_checked
from ._cpython import Queue
from ._devices import Readiness
from ._errors import warn_that_wait_blocks_a_loop
from ._future import Future
from ._many import adopted, check_one_iterable, not_done_within
from ._process_local import ProcessLocal
from ._waiters import first

T = TypeVar("T")


@overload
def as_completed(
    futures: Iterable[Source[T]], *, timeout: float | None = None
) -> _AsCompleted[T]: ...
@overload
def as_completed(futures: Iterable[Any], *, timeout: float | None = None) -> _AsCompleted[Any]: ...
def as_completed(
    futures: Iterable[Any], *_others: object, timeout: float | None = None
) -> _AsCompleted[Any]:
    """Iterates over ``futures`` in the order in which they complete.

    Use it with ``async for`` on an event loop, with ``for`` in a thread. If kernels still fill
    the value of a future, ``async for`` yields it when they have finished, and ``for`` with the
    current streams ordered after them, as `Future.wait` does. So ``fut.value()`` is safe at once.
    (If a kernel has failed, ``await fut`` and ``fut.wait()`` raise the device's error.)

    It may be abandoned half way, and then leaves nothing behind with the futures still pending.
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
        TimeoutError: When all that had arrived in time is yielded, and some is pending still, or
            its kernels run: from ``for`` and ``async for``. The iterator has left these then, and
            they go on.
        TypeError, ValueError: ``timeout`` is not a number, or is NaN.

    Example:
        >>> fut0, fut1 = torchfut_aio.Future(), torchfut_aio.Future()
        >>> completed = torchfut_aio.as_completed([fut0, fut1])
        >>> fut1.set_result("first")
        >>> fut0.set_result("second")
        >>> [fut.value() for fut in completed]
        ['first', 'second']
    """
    check_one_iterable("as_completed", _others, ", and timeout= by its name")
    if timeout is not None:
        timeout = timeout_checked(timeout)
    return _AsCompleted(adopted(futures), timeout)


class _Arrivals(_core.DoneCallback):
    """The futures of one iterator: those still pending, and those that have arrived."""

    __slots__ = (
        "__weakref__",
        "arrived",
        "deadline",
        "left",
        "pending",
        "running",
        "started",
        "streak",
        "timeout",
        "waiters",
        "watched",
    )

    uses_streams = False

    def __init__(self, futures: Iterable[Future[Any]], timeout: float | None) -> None:
        self.timeout = timeout
        self.deadline = math.inf if timeout is None else time.monotonic() + timeout
        # By identity, as a class may define `==`.
        self.pending = {id(future): future for future in futures}
        self.left = self.pending.copy()  # those that have not been yielded
        self.arrived: deque[Future[Any]] = deque()
        # In order, as a thread takes the first.
        self.running: dict[int, Future[Any]] = Queue()
        self.started: list[int] = []  # all that ever were in ``running``
        # How many of these each loop watches, or has watched.
        self.watched: dict[_loops.Loop, int] = {}
        self.waiters: dict[object, _loops.Waker] = {}
        # How many were yielded since somebody last had to wait.
        self.streak = 0

    @property
    def name(self) -> str:
        """Name what waits, too: ``as_completed() for task Task-1 in handler, app.py:42``."""
        wakers = [(waiter, self.waiters.get(waiter)) for waiter in [*self.waiters]]
        names = [str(waker.describe(waiter)) for waiter, waker in wakers if waker is not None]
        return f"as_completed() for {', '.join(names)}" if names else "as_completed()"

    def run(self, future: Future[Any]) -> None:
        # Not with append(): an interrupt may strike after a call, and these go together.
        key = id(future)
        outcome: Any = _core.outcome_of(future)
        if outcome.readiness is None or outcome.error is not None:
            self.arrived += (future,)
        else:
            self.running[key] = future
            self.started += (key,)
        del self.pending[key]
        self.wake()

    def fail(self, future: Future[Any], _error: BaseException) -> None:
        if id(future) in self.pending:
            self.run(future)
        else:
            self.wake()

    def readiness(self, future: Future[Any]) -> Readiness | None:
        """Return the readiness of a future that is done, unless it has failed."""
        outcome = _core.outcome_of(future)
        return None if outcome is None or outcome.error is not None else outcome.readiness

    def watch(self, loop: _loops.Loop) -> None:
        """Let futures whose kernels run arrive when these have finished; ``loop`` runs here."""
        arrive = WeakMethod(self.arrive)  # an iterator that was left is not kept
        for n in range(self.watched.get(loop, 0), len(self.started)):
            key = self.started[n]
            future = self.running.get(key)
            readiness = None if future is None else self.readiness(future)
            if readiness is not None:
                readiness.notify_when_ready(loop, partial(_arrive, arrive, key), lambda _: None)
            self.watched[loop] = n + 1

    def arrive(self, key: int) -> None:
        future = self.running.get(key)
        if future is not None:
            try:
                del self.running[key]
            except KeyError:  # a thread yields it, or another loop has said so
                return
            self.arrived += (future,)
        self.wake()

    def wake(self) -> None:
        # A list of them, as that locks the dict where there is no GIL: see `worth_waiting`.
        for waiter in [*self.waiters]:
            waker = self.waiters.get(waiter)
            if waker is not None:
                waker.wake(waiter)

    def worth_waiting(self) -> bool:
        """Return False if there is no need to wait for an arrival.

        A waiter is stored first, then this looks for a future that has arrived. A completion does
        these in the opposite order, so one of the two sees the other.
        """
        # A copy, as that locks the deque where there is no GIL.
        return not self.arrived.copy() and bool(self.pending or self.running)

    def order(self, future: Future[Any]) -> None:
        """Order the current streams after the kernels of a future, if they can be ordered."""
        readiness = self.readiness(future)
        if readiness is not None:
            try:
                readiness.wait()
            except (MemoryError, RecursionError):  # not ordered, so not yielded: the next does it
                raise
            except Exception:
                pass  # the device's error, which its value raises, too

    def expire(self) -> None:
        """Lets go of the futures that are pending, for which it is too late."""
        self.deadline = -math.inf
        self.withdraw()
        self.wake()

    def withdraw(self) -> None:
        for future in [*self.pending.values()]:
            _core.remove(future, self)

    def time_left(self, running: Sized = ()) -> float | None:
        """Returns how many seconds there are to wait for the next arrival; None is for ever.

        Raises:
            TimeoutError: There are none, and a future is pending, or in ``running``.
        """
        if self.deadline == math.inf:
            return None
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            self.expire()
            pending = len(self.pending) + len(running)
            if pending and not self.arrived:
                raise not_done_within(self.timeout, pending)
        return max(seconds, 0.0)

    def block(self) -> None:
        """Blocks the calling thread until a future has arrived, or none is pending."""
        # Callbacks that this thread has put off may be the next to arrive.
        _core.run_deferred()
        if self.arrived or self.running or not self.pending:
            return
        seconds = self.time_left()
        if _loops.loop_in_this_thread():
            warn_that_wait_blocks_a_loop()
        waiter = _loops.ThreadWaiter()
        try:
            self.waiters[waiter] = _loops.THREADS
            if self.worth_waiting() and not self.running:
                waiter.block(seconds)
        finally:
            self.waiters.pop(waiter, None)

    def __await__(self) -> Generator[Any, Any, None]:
        """Does for a task what `block` does for a thread."""
        loop = _loops.current()
        seconds = self.time_left(self.running)
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
            self.waiters[waiter] = loop
            if self.running:
                self.watch(loop)
            if self.worth_waiting():
                yield from waiter
            else:
                yield from loop.checkpoint()
        finally:
            self.waiters.pop(waiter, None)
            if alarm is not None:
                alarm.cancel()


def _arrive(arrive: WeakMethod[Any], key: int, _error: Exception | None) -> None:
    function = arrive()
    if function is not None:
        function(key)


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
        running = arrivals.running
        while left:
            if not arrived:
                running_key = first(running)
                if running_key is None:
                    arrivals.block()
                    continue
                try:
                    future = running[running_key]
                    arrivals.order(future)
                    del running[running_key]
                except KeyError:  # it has arrived, or another thread yields it
                    continue
                del left[running_key]
                return future
            try:
                future = arrived[0]
                key = id(future)
                if arrivals.started:
                    arrivals.order(future)
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
                if arrivals.started:
                    arrivals.order(future)
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

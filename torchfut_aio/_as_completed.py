"""Futures one after the other, in the order in which they complete.

One callback object waits for all futures of an iterator. When a future completes, it is stored in
``arrived``, and the tasks and threads that wait are woken. If its kernels may still run, it is
stored in ``running`` instead. A thread takes it from there, and orders its streams after the
kernels. For a task, it moves to ``arrived`` when the watcher of the task's loop finds the kernels
finished.
"""

from __future__ import annotations

import math
import time
import types
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Sized
from functools import partial
from typing import Any, TypeVar, overload
from weakref import WeakMethod

from . import _core, _loops
from ._adopt import Source
from ._arguments import timeout_checked
from ._cpython import Queue
from ._devices import Readiness
from ._errors import WAIT_BLOCKS
from ._future import Future
from ._many import adopted, not_done_within, refuse_several
from ._process_local import ProcessLocal
from ._waiters import EVERYONE, Waiters, first

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
    """Iterate over ``futures`` in the order in which they complete.

    Use it with ``async for`` on an event loop, with ``for`` in a thread. If kernels still fill
    the value of a future, ``async for`` yields it when they have finished, and ``for`` with the
    current streams ordered after them, as `Future.wait` does. So ``fut.value()`` is safe at once.
    (If a kernel has failed, ``await fut`` and ``fut.wait()`` raise the device's error.)

    The iterator may be dropped half way: pending futures keep no reference to it. Several tasks
    or threads may share one: each future is yielded to one of them. On asyncio and uvloop, if
    futures complete faster than a task takes them, a task that has taken all waits up to a
    millisecond for more.

    Args:
        futures: As for `collect_all`. A future that is named twice is yielded once.
        timeout: The longest time to iterate, from now, in seconds. None sets no limit.

    Returns:
        An iterator, for ``for`` and ``async for``, of futures that are done. A future of another
        kind is replaced by the one that `as_future` makes of it; to know which is which, call
        `as_future` yourself.

    Raises:
        TimeoutError: From ``for`` and ``async for``: the time is up, every future that was done in
            time was yielded, and others are pending or their kernels run. These stay as they are.

    Example:
        >>> fut0, fut1 = torchfut_aio.Future(), torchfut_aio.Future()
        >>> completed = torchfut_aio.as_completed([fut0, fut1])
        >>> fut1.set_result("first")
        >>> fut0.set_result("second")
        >>> [fut.value() for fut in completed]
        ['first', 'second']
    """
    if _others:
        refuse_several("as_completed", ", and timeout= by its name")
    return _AsCompleted(adopted(futures), timeout_checked(timeout))


class _AsCompletedState(_core.DoneCallback):
    """The futures of one iterator, and the tasks and threads that wait for them."""

    __slots__ = (
        "__weakref__",
        "arrived",
        "deadline",
        "hits",
        "left",
        "pending",
        "running",
        "started",
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
        self.arrived: dict[int, Future[Any]] = Queue()
        self.running: dict[int, Future[Any]] = Queue()
        self.started: list[int] = []  # the keys that ever were in ``running``
        # How many of these each loop watches, or has watched.
        self.watched: dict[_loops.Loop, int] = {}
        self.waiters = Waiters()
        self.hits = 0  # how many were yielded since a task last had to wait

    @property
    def name(self) -> str:
        """The name, with the waiters: ``as_completed() for task Task-1 in handler, app.py:42``."""
        names = [str(waiter) for waiter in self.waiters.describe()]
        return f"as_completed() for {', '.join(names)}" if names else "as_completed()"

    # ------------------------------------------------------------------- arriving

    def run(self, future: Future[Any]) -> None:
        key = id(future)
        outcome: Any = _core.outcome_of(future)
        # Statements, not calls: an interrupt after a call would leave the future in neither dict,
        # or in both. It leaves `pending` *last*: a reader waits only while it is in one of them.
        if outcome.readiness is None or outcome.error is not None:
            self.arrived[key] = future
        else:
            self.running[key] = future
            self.started += (key,)
        del self.pending[key]
        self.waiters.wake(EVERYONE)

    def fail(self, future: Future[Any], _error: BaseException) -> None:
        if id(future) in self.pending:
            self.run(future)
        else:
            self.waiters.wake(EVERYONE)

    def watch(self, loop: _loops.Loop) -> None:
        """Move futures from ``running`` to ``arrived`` when their kernels have finished."""
        arrive = WeakMethod(self.arrive)  # the watcher must not keep an iterator that was dropped
        for n in range(self.watched.get(loop, 0), len(self.started)):
            key = self.started[n]
            future = self.running.get(key)
            readiness = None if future is None else _readiness(future)
            if readiness is not None:
                readiness.notify_when_ready(loop, partial(_arrive, arrive, key))
            self.watched[loop] = n + 1  # last: after an interrupt, the next call repeats this one

    def arrive(self, key: int) -> None:
        future = self.running.get(key)
        if future is not None:
            try:
                del self.running[key]
            except KeyError:  # a thread has taken it, or the watcher of another loop was first
                return
            self.arrived[key] = future
        self.waiters.wake(EVERYONE)

    # -------------------------------------------------------------------- waiting

    def has_arrived(self) -> bool:
        """Return True if a task need not wait."""
        # A copy locks the dict where there is no GIL: see CONTRIBUTING.md.
        return bool([*self.arrived]) or not (self.pending or self.running)

    def can_take(self) -> bool:
        """Return True if a thread need not wait."""
        return bool([*self.arrived]) or first(self.running) is not None or not self.pending

    def block(self) -> None:
        """Block the calling thread until it can take a future, or none is left."""
        give_up = None if self.deadline == math.inf else self.deadline
        if not self.waiters.block(self.can_take, give_up, WAIT_BLOCKS):
            self.check_time()

    @types.coroutine
    def wait(self) -> Generator[Any, Any, None]:
        """Suspend the current task until a future has arrived, or none is left."""
        loop = _loops.current()
        seconds = self.check_time(self.running)
        hits, self.hits = self.hits, 0
        if hits and self.pending:
            # If futures arrive faster than we take them, a short sleep lets many arrive, and costs
            # one wake-up for all of them.
            pause = loop.pause_in_burst(hits)
            if pause is not None:
                yield from pause
                return
        alarm = None if seconds is None else loop.call_later(seconds, self.expire)
        try:
            if self.running:
                self.watch(loop)
            if self.has_arrived():
                yield from loop.checkpoint()
            else:
                yield from self.waiters.wait(self.has_arrived)
        finally:
            if alarm is not None:
                alarm.cancel()

    def check_time(self, running: Sized = ()) -> float | None:
        """Return how many seconds are left to wait, or None if there is no limit.

        Raises:
            TimeoutError: The time is up, and a future is pending, or in ``running``.
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

    def expire(self) -> None:
        self.deadline = -math.inf  # *before* waking: a woken iterator checks the time
        self.withdraw()
        self.waiters.wake(EVERYONE)

    def withdraw(self) -> None:
        for future in [*self.pending.values()]:
            _core.remove(future, self)


def _readiness(future: Future[Any]) -> Readiness | None:
    outcome = _core.outcome_of(future)
    return None if outcome is None or outcome.error is not None else outcome.readiness


def _order(future: Future[Any]) -> None:
    """Order the current streams after the kernels of a future, if they can be ordered."""
    readiness = _readiness(future)
    if readiness is not None:
        try:
            readiness.wait()
        except (MemoryError, RecursionError):  # it is not ordered, so it must not be yielded yet
            raise
        except Exception:
            pass  # the device's error, which the value raises as well


def _arrive(arrive: WeakMethod[Any], key: int, _error: Exception | None) -> None:
    function = arrive()
    if function is not None:
        function(key)


class _AsCompleted(ProcessLocal, AsyncIterator[Future[T]], Iterator[Future[T]]):
    __slots__ = ("__weakref__", "_state")

    _what = "the iterator of as_completed()"
    _cure = "call as_completed() again for another iterator; tasks and threads may share this one"

    def __init__(self, futures: list[Future[T]], timeout: float | None) -> None:
        self._state = _AsCompletedState(futures, timeout)
        for future in [*self._state.left.values()]:
            _core.add_callback(future, self._state)

    def __iter__(self) -> _AsCompleted[T]:
        return self

    def __aiter__(self) -> _AsCompleted[T]:
        return self

    def __next__(self) -> Future[T]:
        state = self._state
        del self  # or a traceback that is kept would keep the iterator
        left = state.left
        while left:
            source = state.arrived or state.running
            key = first(source)
            if key is None:
                state.block()
                continue
            # Order *before* taking: the deletion takes the future, and CPython checks for no signal
            # from there to the `return`. So an interrupt comes before, and loses nothing.
            try:
                future = source[key]
                if state.started:
                    _order(future)
                del source[key]
            except KeyError:  # another thread or task has it, or it has arrived
                continue
            del left[key]
            return future
        raise StopIteration

    async def __anext__(self) -> Future[T]:
        state = self._state
        del self  # as in __next__()
        left, arrived = state.left, state.arrived
        if not state.hits:
            await state.wait()  # a checkpoint, although a future may have arrived
        while left:
            key = first(arrived)
            if key is None:
                await state.wait()
                continue
            try:  # as in __next__()
                future = arrived[key]
                if state.started:
                    _order(future)
                del arrived[key]
            except KeyError:  # another thread or task has it
                continue
            del left[key]
            state.hits += 1
            return future
        raise StopAsyncIteration

    def __del__(self) -> None:
        state: Any = getattr(self, "_state", None)
        if state is not None:  # __init__() was not interrupted
            state.withdraw()

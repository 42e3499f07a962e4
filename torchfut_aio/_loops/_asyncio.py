"""Tasks on asyncio's loops and on uvloop's: each waits on an ``asyncio.Future``.

Such a future would have the loop resume its task in the next turn, in a handle of its own. We
take from it what resumes the task, and call that as soon as the loop looks: no turn more, and on
asyncio, whose handles are written in Python, half the work.

The way of a completion, from the thread that completes to the task:

1. `_Waiter.wake`, in any thread, posts the waiter to its loop, and asks the loop for a wake-up
   unless one is under way.
2. `Loop.serve`, on the loop, counts the waiters that have been posted.
3. `AsyncioLoop.resume` resumes one task after the other.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from threading import get_ident
from typing import Any

from .. import _cpython
from .._cpython import ResumeCallback, resume_callback, running_loop
from ._alarm import TimerFd
from ._burst import MANY, Burst
from ._loop import PAUSE, AsyncFunction, Loop


class _Waiter:
    """One wait of a task, on an ``asyncio.Future``.

    That is one of asyncio's own, unless the loop makes others: tasks have a fast path for these.
    And all that tasks call of it is C: Ctrl-C cannot strike while one parks, or wakes up.

    Attributes:
        future: What the task waits on.
        resume_callback: What resumes the task, once it has been taken from the future.
    """

    __slots__ = ("_loop", "future", "resume_callback")

    def __init__(self, loop: AsyncioLoop, future: asyncio.Future[None]) -> None:
        self._loop = loop
        self.future = future
        self.resume_callback: ResumeCallback | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.future)

    def wake(self) -> None:
        loop = self._loop
        # Which loop runs here takes a system call to find out, in Python 3.11.
        if get_ident() == loop.thread and _will_look_before_it_sleeps(self.future.get_loop()):
            # The loop may be in a step of another task, so it resumes this one later; but the
            # future is done from here on, for whoever means to cancel what still waits.
            if not self.future.done():
                self.future.set_result(None)
        else:
            # As post() does; a thread that completes many futures feels each call.
            loop.queue.append(self)
            if loop.wake_up is None:
                loop.ask_for_wake_up()


class AsyncioLoop(Loop):
    """One loop of asyncio or uvloop. It does not keep the event loop alive; the waiters do.

    Attributes:
        event_loop: Returns the event loop, or None if it has gone.
        thread: Where the event loop ran when a task last waited: only there may it run now.
    """

    __slots__ = ("_burst", "event_loop", "thread")

    def __init__(self, event_loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._burst = Burst(self.alarm(self.serve))
        self.thread = 0
        self.event_loop = weakref.ref(event_loop, lambda _: self.abandon())

    def waiter(self) -> _Waiter:
        if self.wake_up is not None:
            self.renew_wake_up()
        event_loop = self.event_loop()
        assert event_loop is not None  # it is running the caller
        return _Waiter(self, event_loop.create_future())

    def checkpoint(self) -> Iterable[Any]:
        # As with an asyncio future that is done: the task goes on at once.
        return ()

    def wake_later(self, waiter: Any, found: int) -> bool:
        if found < MANY:
            return False
        if self.wake_up is None and self._burst.look_again(found):
            self.wake_up = PAUSE
        self.post(waiter)
        return True

    def call_soon(self, function: Callable[[], object]) -> bool:
        event_loop = self.event_loop()
        if event_loop is None:
            return False
        try:
            if get_ident() == self.thread and _will_look_before_it_sleeps(event_loop):
                event_loop.call_soon(function)
            else:
                event_loop.call_soon_threadsafe(function)
        except RuntimeError:
            if not event_loop.is_closed():
                raise
            return False
        return True

    def spawn(self, ended: Callable[[], None], function: AsyncFunction, *args: object) -> None:
        self._running().create_task(function(*args)).add_done_callback(lambda _: ended())

    def watch(self, timer: TimerFd, function: Callable[[TimerFd], object]) -> None:
        # The task that happens to be the first to need it lends nothing of its context.
        add_reader = self._running().add_reader
        contextvars.Context().run(add_reader, timer.value, function, timer)

    def unwatch(self, timer: TimerFd) -> None:
        event_loop = self.event_loop()
        if event_loop is not None and not event_loop.is_closed():
            event_loop.remove_reader(timer.value)

    def call_later(self, seconds: float, function: Callable[[], object]) -> asyncio.TimerHandle:
        return self._running().call_later(seconds, function, context=contextvars.Context())

    def abandon(self) -> None:
        super().abandon()
        self._burst.close()

    def resume(self, count: int) -> None:
        if (count >= MANY or self._burst.goes_on) and self._burst.look_again(count):
            self.wake_up = PAUSE
        waiters = self.queue
        debug = bool(waiters) and waiters[0].future.get_loop().get_debug()
        for _ in range(count):
            if not waiters:
                return  # a task that ran its loop within this has seen to the others
            waiter = waiters[0]
            future = waiter.future
            # In debug mode each task has a handle of its own, so that asyncio can tell which takes
            # long. So has one written in Python: it may run the loop within the loop, which then
            # has to find the others.
            if not debug and (taken := resume_callback(future)) is not None:
                waiter.resume_callback = taken
                future.remove_done_callback(taken[0])
            try:  # noqa: SIM105  a context manager would cost as much as all the rest
                future.set_result(None)
            except asyncio.InvalidStateError:
                pass  # it has been cancelled
            # There is no call from here to the task, so Ctrl-C, which strikes at calls,
            # cannot. If it has before, what resumes the task is still with the waiter.
            del waiters[0]
            taken = waiter.resume_callback
            if taken is not None:
                waiter.resume_callback = None
                try:
                    taken[1].run(taken[0], future)
                except BaseException:
                    if _cpython.still_waits(taken[0], future):  # the call has not got to the task
                        waiter.resume_callback = taken
                        waiters.appendleft(waiter)
                    raise

    def _running(self) -> asyncio.AbstractEventLoop:
        event_loop = self.event_loop()
        if event_loop is None:
            raise RuntimeError("the event loop has gone")
        return event_loop


def _will_look_before_it_sleeps(event_loop: asyncio.AbstractEventLoop) -> bool:
    """Tells whether ``event_loop`` runs in this thread, and is in a task or a callback.

    A signal handler, or a finaliser, may also run while asyncio's loop is about to sleep
    or asleep. Only a write to its pipe makes it notice what these schedule.
    """
    return running_loop() is event_loop and (
        asyncio.current_task(event_loop) is not None or _cpython.in_callback_of(event_loop)
    )


class _LastUsed(threading.local):
    """The loop that this thread last ran: nearly always the right one."""

    loop: AsyncioLoop | None = None


_last_used = _LastUsed()
_Loops = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncioLoop]
_loops: _Loops = weakref.WeakKeyDictionary()


def current() -> AsyncioLoop | None:
    """Returns the loop of asyncio or uvloop that runs in this thread, if one does."""
    event_loop = running_loop()
    if event_loop is None:
        return None
    loop = _last_used.loop
    if loop is None or loop.event_loop() is not event_loop:
        loop = _loops.get(event_loop) or _new(event_loop)
        _last_used.loop = loop
        loop.thread = get_ident()
    return loop


def _new(event_loop: asyncio.AbstractEventLoop) -> AsyncioLoop:
    # A list, as other threads may add to it meanwhile.
    for ref in _loops.keyrefs():
        other = ref()
        if other is not None and other.is_closed():
            _loops[other].abandon()
    loop = _loops[event_loop] = AsyncioLoop(event_loop)
    return loop

"""Tasks on asyncio's loops and on uvloop's: each waits on an ``asyncio.Future``.

Such a future would have the loop resume its task in the next turn, in a handle of its own. We
take from it what resumes the task, and call that as soon as the loop looks: no turn more, and on
asyncio, whose handles are written in Python, half the work.

The way of a completion, from the thread that completes to the task:

1. `AsyncioLoop.wake`, in any thread, posts the waiter to its loop, and asks the loop for a wake-up
   unless one is under way.
2. `Loop.serve`, on the loop, counts the waiters that have been posted.
3. `AsyncioLoop.resume` resumes one task after the other.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from threading import get_ident
from typing import Any

from .. import _cpython
from .._cpython import ResumeCallback, resume_callback, running_loop
from ._alarm import TimerFd
from ._burst import MANY, Burst
from ._loop import PAUSE, AsyncFunction, Loop, Waiter


class AsyncioLoop(Loop):
    """One loop of asyncio or uvloop. It does not keep the event loop alive; the waiters do.

    A waiter is one of asyncio's own futures, unless the event loop makes others: tasks have a
    fast path for these. All that a task calls of it is C: Ctrl-C cannot strike while the task
    suspends, or wakes up.

    Attributes:
        event_loop: Returns the event loop, or None if it has gone.
        thread: Where the event loop ran when a task last waited: only there may it run now.
    """

    __slots__ = ("_burst", "_taken", "event_loop", "thread")

    def __init__(self, event_loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._burst = Burst(self.alarm(self.serve))
        # What resumes a task, from when it is taken from the waiter until it is called.
        self._taken: ResumeCallback | None = None
        self.thread = 0
        self.event_loop = weakref.ref(event_loop, lambda _: self.abandon())

    def new_waiter(self) -> asyncio.Future[None]:
        event_loop = self.event_loop()
        assert event_loop is not None  # it is running the caller
        return event_loop.create_future()

    def wake(self, waiter: asyncio.Future[None], /) -> None:
        # Which loop runs here takes a system call to find out, in Python 3.11.
        if get_ident() == self.thread and _will_look_before_it_sleeps(waiter.get_loop()):
            # The loop may be in a step of another task, so it resumes this one later; but the
            # waiter is done from here on, for whoever means to cancel what still waits.
            if not waiter.done():
                waiter.set_result(None)
        else:
            # As post() does; a thread that completes many futures feels each call.
            self.queue.append(waiter)
            if self.wake_up is None:
                self.ask_for_wake_up()

    def stands_still(self) -> bool:
        event_loop = self.event_loop()
        return event_loop is not None and get_ident() == self.thread and stands_still(event_loop)

    def describe(self, waiter: asyncio.Future[None], /) -> Waiter:
        task = _cpython.waiting_task(waiter)
        if task is None:
            return Waiter(kind="task", name=None)
        return Waiter(kind="task", name=task.get_name(), where=_cpython.place_of(task.get_coro()))

    def current_task_name(self) -> str | None:
        task = asyncio.current_task(self._running())
        return None if task is None else task.get_name()

    def checkpoint(self) -> Iterable[Any]:
        # As with an asyncio future that is done, the task goes on at once. If it has to suspend,
        # asyncio resumes a task that yields None in the next turn.
        return (None,) if self.checkpoints_suspend else ()

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
                call = event_loop.call_soon_threadsafe(function)
                if event_loop.is_closed():  # perhaps within this: asyncio's keeps the call then
                    call.cancel()
                    return False
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
        self._taken = None
        self._burst.close()

    def resume(self, count: int) -> None:
        if (count >= MANY or self._burst.goes_on) and self._burst.look_again(count):
            self.wake_up = PAUSE
        waiters = self.queue
        # In debug mode, and for who watches handles, each task has a handle of its own, so that one
        # can tell which takes long.
        apart = _cpython.handles_are_watched() or (
            bool(waiters) and waiters[0].get_loop().get_debug()
        )
        for _ in range(count):
            if not waiters:
                return  # a task that ran its loop within this has seen to the others
            waiter = waiters[0]
            # None for tasks written in Python: these are what runs a loop within a loop, which then
            # has to find the others.
            if not apart and (callback := resume_callback(waiter)) is not None:
                self._taken = callback
                waiter.remove_done_callback(callback[0])
            try:  # noqa: SIM105  a context manager would cost as much as all the rest
                waiter.set_result(None)
            except asyncio.InvalidStateError:
                pass  # it has been cancelled
            # No call stands between this `del` and `context.run`, so Ctrl-C cannot strike between
            # them. If it came earlier, the waiter is still in the queue, and the callback in
            # `_taken`.
            del waiters[0]
            taken = self._taken
            if taken is not None:
                self._taken = None
                function, context = taken
                try:
                    context.run(function, waiter)
                except BaseException:
                    if _cpython.still_waits(function, waiter):  # the call has not got to the task
                        self._taken = taken
                        waiters.appendleft(waiter)
                    raise

    def _running(self) -> asyncio.AbstractEventLoop:
        event_loop = self.event_loop()
        if event_loop is None:
            raise RuntimeError("the event loop has gone")
        return event_loop


def stands_still(event_loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether ``event_loop`` cannot run because this thread runs another."""
    running = running_loop()
    if running is event_loop:
        # Trio's tasks run in callbacks of the loop in guest mode, and not within a task of it.
        return _trio_runs_here() and asyncio.current_task(event_loop) is not None
    if event_loop.is_running():
        return _cpython.thread_of(event_loop) == get_ident()
    return not event_loop.is_closed() and (running is not None or _trio_runs_here())


def _trio_runs_here() -> bool:
    """Return whether the caller runs on trio, and not on a loop of asyncio's kind within trio."""
    trio = sys.modules.get("torchfut_aio._loops._trio")  # not there before a program imports trio
    return trio is not None and trio.current() is not None


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


# So many loops are checked whenever one is new; more only when their number has doubled.
_FEW = 16
_check_at = _FEW


def _new(event_loop: asyncio.AbstractEventLoop) -> AsyncioLoop:
    global _check_at
    if len(_loops) <= _FEW or len(_loops) >= _check_at:
        _abandon_closed()
        _check_at = 2 * len(_loops)
    loop = _loops[event_loop] = AsyncioLoop(event_loop)
    return loop


def _abandon_closed() -> None:
    for ref in _loops.keyrefs():  # a list, as other threads may add to it meanwhile
        other = ref()
        if other is not None and other.is_closed():
            loop = _loops.pop(other, None)  # it is not asked for again
            if loop is not None:
                loop.abandon()

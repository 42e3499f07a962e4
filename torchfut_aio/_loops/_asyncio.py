"""Tasks on asyncio's loops and on uvloop's: each waits on an ``asyncio.Future``.

Completing such a future makes the loop resume its task in the next turn, by a separate handle.
Here the callback that resumes the task is taken from the future and called in the wake-up. This
saves a turn and, on asyncio, whose handles are written in Python, half of the loop's time.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import sys
import weakref
from collections.abc import Callable, Iterable
from threading import get_ident
from typing import Any

from .. import _cpython
from .._cpython import ResumeCallback, resume_callback, running_loop
from .._extension import speedup
from ._alarm import TimerFd
from ._loop import BURST, AsyncFunction, Loop, TaskWaiter
from ._waker import Waiter

# Completing a future releases the GIL for an instant, in C++. While a loop is awake and waits for
# the GIL, each such release costs the completing thread a system call, and every few of them give
# the GIL to the loop: the two take longer together than one after the other. So after a wake-up
# that found many waiters, the next one is scheduled by a timer, as drivers of network cards do: it
# comes when the thread may have completed twice as many. The figures are in benchmarks/NOTES.md.
MANY = 16  # waiters that one wake-up finds in a burst
PAUSE_FOR_EACH = 2.5e-6  # seconds until the next wake-up, for each waiter that the last one found
LONGEST_PAUSE = 1e-3


class AsyncioLoop(Loop):
    """One loop of asyncio or uvloop. It does not keep the event loop alive; the waiters do.

    A waiter is what ``event_loop.create_future()`` returns. That is asyncio's own future, for which
    tasks have a fast path. A task calls nothing of it but C: no interrupt can come while the task
    suspends, or wakes up.

    Attributes:
        event_loop: Returns the event loop, or None if it was garbage-collected.
        thread: The thread in which a task of the event loop last waited: the only one in which the
            event loop may run now.
    """

    __slots__ = ("_at_once", "_burst", "_burst_timer", "_taken", "event_loop", "thread")

    def __init__(self, event_loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._at_once = 0  # how many of the queued waiters `wake_all` added
        # How many waiters the last wake-up found, if many; None once the next one is scheduled.
        self._burst: int | None = None
        self._burst_timer = self.alarm(self._end_pause)
        # What resumes a task, from when it is taken from the waiter until it is called.
        self._taken: ResumeCallback | None = None
        self.thread = 0
        self.event_loop = weakref.ref(event_loop, lambda _: self.abandon())

    # ------------------------------------------------------------- in any thread

    def wake(self, waiter: asyncio.Future[None], /) -> None:
        # The threads are compared first: in Python 3.11, to find the running loop is a system call.
        if get_ident() == self.thread and _polls_before_it_sleeps(waiter.get_loop()):
            self.resume(waiter)
        else:
            super().wake(waiter)

    def wake_all(self, waiters: list[asyncio.Future[None]], /) -> None:
        self._at_once += len(waiters)
        super().wake_all(waiters)

    def schedule_wake_up(self) -> None:
        burst, self._burst = self._burst, None
        # Nothing is to come after the waiters of `wake_all`, and nothing competes in this thread.
        may_wait = get_ident() != self.thread and not self._at_once
        if not (burst and may_wait and self._schedule_by_timer(burst)):
            super().schedule_wake_up()

    def _schedule_by_timer(self, found: int) -> bool:
        """Schedule the next wake-up by a timer; return False if there is none exact enough."""
        event_loop = self.event_loop()
        if event_loop is None or event_loop.is_closed():
            return False
        try:
            # *Before* the timer is set: when it fires, the loop clears `wake_up`. If this is
            # interrupted in between, the caller wakes again, also for others that saw BURST.
            self.wake_up = BURST
            if self._burst_timer.set_if_exact(min(found * PAUSE_FOR_EACH, LONGEST_PAUSE)):
                return True
        except BaseException:
            self.wake_up = None  # if the timer is set, the wake-up will find nothing to do
            raise
        self.wake_up = None
        return False

    @speedup
    def call_soon(self, function: Callable[[], object]) -> bool:
        event_loop = self.event_loop()
        if event_loop is None:
            return False
        try:
            if get_ident() == self.thread and _polls_before_it_sleeps(event_loop):
                event_loop.call_soon(function)
            else:
                call = event_loop.call_soon_threadsafe(function)
                if event_loop.is_closed():  # perhaps within the call: asyncio's never runs it then
                    call.cancel()
                    return False
        except RuntimeError:
            if not event_loop.is_closed():
                raise
            return False
        return True

    def stands_still(self) -> bool:
        event_loop = self.event_loop()
        return event_loop is not None and get_ident() == self.thread and stands_still(event_loop)

    def describe(self, waiter: asyncio.Future[None], /) -> Waiter:
        task = _cpython.waiting_task(waiter)
        if task is None:
            return Waiter(kind="task", name=None)
        return Waiter(kind="task", name=task.get_name(), where=_cpython.place_of(task.get_coro()))

    # ------------------------------------------------------ in the loop's own thread

    def new_waiter(self) -> asyncio.Future[None]:
        return self._running().create_future()

    def resume(self, waiter: asyncio.Future[None]) -> None:
        # The loop may be in a step of another task, so it resumes this one later. But the waiter is
        # done from here on: nothing can cancel the wait any more.
        if not waiter.done():
            waiter.set_result(None)

    @speedup
    def run_wake_up(self) -> None:
        # Unlike in Loop.run_wake_up(), this comes first, so that threads schedule another wake-up:
        # one of the tasks may run the loop within its step.
        self.wake_up = None
        self._renewed = False
        try:
            count = len(self.queue.copy())
            at_once, self._at_once = self._at_once, 0  # these do not count as a burst
            if count - at_once >= MANY:
                self._expect_burst(count)
            self._resume_tasks(count)
        except BaseException:
            if self.queue:
                self.schedule_wake_up()
            raise

    @speedup
    def _resume_tasks(self, count: int) -> None:
        waiters = self.queue
        # In debug mode each task has a separate handle, so that the slow ones can be logged.
        debug = bool(waiters) and waiters[0].get_loop().get_debug()
        for _ in range(count):
            if not waiters:
                return  # a task that ran its loop within this has resumed the others
            waiter = waiters[0]
            # None for tasks written in Python, such as those of nest_asyncio. They may run the loop
            # within their step, so they take it in a handle, after the others of this queue.
            if not debug and (callback := resume_callback(waiter)) is not None:
                self._taken = callback
                waiter.remove_done_callback(callback[0])
            try:  # noqa: SIM105  a context manager would cost as much as all the rest
                waiter.set_result(None)
            except asyncio.InvalidStateError:
                pass  # it has been cancelled
            # No call stands between this `del` and `context.run`, so no interrupt can come between
            # them. If one came earlier, the waiter is still in the queue, and the callback in
            # `_taken`.
            del waiters[0]
            taken = self._taken
            if taken is not None:
                self._taken = None
                function, context = taken
                try:
                    context.run(function, waiter)
                except BaseException:
                    if _cpython.still_waits(function, waiter):  # the call did not reach the task
                        self._taken = taken
                        waiters.appendleft(waiter)
                    raise

    def _expect_burst(self, found: int) -> None:
        if self._burst_timer.is_exact():
            self._burst = found

    def _end_pause(self) -> None:
        # Stop the timer *first*: once `wake_up` is cleared, another thread may set it again. And
        # as it is set here, the alarm does not stop it afterwards.
        self._burst_timer.set(math.inf)
        self.run_wake_up()

    def pause_in_burst(self, found: int) -> TaskWaiter | None:
        if found < MANY:
            return None
        waiter = self.waiter()
        try:
            if self.wake_up is None and self._burst_timer.is_exact():
                self._burst = None
                self._schedule_by_timer(found)
        finally:
            super().wake(waiter)  # not the override, which could resume it now
        return waiter

    def checkpoint(self) -> Iterable[Any]:
        # As with an asyncio future that is done, the task continues at once. If it has to suspend,
        # asyncio resumes a task that yields None in the next turn.
        return (None,) if self.checkpoints_suspend else ()

    def current_task_name(self) -> str | None:
        task = asyncio.current_task(self._running())
        return None if task is None else task.get_name()

    def spawn(self, ended: Callable[[], None], function: AsyncFunction, *args: object) -> None:
        self._running().create_task(function(*args)).add_done_callback(lambda _: ended())

    def watch(self, timer: TimerFd, function: Callable[[TimerFd], object]) -> None:
        # In an empty context, or the timer would keep that of the task that needed it first.
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
        self._burst_timer.close()

    def _running(self) -> asyncio.AbstractEventLoop:
        event_loop = self.event_loop()
        if event_loop is None:
            raise RuntimeError("the event loop was garbage-collected")
        return event_loop


def stands_still(event_loop: asyncio.AbstractEventLoop) -> bool:
    """Return True if ``event_loop`` cannot run because this thread runs another."""
    running = running_loop()
    if running is event_loop:
        # Trio's tasks run in callbacks of the loop in guest mode, and not within a task of it.
        return _trio_runs_here() and asyncio.current_task(event_loop) is not None
    if event_loop.is_running():
        return _cpython.thread_of(event_loop) == get_ident()
    return not event_loop.is_closed() and (running is not None or _trio_runs_here())


def _trio_runs_here() -> bool:
    """Return True if the caller runs on trio, and not on a loop of asyncio's kind within trio."""
    trio = sys.modules.get("torchfut_aio._loops._trio")  # not there before a program imports trio
    # The last name of the module: without it, another thread is importing the module.
    current_trio = getattr(trio, "current", None)
    return current_trio is not None and current_trio() is not None


def _polls_before_it_sleeps(event_loop: asyncio.AbstractEventLoop) -> bool:
    """Return True if ``event_loop`` runs in this thread, and is in a task or a callback.

    A signal handler, or a finaliser, may also run while asyncio's loop is about to sleep
    or asleep. Only a write to its pipe makes it notice the calls that they schedule.
    """
    return running_loop() is event_loop and (
        asyncio.current_task(event_loop) is not None or _cpython.in_callback_of(event_loop)
    )


_Loops = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncioLoop]
_loops: _Loops = weakref.WeakKeyDictionary()


def current() -> AsyncioLoop | None:
    """Return the loop of asyncio or uvloop that runs in this thread, or None."""
    event_loop = running_loop()
    return None if event_loop is None else loop_of(event_loop)


def loop_of(event_loop: asyncio.AbstractEventLoop) -> AsyncioLoop:
    """Return the `Loop` of an event loop that runs in this thread: the same one each time."""
    loop = _loops.get(event_loop) or _new(event_loop)
    loop.thread = get_ident()  # each time, as the event loop may have run in another thread before
    return loop


def _new(event_loop: asyncio.AbstractEventLoop) -> AsyncioLoop:
    # A loop may be closed and still be referenced. It keeps its waiters until they are abandoned.
    for ref in _loops.keyrefs():  # a list, as other threads may add to the dict
        other = ref()
        if other is not None and other.is_closed():
            loop = _loops.pop(other, None)
            if loop is not None:
                loop.abandon()
    loop = _loops[event_loop] = AsyncioLoop(event_loop)
    return loop

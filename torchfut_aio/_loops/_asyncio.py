"""Tasks on asyncio's loops and on uvloop's: each waits on an ``asyncio.Future``.

Such a future would have the loop resume its task in the next turn, in a handle of its own. The
inbox takes from it what resumes the task, and calls it for one after the other as soon as the
loop looks: no turn more, and on asyncio, whose handles are written in Python, half the work.

A thread that completes many futures lets go of the GIL in each, in C++, for an instant. With
a loop awake that waits for the GIL, each of these costs the thread a system call, and every
few of them the GIL: both would do less than either alone. So in such a burst the loop sleeps
between its looks, as drivers of network cards do: from as long as the thread may take to
complete twice as many again, up to a millisecond. A burst of few is not put off.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from threading import get_ident
from typing import TYPE_CHECKING, Any

from .._cpython import in_callback_of, resume_callback, running_loop
from ._inbox import Inbox

if TYPE_CHECKING:
    from ._timer import TimerFd

__all__ = ["current"]

BURST = 16  # found in one look
PATIENCE = 8e-6  # seconds until the next look, for each that was found in this one
LONGEST = 1e-3


class _Waiter:
    """One wait of a task, on an ``asyncio.Future``.

    That is one of asyncio's own, unless the loop makes others: tasks have a fast path for these.
    And all that tasks call of it is C: Ctrl-C cannot strike while one parks, or wakes up.
    """

    __slots__ = ("_inbox", "future", "step")

    step: tuple[Callable[[asyncio.Future[None]], Any], contextvars.Context] | None
    """Once it is taken from the future: what takes the next step of the task, and where."""

    def __init__(self, inbox: AsyncioLoop, future: asyncio.Future[None]) -> None:
        self._inbox = inbox
        self.future = future
        self.step = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.future)

    def wake(self) -> None:
        inbox = self._inbox
        # Which loop runs here takes a system call to find out, in Python 3.11.
        if get_ident() == inbox._thread and _will_look_before_it_sleeps(self.future.get_loop()):
            # It may be in the middle of a step of a task, so this one is resumed later; but is
            # done from here on, for whoever means to cancel what still waits.
            if not self.future.done():
                self.future.set_result(None)
        else:
            # As post() does; a thread that completes many futures feels each call.
            inbox._queue.append(self)
            if not inbox._armed:
                inbox._arm()


class AsyncioLoop(Inbox):
    """The inbox of one loop. It does not keep the loop alive; the waiters do."""

    __slots__ = ("_burst", "_in_burst", "_loop", "_thread")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._burst: _Alarm | None = None
        self._in_burst = False
        # Of the loop, when a task last waited: only there may it run now.
        self._thread = 0
        self._loop = weakref.ref(loop, lambda _: self.abandon())

    def checkpoint(self) -> Iterable[Any]:
        # As with an asyncio future that is done: the task goes on at once.
        return ()

    def waiter(self) -> _Waiter:
        loop = self._loop()
        assert loop is not None  # it is running the caller
        return _Waiter(self, loop.create_future())

    def wake_later(self, waiter: _Waiter, found: int) -> bool:
        if found < BURST:
            return False
        self._queue.append(waiter)
        if not self._armed:
            self._armed = self._look_again(found)
            if not self._armed:
                self._arm()
        return True

    def abandon(self) -> None:
        super().abandon()
        burst, self._burst = self._burst, None
        if burst is not None:
            burst.close()

    def alarm(self, function: Callable[[], None]) -> _Alarm | _CoarseAlarm:
        loop = self._loop()
        assert loop is not None  # it is running the caller
        return self._exact_alarm(function) or _CoarseAlarm(loop, function)

    def _exact_alarm(self, function: Callable[[], None]) -> _Alarm | None:
        loop = self._loop()
        assert loop is not None  # it is running the caller
        from . import _timer

        if not _timer.available():
            return None
        timer = _timer.TimerFd()
        try:
            return _Alarm(loop, function, timer)
        except (NotImplementedError, RuntimeError):  # it is a loop that cannot watch files
            timer.close()
            return None

    def call_soon(self, function: Callable[[], None]) -> None:
        loop = self._loop()
        if loop is not None:
            try:
                if running_loop() is loop:
                    loop.call_soon(function)
                else:
                    loop.call_soon_threadsafe(function)
            except RuntimeError:
                if not loop.is_closed():
                    raise

    def spawn(
        self,
        ended: Callable[[], None],
        function: Callable[..., Coroutine[Any, Any, None]],
        *args: object,
    ) -> None:
        loop = self._loop()
        assert loop is not None  # it is running the caller
        loop.create_task(function(*args)).add_done_callback(lambda _: ended())

    def _call_soon(self) -> bool:
        loop = self._loop()
        if loop is None:
            return False
        try:
            loop.call_soon_threadsafe(self._serve)
        except RuntimeError:
            if not loop.is_closed():
                raise
            return False
        return True

    def _look_again(self, found: int) -> bool:
        """Has `_serve` called in a moment, if this look found many; or returns False."""
        if found < BURST:
            if self._in_burst:
                assert self._burst is not None
                self._burst.set(math.inf)
                self._in_burst = False
            return False
        if self._burst is None:
            with suppress(OSError):  # too many open files
                self._burst = self._exact_alarm(self._serve)
            if self._burst is None:
                return False
        # First of all, so that an alarm that is set will be stopped, even if Ctrl-C strikes.
        self._in_burst = True
        self._burst.set(min(found * PATIENCE, LONGEST))
        return True

    def _resume(self, waiters: deque[_Waiter], count: int) -> None:
        if count >= BURST or self._in_burst:
            self._armed = self._look_again(count)
        debug = bool(waiters) and waiters[0].future.get_loop().get_debug()
        for _ in range(count):
            if not waiters:
                return  # a task that ran its loop within this has seen to the others
            waiter = waiters[0]
            future = waiter.future
            # In debug mode each task has a handle of its own, so that asyncio can tell who takes
            # long. And tasks written in Python are what runs a loop within a loop, which then
            # has to find the others.
            if not debug and (step := resume_callback(future)) is not None:
                waiter.step = step
                future.remove_done_callback(step[0])
            try:  # noqa: SIM105  a context manager would cost as much as all the rest
                future.set_result(None)
            except asyncio.InvalidStateError:
                pass  # it has been cancelled
            # There is no call from here to the task, so Ctrl-C, which strikes at calls,
            # cannot. If it has before, the step is still there.
            del waiters[0]
            step = waiter.step
            if step is not None:
                waiter.step = None
                step[1].run(step[0], future)


class _Alarm:
    """A timerfd that the loop watches. Neither keeps the loop alive."""

    __slots__ = ("_loop", "_timer")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, function: Callable[[], None], timer: TimerFd
    ) -> None:
        self._timer = timer
        self._loop = weakref.ref(loop)
        # The task that happens to be the first to need it lends nothing of its context.
        contextvars.Context().run(loop.add_reader, self._timer.fd, function)

    def set(self, seconds: float) -> None:
        self._timer.set(seconds)

    def close(self) -> None:
        loop = self._loop()
        if loop is not None and not loop.is_closed():
            loop.remove_reader(self._timer.fd)
        self._timer.close()


class _CoarseAlarm:
    """The loop's own timer, for platforms that have no better one."""

    __slots__ = ("_function", "_handle", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
        self._function = function
        self._loop = weakref.ref(loop)
        self._handle: asyncio.TimerHandle | None = None

    def set(self, seconds: float) -> None:
        self.close()
        loop = self._loop()
        assert loop is not None  # it is running the caller
        if seconds < math.inf:
            context = contextvars.Context()
            self._handle = loop.call_later(seconds, self._function, context=context)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()


def _will_look_before_it_sleeps(loop: asyncio.AbstractEventLoop) -> bool:
    """Tells whether ``loop`` runs in this thread, and is in a task or a callback.

    A signal handler, or a finaliser, may also run while asyncio's loop is about to sleep
    or asleep. It would not notice what these schedule: it takes a write to its pipe.
    """
    if running_loop() is not loop:
        return False
    return asyncio.current_task(loop) is not None or in_callback_of(loop)


class _LastUsed(threading.local):
    """The inbox of the loop that this thread last ran: nearly always the right one."""

    inbox: AsyncioLoop | None = None


_last_used = _LastUsed()
_inboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncioLoop] = (
    weakref.WeakKeyDictionary()
)


def current(loop: asyncio.AbstractEventLoop) -> AsyncioLoop:
    """Returns the inbox of ``loop``, which runs in the calling thread."""
    inbox = _last_used.inbox
    if inbox is None or inbox._loop() is not loop:
        inbox = _inboxes.get(loop)
        if inbox is None:
            # A list, as other threads may add to it meanwhile.
            for ref in _inboxes.keyrefs():
                other = ref()
                if other is not None and other.is_closed():
                    _inboxes[other].abandon()
            inbox = _inboxes[loop] = AsyncioLoop(loop)
        _last_used.inbox = inbox
        inbox._thread = get_ident()
    return inbox

"""Tasks on asyncio's loops and on uvloop's: each waits on an ``asyncio.Future``.

Such a future would have the loop resume its task in the next turn, in a handle of its own. The
inbox takes from it what resumes the task, and calls it for one after the other as soon as the
loop looks: no turn more, and on asyncio, whose handles are written in Python, half the work.

The way of a completion, from the thread that completes to the task:

1. `_Waiter.wake`, in any thread, posts the waiter to the inbox of its loop, which is asked for a
   wake-up unless one is under way.
2. `Inbox.serve`, on the loop, counts who has come.
3. `AsyncioLoop._resume` resumes one task after the other.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator
from threading import get_ident
from typing import Any

from .._cpython import in_callback_of, resume_callback, running_loop, still_waits
from ._burst import MANY, Burst
from ._loop import Handle, Loop
from ._timer import TimerFd

__all__ = ["AsyncioLoop", "current", "loop_in_this_thread"]


class _Waiter:
    """One wait of a task, on an ``asyncio.Future``.

    That is one of asyncio's own, unless the loop makes others: tasks have a fast path for these.
    And all that tasks call of it is C: Ctrl-C cannot strike while one parks, or wakes up.
    """

    __slots__ = ("_loop", "future", "resume_callback")

    resume_callback: tuple[Callable[[asyncio.Future[None]], Any], contextvars.Context] | None
    """Once it is taken from the future: what takes the next step of the task, and where."""

    def __init__(self, loop: AsyncioLoop, future: asyncio.Future[None]) -> None:
        self._loop = loop
        self.future = future
        self.resume_callback = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.future)

    def wake(self) -> None:
        loop = self._loop
        # Which loop runs here takes a system call to find out, in Python 3.11.
        if get_ident() == loop.thread and _will_look_before_it_sleeps(self.future.get_loop()):
            # It may be in the middle of a step of a task, so this one is resumed later; but is
            # done from here on, for whoever means to cancel what still waits.
            if not self.future.done():
                self.future.set_result(None)
        else:
            # As post() does; a thread that completes many futures feels each call.
            loop._queue.append(self)
            if loop._wake_up is None:
                loop._ask_for_wake_up()


class AsyncioLoop(Loop):
    """One loop of asyncio or uvloop. It does not keep the event loop alive; the waiters do."""

    __slots__ = ("_burst", "_event_loop", "thread")

    thread: int
    """Where the event loop ran when a task last waited: only there may it run now."""

    def __init__(self, event_loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._burst = Burst()
        self.thread = 0
        self._event_loop = weakref.ref(event_loop, lambda _: self.abandon())

    def is_of(self, event_loop: asyncio.AbstractEventLoop) -> bool:
        """Tells whether it stands for ``event_loop``."""
        return self._event_loop() is event_loop

    def waiter(self) -> _Waiter:
        if self._wake_up is not None:
            self._renew_wake_up()
        event_loop = self._event_loop()
        assert event_loop is not None  # it is running the caller
        return _Waiter(self, event_loop.create_future())

    def checkpoint(self) -> Iterable[Any]:
        # As with an asyncio future that is done: the task goes on at once.
        return ()

    def wake_later(self, waiter: Any, found: int) -> bool:
        if found < MANY:
            return False
        if self._wake_up is None and self._burst.look_again(self, found):
            self._pause()
        self.post(waiter)
        return True

    def call_soon(self, function: Callable[[], object]) -> None:
        event_loop = self._event_loop()
        if event_loop is not None:
            try:
                if running_loop() is event_loop:
                    event_loop.call_soon(function)
                else:
                    event_loop.call_soon_threadsafe(function)
            except RuntimeError:
                if not event_loop.is_closed():
                    raise

    def spawn(
        self,
        ended: Callable[[], None],
        function: Callable[..., Coroutine[Any, Any, None]],
        *args: object,
    ) -> None:
        self._running().create_task(function(*args)).add_done_callback(lambda _: ended())

    def watch(self, timer: TimerFd, function: Callable[[TimerFd], object]) -> None:
        # The task that happens to be the first to need it lends nothing of its context.
        add_reader = self._running().add_reader
        contextvars.Context().run(add_reader, timer.value, function, timer)

    def unwatch(self, timer: TimerFd) -> None:
        event_loop = self._event_loop()
        if event_loop is not None and not event_loop.is_closed():
            event_loop.remove_reader(timer.value)

    def call_later(self, seconds: float, function: Callable[[], object]) -> Handle:
        context = contextvars.Context()
        return self._running().call_later(seconds, function, context=context)

    def abandon(self) -> None:
        super().abandon()
        self._burst.close()

    def _running(self) -> asyncio.AbstractEventLoop:
        event_loop = self._event_loop()
        if event_loop is None:
            raise RuntimeError("the event loop has gone")
        return event_loop

    def _schedule(self, serve: Callable[[], None]) -> bool:
        event_loop = self._event_loop()
        if event_loop is None:
            return False
        try:
            event_loop.call_soon_threadsafe(serve)
        except RuntimeError:
            if not event_loop.is_closed():
                raise
            return False
        return True

    def _resume(self, count: int) -> None:
        if (count >= MANY or self._burst.goes_on) and self._burst.look_again(self, count):
            self._pause()
        waiters = self._queue
        debug = bool(waiters) and waiters[0].future.get_loop().get_debug()
        for _ in range(count):
            if not waiters:
                return  # a task that ran its loop within this has seen to the others
            waiter = waiters[0]
            future = waiter.future
            # In debug mode each task has a handle of its own, so that asyncio can tell who takes
            # long. And tasks written in Python are what runs a loop within a loop, which then
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
                    if still_waits(taken[0], future):  # the call has not got to the task
                        waiter.resume_callback = taken
                        waiters.appendleft(waiter)
                    raise


def _will_look_before_it_sleeps(event_loop: asyncio.AbstractEventLoop) -> bool:
    """Tells whether ``event_loop`` runs in this thread, and is in a task or a callback.

    A signal handler, or a finaliser, may also run while asyncio's loop is about to sleep
    or asleep. It would not notice what these schedule: it takes a write to its pipe.
    """
    if running_loop() is not event_loop:
        return False
    return asyncio.current_task(event_loop) is not None or in_callback_of(event_loop)


class _LastUsed(threading.local):
    """The loop that this thread last ran: nearly always the right one."""

    loop: AsyncioLoop | None = None


_last_used = _LastUsed()
_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncioLoop] = (
    weakref.WeakKeyDictionary()
)


def current() -> AsyncioLoop | None:
    """Returns the loop of asyncio or uvloop that runs in this thread, if one does."""
    event_loop = running_loop()
    if event_loop is None:
        return None
    loop = _last_used.loop
    if loop is None or not loop.is_of(event_loop):
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


def loop_in_this_thread() -> bool:
    """Tells whether a loop of asyncio or uvloop runs in this thread."""
    return running_loop() is not None

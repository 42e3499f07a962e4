"""Tasks and threads that wait for one thing, each event of which is for one of them.

An event wakes one waiter of each *waker*: of each loop, and of all threads. To wake only one of
all would be too few, as its loop may have closed, or stopped. To wake all would cost the more the
more wait. There are no locks; what makes that right:

1. A waiter joins, then looks whether the event has come. An event comes, then wakes. So one of
   the two sees the other.
2. ``waiting`` has all waiters, in order of arrival. To delete one there is to have taken it, in a
   statement within which CPython checks for no signal: no two events wake the same waiter.
3. ``lines`` has the waiters of each waker, except one that found itself alone when it had joined.
   That one is the first of all for as long as it waits. So the first of all and the first of each
   line are the first of each waker.
4. A waiter that was woken finds what the event was for, or finds that another has taken it, and
   waits again. If it leaves with an exception instead, its user calls `wake` once more, if the
   event still stands. To wake one too many is harmless.
"""

from __future__ import annotations

import math
import threading
import time
import types
from _thread import start_new_thread
from collections.abc import Callable, Generator
from typing import Any, Final, NamedTuple, TypeVar

from . import _core, _loops
from ._errors import warn_that_wait_blocks_a_loop

T = TypeVar("T")

EVERYONE: Final = math.inf

_Line = dict[object, None]


def first(things: dict[T, Any]) -> T | None:
    """Return the first key of a dict that other threads may change, or None if it is empty."""
    while True:
        # Not a copy, which takes the longer the more there are.
        try:
            for thing in things:
                return thing
            return None
        except RecursionError:
            raise
        except RuntimeError:  # another thread has just changed it
            continue


def give_up_after(timeout: float | None) -> float | None:
    """Return the time, as of ``time.monotonic()``, that is ``timeout`` seconds from now."""
    return None if timeout is None else time.monotonic() + timeout


class Waiters:
    """Those who wait for one thing: tasks on any loops, and threads.

    Attributes:
        waiting: All waiters, each with its waker; see rule 2.
        lines: The waiters of each waker; see rule 3. Nothing is left of a waker without waiters.
    """

    __slots__ = ("lines", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[object, _loops.Waker] = {}
        self.lines: dict[_loops.Waker, _Line] = {}

    # --------------------------------------------------------------------- waking

    def wake(self, events: float = 1) -> None:
        """Wake as many waiters of each waker as there are events."""
        if self.lines:
            self._wake(events)
            return
        waiting = self.waiting
        try:
            for waiter in waiting:  # which is the only one
                waker = waiting[waiter]
                del waiting[waiter]
                break
            else:
                return
        except RecursionError:
            raise
        except (KeyError, RuntimeError):  # another thread has just changed it
            self._wake(events)
            return
        try:
            waker.wake(waiter)
        except BaseException:
            _wake_again([(waiter, waker)])
            raise

    def wake_again(self, events: float = 1) -> None:
        """Wake waiters after `wake` was interrupted; in a thread if need be."""
        try:
            self._wake(events)
        except BaseException:
            start_new_thread(self._wake, (events,))

    def _wake(self, events: float) -> None:
        taken: list[tuple[object, _loops.Waker]] = []
        try:
            self._take_for(events, taken)
            for waiter, waker in taken:
                waker.wake(waiter)
        except BaseException:
            _wake_again(taken)
            raise

    def _take_for(self, events: float, taken: list[tuple[object, _loops.Waker]]) -> None:
        self._take(self.waiting, 1, taken)
        served = taken[0][1] if taken else None
        for waker in [*self.lines]:
            line = self.lines.get(waker, {})
            number = EVERYONE if waker.closed else events - 1 if waker is served else events
            self._take(line, number, taken)
            if not line:
                self._remove_line(waker)

    def _take(
        self, line: dict[object, Any], number: float, taken: list[tuple[object, _loops.Waker]]
    ) -> None:
        """Move the first ``number`` waiters of a line, or of ``waiting``, to ``taken``."""
        waiting = self.waiting
        while number > 0:
            waiter = first(line)
            if waiter is None:
                return
            # An interrupt comes before these statements, or after all of them.
            try:
                if line is not waiting:
                    del line[waiter]
                waker = waiting[waiter]
                del waiting[waiter]
            except KeyError:  # it has been taken, or has left
                continue
            taken += ((waiter, waker),)
            number -= 1

    # -------------------------------------------------------------------- waiting

    def block(self, is_over: Callable[[], bool], give_up: float | None, warning: str) -> bool:
        """Block the calling thread until it is woken, or ``is_over()``, or the time is up.

        It may return for no reason. The caller looks, and blocks again if it has to.

        Args:
            is_over: Return True if the caller need not block.
            give_up: The time at which to return, as of `give_up_after`, or None.
            warning: What to warn of if the thread runs an event loop.

        Returns:
            False if the time was up when it was called, and there was reason to block.
        """
        # Callbacks that this thread has put off may be those to put, or to read.
        _core.run_deferred()
        if is_over():
            return True
        timeout = None if give_up is None else give_up - time.monotonic()
        if timeout is not None and timeout <= 0:
            return False
        if _loops.loop_in_this_thread():
            warn_that_wait_blocks_a_loop(warning)
        interrupted = _this_thread.blocked
        for one in interrupted:
            one.step_aside()
        waiting, waiter = self.waiting, _loops.ThreadWaiter()
        try:
            _this_thread.blocked = (*interrupted, _Blocked(self, waiter, is_over))
            waiting[waiter] = _loops.THREADS
            if len(waiting) > 1:
                self.line_up(waiter, _loops.THREADS)
            if not is_over():
                waiter.block(timeout)
        finally:
            _this_thread.blocked = interrupted
            waiting.pop(waiter, None)
            if self.lines:
                self.leave_line(waiter, _loops.THREADS)
        return True

    @types.coroutine
    def wait(self, is_over: Callable[[], bool]) -> Generator[Any, Any, None]:
        """Do for a task what `block` does for a thread; for ``await``."""
        loop = _loops.current()
        waiting, waiter = self.waiting, loop.waiter()
        try:
            waiting[waiter] = loop
            if len(waiting) > 1:
                self.line_up(waiter, loop)
            if not is_over():
                yield from waiter
        finally:
            # If this is interrupted, its place in the line stays until an event comes to it.
            waiting.pop(waiter, None)
            if self.lines:
                self.leave_line(waiter, loop)

    def line_up(self, waiter: object, waker: _loops.Waker) -> None:
        """Join the line of a waker, as others may wait, too."""
        while True:
            line = self.lines.setdefault(waker, {})
            line[waiter] = None
            if self.lines.get(waker) is line:  # and has not been removed meanwhile
                return

    def leave_line(self, waiter: object, waker: _loops.Waker) -> None:
        """Leave the line of a waker, if the waiter is in it."""
        line = self.lines.get(waker)
        if line is not None:
            line.pop(waiter, None)
            if not line:
                self._remove_line(waker)

    def _remove_line(self, waker: _loops.Waker) -> None:
        line: _Line = {}
        try:
            # CPython checks for signals after the call of map(), which has done nothing yet, and
            # not while the result is unpacked. So no interrupt loses the line.
            (line,) = map(self.lines.pop, (waker,), ({},))
            for waiter in [*line]:  # it has just joined; let it join again
                waker.wake(waiter)
        except BaseException:
            _wake_again([(waiter, waker) for waiter in [*line]])
            raise

    def describe(self) -> list[_loops.Waiter]:
        """Return who waits, for people to read, from any thread."""
        return [waker.describe(waiter) for waiter, waker in [*self.waiting.items()]]


def _wake_again(taken: list[tuple[object, _loops.Waker]]) -> None:
    """Wake waiters that were taken, after an interrupt; in a thread if the stack is full."""
    for waiter, waker in taken:
        try:
            waker.wake(waiter)
        except BaseException:
            start_new_thread(waker.wake, (waiter,))


class _Blocked(NamedTuple):
    """One wait of a thread, within which a signal handler or a finaliser may wait, too."""

    waiters: Waiters
    waiter: _loops.ThreadWaiter
    is_over: Callable[[], bool]

    def step_aside(self) -> None:
        """Let other waiters have the events that come before the handler returns.

        The thread could not use them. If the handler waits for the same event, it would wait
        for ever. When it has returned, the thread looks again and, if it has to, joins again.
        """
        self.waiter.unblock()
        self.waiters.waiting.pop(self.waiter, None)
        if self.is_over():
            self.waiters.wake()


class _ThisThread(threading.local):
    """The waits of this thread: each but the last has been interrupted by the next."""

    blocked: tuple[_Blocked, ...] = ()


_this_thread = _ThisThread()

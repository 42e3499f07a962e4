"""Tasks and threads that wait for events of one thing; each event is for one waiter.

An event wakes one waiter of each *waker*: of each loop, and of all threads. To wake a single waiter
would not do, as its loop may be closed or stopped. To wake all of them would cost more the more
there are.

1. A waiter joins, then checks for the event. An event happens, then wakes.
2. ``waiting`` has all waiters, in order of arrival. To delete a waiter there is to take it, so no
   two events wake the same one.
3. ``lines`` has the waiters of each waker, except one that was alone when it joined. That one stays
   the first of all. So the first of all and the first of each line are the first of each waker.
4. A woken waiter takes the event, or waits again if another waiter took it. If it leaves with an
   exception, the caller calls `wake` again if the event still stands. A wake-up too many is
   harmless.
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
        try:
            for thing in things:  # not of a copy, which takes longer the larger the dict is
                return thing
            return None
        except RecursionError:
            raise
        except RuntimeError:  # another thread has just changed it
            continue


def give_up_after(timeout: float | None) -> float | None:
    """Return the time on the clock of ``time.monotonic`` that is ``timeout`` seconds from now."""
    return None if timeout is None else time.monotonic() + timeout


class Waiters:
    """The waiters for one thing: tasks on any loops, and threads.

    Attributes:
        waiting: All waiters, each with its waker; see rule 2.
        lines: The waiters of each waker; see rule 3. A waker without waiters is removed.
    """

    __slots__ = ("lines", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[object, _loops.Waker] = {}
        self.lines: dict[_loops.Waker, _Line] = {}

    # --------------------------------------------------------------------- waking

    def wake(self, events: float = 1) -> None:
        """Wake as many waiters of each waker as there are events."""
        if not (self.waiting or self.lines):
            return  # a waiter that joins from here on finds the event when it checks
        taken: list[tuple[object, _loops.Waker]] = []
        try:
            self._take_for(events, taken)
            for waiter, waker in taken:
                waker.wake(waiter)
        except BaseException:
            _wake_again(taken)
            raise

    def wake_again(self, events: float = 1) -> None:
        """Wake waiters after `wake` was interrupted; in a new thread if the stack is full."""
        try:
            self.wake(events)
        except BaseException:
            start_new_thread(self.wake, (events,))

    def _take_for(self, events: float, taken: list[tuple[object, _loops.Waker]]) -> None:
        self._take(self.waiting, 1, taken)  # which may be in no line: rule 3
        first_waker = taken[0][1] if taken else None
        for waker in [*self.lines]:
            line = self.lines.get(waker, {})
            # A closed loop never resumes its waiters, so none of them is kept.
            number = EVERYONE if waker.closed else events - (waker is first_waker)
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
            waker = waiting.get(waiter)
            if waker is None:  # it has been taken, or has left
                line.pop(waiter, None)
                continue
            # To `taken` first, as there may be no memory. And no call from here on: CPython checks
            # for signals at calls, so an interrupt comes before these statements or after all.
            taken += ((waiter, waker),)
            try:
                if line is not waiting:
                    del line[waiter]
                del waiting[waiter]
            except KeyError:  # another thread has just taken it
                del taken[-1]
                continue
            number -= 1

    # -------------------------------------------------------------------- waiting

    def block(self, is_over: Callable[[], bool], give_up: float | None, warning: str) -> bool:
        """Block the calling thread until it is woken, or ``is_over()``, or the time is up.

        It may return early. The caller checks, and blocks again if it has to.

        Args:
            is_over: Returns True if the caller need not block.
            give_up: The time at which to return, from `give_up_after`, or None.
            warning: The text of the warning if the thread runs an event loop.

        Returns:
            False if the thread would have to block and the time is up.
        """
        # A callback that this thread has deferred may be the one that makes the event happen.
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
            # Join *before* the check. If the check came first, an event between the two would
            # wake nothing, and we would block for ever.
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
        """Suspend the current task until it is woken, or ``is_over()``; for ``await``."""
        loop = _loops.running() or _loops.current()
        waiting, waiter = self.waiting, loop.waiter()
        try:
            waiting[waiter] = loop  # *before* the check, as in `block`
            if len(waiting) > 1:
                self.line_up(waiter, loop)
            if not is_over():
                yield from waiter
        finally:
            # If this is interrupted, the entry in the line stays until an event finds it.
            waiting.pop(waiter, None)
            if self.lines:
                self.leave_line(waiter, loop)

    def line_up(self, waiter: object, waker: _loops.Waker) -> None:
        """Join the line of a waker, as there may be other waiters."""
        while True:
            line = self.lines.setdefault(waker, {})
            line[waiter] = None
            # Check *after* joining. The thread that removes an empty line wakes a waiter that has
            # joined it since, or we see here that the line was removed.
            if self.lines.get(waker) is line:
                return

    def leave_line(self, waiter: object, waker: _loops.Waker) -> None:
        line = self.lines.get(waker)
        if line is not None:
            line.pop(waiter, None)
            if not line:
                self._remove_line(waker)

    def _remove_line(self, waker: _loops.Waker) -> None:
        line: _Line = {}
        try:
            # Not `line = self.lines.pop(waker, {})`: an interrupt after the call would lose the
            # line. CPython checks for signals after the call of map(), which has done nothing yet,
            # and not while the result is unpacked.
            (line,) = map(self.lines.pop, (waker,), ({},))
            for waiter in [*line]:  # it has just joined, and joins again
                waker.wake(waiter)
        except BaseException:
            _wake_again([(waiter, waker) for waiter in [*line]])
            raise

    def describe(self) -> list[_loops.Waiter]:
        return [waker.describe(waiter) for waiter, waker in [*self.waiting.items()]]


def _wake_again(taken: list[tuple[object, _loops.Waker]]) -> None:
    """Wake waiters that were taken, after an interrupt; in a new thread if the stack is full."""
    for waiter, waker in taken:
        try:
            waker.wake(waiter)
        except BaseException:
            start_new_thread(waker.wake, (waiter,))


class _Blocked(NamedTuple):
    """One wait of a thread; a signal handler or a finaliser may wait within it."""

    waiters: Waiters
    waiter: _loops.ThreadWaiter
    is_over: Callable[[], bool]

    def step_aside(self) -> None:
        """Leave the events to other waiters until the handler returns.

        This thread could not use them, and the handler may wait for the same event.
        """
        # Unblock *before* leaving: once the handler has returned, the thread checks for the event
        # and, if it has to, joins again. If it left and stayed blocked, nothing would wake it.
        self.waiter.unblock()
        self.waiters.waiting.pop(self.waiter, None)
        if self.is_over():  # an event may have taken this waiter just now: pass it on
            self.waiters.wake()


class _ThisThread(threading.local):
    """The waits of this thread: each but the last was interrupted by the next."""

    blocked: tuple[_Blocked, ...] = ()


_this_thread = _ThisThread()

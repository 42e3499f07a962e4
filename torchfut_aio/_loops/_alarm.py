"""The alarm: calls a function on a loop, at a time that is set again and again.

The loops' own timers have the resolution of ``epoll_wait``, a millisecond. A Linux timerfd is a
file that becomes readable when its time has come, and wakes a loop within tens of microseconds.
Where the platform has none, or the loop cannot watch files, the loop's own timers serve, with a
call for each time.

Whatever interrupts a step of it:

- If a descriptor is closed while a loop watches it, the loop never wakes again, or whoever opens
  the next file fails. So only the finaliser of a `TimerFd` closes one, and a loop that watches a
  `TimerFd` refers to it.
- A timer stays readable until it is set again. So when Ctrl-C keeps the loop from calling the
  function, the loop finds the timer in its next turn.
- A timer counts as watched only once `Loop.watch` has returned. Until then the next use begins
  afresh: it has the loop forget the file, of which the loop may know half, and watch it.
- A call that the loop drops without making it, as Ctrl-C came in between, is asked for again.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._loop import Loop

_RETRY = 1e-3  # seconds, after the function has raised


class TimerFd(ctypes.c_int):
    """A timer; readable from when its time has come until it is set again.

    ``value`` is the descriptor. C makes the instance of what timerfd_create returns, so Ctrl-C
    cannot strike between the descriptor and the object that will close it.
    """

    def set(self, seconds: float) -> None:
        """Starts the timer anew, or, for infinity, stops it; either way it is not readable."""
        # All zero stops it.
        nanoseconds = 0 if seconds == math.inf else max(int(seconds * 1e9), 1)
        _libc.timerfd_settime(self, 0, _Itimerspec(0, 0, *divmod(nanoseconds, 10**9)), None)

    # At exit, modules may have been emptied by the time that this is called.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.value >= 0:
            close(self.value)


# struct itimerspec: the seconds and nanoseconds of the interval, and those of the first time.
_Itimerspec = ctypes.c_long * 4

# Python itself has these functions from version 3.13 on. They never block, so they are called
# without letting go of the GIL.
_libc: Any = ctypes.PyDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
if hasattr(_libc, "timerfd_create"):
    _libc.timerfd_create.restype = TimerFd


def new_timer() -> TimerFd | None:
    """Returns a timer that is not set, or None where the platform has none.

    Raises:
        OSError: Too many files are open.
    """
    if not hasattr(_libc, "timerfd_create"):
        return None
    close_on_exec = 0o2000000
    timer: TimerFd = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | close_on_exec)
    if timer.value < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create: " + os.strerror(ctypes.get_errno()))
    return timer


class Alarm:
    """Calls ``function`` on ``loop`` when its time has come. For the loop's own thread.

    It is not set at first. From the first time that it is set until it is closed, something is
    registered with the loop. If the function raises, and has not set the alarm anew, it is called
    again in a moment.
    """

    def __init__(self, loop: Loop, function: Callable[[], object]) -> None:
        self._loop = loop
        self._function = function
        self._can_watch = True
        self._timer: TimerFd | None = None
        self._watched = False
        self._set_anew = False
        self._call: weakref.ref[Any] | None = None  # where the loop's own timers serve

    def set(self, seconds: float) -> None:
        """Calls the function in so many seconds, or never, and not when last set to."""
        self._set_anew = True
        if self._call is not None:
            self._cancel_call()
        if self.is_exact():
            assert self._timer is not None
            self._timer.set(seconds)
        elif seconds < math.inf:
            self._call = weakref.ref(self._loop.call_later(seconds, self._ring), self._call_lost)

    def is_exact(self) -> bool:
        """Tells whether the alarm is exact to microseconds; has the loop watch it, if so."""
        if self._can_watch and not self._watched:
            try:
                self._watch()
            except OSError:  # too many open files, now
                return False
            except RecursionError:
                raise
            except RuntimeError:  # the loop cannot watch files
                self._can_watch = False
        return self._watched

    def _watch(self) -> None:
        timer = self._timer = self._timer or new_timer()
        if timer is None:
            self._can_watch = False
        else:
            self._loop.unwatch(timer)
            self._loop.watch(timer, self._ring)
            self._watched = True

    def close(self) -> None:
        """Calls nothing any more, and leaves nothing with the loop; may be called again."""
        self._cancel_call()
        timer = self._timer
        if timer is not None:
            timer.set(math.inf)
            self._watched = False
            self._loop.unwatch(timer)
            self._timer = None

    def _ring(self, timer: TimerFd | None = None) -> None:
        self._call = None
        if timer is not self._timer and timer is not None:
            # The loop still watches it, as Ctrl-C interrupted whoever closed the alarm.
            timer.set(math.inf)
            self._loop.unwatch(timer)
            return
        self._set_anew = False
        try:
            self._function()
        except BaseException:
            if not self._set_anew:
                self.set(_RETRY)
            raise
        if not self._set_anew:
            self.set(math.inf)

    def _cancel_call(self) -> None:
        call, self._call = self._call, None  # first, as it is dropped now
        handle = None if call is None else call()
        if handle is not None:
            handle.cancel()

    def _call_lost(self, call: weakref.ref[Any]) -> None:
        if self._call is call:
            self._call = None
            try:
                self.set(0.0)
            except RecursionError:
                raise
            except RuntimeError:  # the loop has closed
                pass

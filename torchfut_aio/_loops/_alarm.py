"""The alarm: calls a function on a loop, at a time that can be set again and again.

The timers of a loop have the resolution of ``epoll_wait``, a millisecond. A Linux timerfd is a file
that becomes readable when its time has come, and wakes a loop within tens of microseconds. If the
platform has none, or the loop cannot watch files, the alarm uses the timers of the loop.
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

from .._extension import speedup

if TYPE_CHECKING:
    from ._loop import Loop

_RETRY = 1e-3  # seconds, after the function has raised


class TimerFd(ctypes.c_int):
    """A timer; it is readable from when its time has come until it is set again.

    ``value`` is the descriptor. ctypes makes this object from the result of timerfd_create, in C.
    So no interrupt can come between the descriptor and the object that will close it.

    A loop that watches the timer refers to it, and only the finaliser closes the descriptor. If a
    descriptor is closed while a loop watches it, the loop never wakes again, or opening the next
    file fails.
    """

    @speedup
    def set(self, seconds: float) -> None:
        """Restart the timer, or stop it if ``seconds`` is infinite; it is not readable then."""
        nanoseconds = 0 if seconds == math.inf else max(int(seconds * 1e9), 1)
        _libc.timerfd_settime(self, 0, _Itimerspec(0, 0, *divmod(nanoseconds, 10**9)), None)

    # `close` is a default, as the module `os` may be empty when this is called at exit.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.value >= 0:
            close(self.value)


# struct itimerspec: the interval and the first time, each in seconds and nanoseconds. All zero
# stops the timer.
_Itimerspec = ctypes.c_long * 4

# Python itself has these functions from version 3.13 on. PyDLL does not release the GIL, as they
# never block.
_libc: Any = ctypes.PyDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
if hasattr(_libc, "timerfd_create"):
    _libc.timerfd_create.restype = TimerFd


def new_timer() -> TimerFd | None:
    """Return a timer that is not set, or None where the platform has none.

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
    """Calls ``function`` on ``loop`` when its time has come.

    All methods but `set_if_exact` are for the loop's own thread.

    A new alarm is not set. From the first `set` to `close`, a timer is registered with the loop. If
    the function raises, it is called again after a moment.

    A timerfd stays readable until it is set again. So if an interrupt keeps the loop from calling
    the function, the loop calls it in the next turn.
    """

    def __init__(self, loop: Loop, function: Callable[[], object]) -> None:
        self._loop = loop
        self._function = function
        self._can_watch = True
        self._timer: TimerFd | None = None
        self._watched = False
        self._set_anew = False
        self._call: weakref.ref[Any] | None = None  # with a timer of the loop: its pending call

    def set(self, seconds: float) -> None:
        """Call the function in ``seconds``, or never if that is infinite."""
        self._set_anew = True
        if self._call is not None:
            self._cancel_call()
        self.is_exact()
        if not self.set_if_exact(seconds) and seconds < math.inf:
            # Weak, so that `_call_lost` notices when an interrupt makes the loop drop the call.
            self._call = weakref.ref(self._loop.call_later(seconds, self._fire), self._call_lost)

    def set_if_exact(self, seconds: float) -> bool:
        """Set the alarm if it is exact, from any thread; return False if it is not."""
        timer = self._timer
        if timer is None or not self._watched:
            return False
        self._set_anew = True
        timer.set(seconds)
        return True

    def is_exact(self) -> bool:
        """Return True if the alarm is exact to microseconds. If possible, make it so."""
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
            # An interrupt may leave the file half registered. So unregister it first, and set
            # `_watched` *last*.
            self._loop.unwatch(timer)
            self._loop.watch(timer, self._fire)
            self._watched = True

    def close(self) -> None:
        """Remove everything from the loop; may be called again."""
        self._cancel_call()
        timer = self._timer
        if timer is not None:
            timer.set(math.inf)
            self._watched = False
            self._loop.unwatch(timer)
            self._timer = None

    def _fire(self, timer: TimerFd | None = None) -> None:
        self._call = None
        if timer is not self._timer and timer is not None:
            # An old timer: an interrupt of `close` has left it with the loop.
            timer.set(math.inf)
            self._loop.unwatch(timer)
            return
        self._set_anew = False
        try:
            self._function()
        except BaseException:
            self.set(_RETRY)
            raise
        if not self._set_anew:
            self.set(math.inf)

    def _cancel_call(self) -> None:
        call, self._call = self._call, None  # *before* cancelling, which drops the call: _call_lost
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
            except RuntimeError:  # the loop is closed
                pass

"""A timer that is exact to microseconds, as a file that a loop can watch.

The loops' own timers have the resolution of ``epoll_wait``, a millisecond. A Linux timerfd
becomes readable when its time has come, and wakes a loop within tens of microseconds.

A descriptor that is closed while a loop watches it makes the loop deaf, or breaks whoever opens
the next file. So only the finaliser of a `TimerFd` closes one, and a loop that watches a
`TimerFd` refers to it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
import time
from collections.abc import Callable

_CLOEXEC = 0o2000000

# struct itimerspec: the seconds and nanoseconds of the interval, and those of the first time.
_Itimerspec = ctypes.c_long * 4


class TimerFd(ctypes.c_int):
    """A timer; readable from when its time has come until it is set again.

    ``value`` is the descriptor. C makes the instance of what timerfd_create returns, so Ctrl-C
    cannot strike between the descriptor and the object that will close it.
    """

    @classmethod
    def make(cls) -> TimerFd:
        """Makes a timer that is not set.

        Raises:
            OSError: Too many files are open.
        """
        libc = _libc()
        assert libc is not None
        timer: TimerFd = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | _CLOEXEC)
        if timer.value < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create: " + os.strerror(ctypes.get_errno()))
        return timer

    def set(self, seconds: float) -> None:
        """Starts the timer anew, or, for infinity, stops it; either way it is not readable."""
        # All zero stops it.
        nanoseconds = 0 if seconds == math.inf else max(int(seconds * 1e9), 1)
        libc = _libc()
        assert libc is not None
        libc.timerfd_settime(self, 0, _Itimerspec(0, 0, *divmod(nanoseconds, 10**9)), None)

    # At exit, modules may have been emptied by the time that this is called.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.value >= 0:
            close(self.value)


@functools.cache
def _libc() -> ctypes.PyDLL | None:
    # Python itself has these functions from version 3.13 on. They never block, so they are
    # called without letting go of the GIL.
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.PyDLL(None, use_errno=True)
    if not hasattr(libc, "timerfd_create"):
        return None
    libc.timerfd_create.restype = TimerFd
    return libc


def available() -> bool:
    """Tells whether the platform has timers of this kind."""
    return _libc() is not None

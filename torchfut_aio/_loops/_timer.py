"""A timer that is exact to microseconds, as a file that a loop can watch.

The loops' own timers have the resolution of ``epoll_wait``, a millisecond. A Linux timerfd
becomes readable when its time has come, and wakes a loop within tens of microseconds.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
import time
from collections.abc import Callable

__all__ = ["TimerFd", "available"]

_NONBLOCK, _CLOEXEC = os.O_NONBLOCK if hasattr(os, "O_NONBLOCK") else 0, 0o2000000


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


@functools.cache
def _libc() -> ctypes.PyDLL | None:
    # Python itself has these functions from version 3.13 on. They never block, so they are
    # called without letting go of the GIL.
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.PyDLL(None, use_errno=True)
    return libc if hasattr(libc, "timerfd_create") else None


def available() -> bool:
    """Tells whether the platform has timers of this kind."""
    return _libc() is not None


class TimerFd:
    """A timer; ``fd`` is readable from when the time has come until it is set again."""

    __slots__ = ("_settings", "fd")

    def __init__(self) -> None:
        self.fd = -1
        libc = _libc()
        assert libc is not None
        self._settings = _Itimerspec()
        self.fd = libc.timerfd_create(time.CLOCK_MONOTONIC, _NONBLOCK | _CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create: " + os.strerror(ctypes.get_errno()))

    def set(self, seconds: float) -> None:
        """Starts the timer anew, or, for infinity, stops it; either way it is not readable."""
        value = self._settings.value
        # All zero stops it.
        nanoseconds = 0 if seconds == math.inf else max(int(seconds * 1e9), 1)
        value.seconds, value.nanoseconds = divmod(nanoseconds, 1_000_000_000)
        libc = _libc()
        assert libc is not None
        libc.timerfd_settime(self.fd, 0, ctypes.byref(self._settings), None)

    # At exit, modules may have been emptied by the time that this is called.
    def close(self, close: Callable[[int], None] = os.close) -> None:
        """Gives the file back; may be called again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close(fd)

    __del__ = close

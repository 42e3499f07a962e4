"""The alarm: calls a function on a loop, at a time that is set again and again.

Where the loop can watch files, and the platform has timers that are files, it is one of these,
exact to microseconds. Otherwise the loop's own timers serve, a call for each time.

Whatever interrupts a step of it:

- A descriptor is never closed while a loop watches it: see `_timer`.
- A timer stays readable until it is set again. So when Ctrl-C keeps the loop from calling the
  function, the loop finds the timer in its next turn.
- A timer counts as watched only once `Loop.watch` has returned. Until then the next use begins
  afresh: it has the loop forget the file, of which the loop may know half, and watch it.
- A call that the loop drops without making it, as Ctrl-C struck in between, is asked for again.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from . import _timer

if TYPE_CHECKING:
    from ._loop import Loop

_RETRY = 1e-3  # seconds, after the function has raised


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
        self._timer: _timer.TimerFd | None = None
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
        if self._watched:
            return True
        if not self._can_watch or not _timer.available():
            return False
        try:
            timer = self._timer = self._timer or _timer.TimerFd.make()
            self._loop.unwatch(timer)
            self._loop.watch(timer, self._ring)
        except OSError:  # too many open files, now
            return False
        except RecursionError:
            raise
        except RuntimeError:  # the loop cannot watch files
            self._can_watch = False
            return False
        self._watched = True
        return True

    def close(self) -> None:
        """Calls nothing any more, and leaves nothing with the loop; may be called again."""
        self._cancel_call()
        timer = self._timer
        if timer is not None:
            timer.set(math.inf)
            self._watched = False
            self._loop.unwatch(timer)
            self._timer = None

    def _ring(self, timer: _timer.TimerFd | None = None) -> None:
        self._call = None
        if timer is not self._timer and timer is not None:
            # The loop still watches it, as Ctrl-C struck whoever closed the alarm.
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
            with suppress(RuntimeError):  # the loop has closed
                self.set(0.0)

"""How often a loop looks while completions come in a burst.

A thread that completes many futures lets go of the GIL in each, in C++, for an instant. With a
loop awake that waits for the GIL, each of these costs the thread a system call, and every few of
them the GIL: both would do less than either alone. So in such a burst the loop sleeps between
its looks, as drivers of network cards do: from as long as the thread may take to complete twice
as many again, up to a millisecond. A burst of few is not put off.
"""

from __future__ import annotations

import math

from ._alarm import Alarm

MANY = 16  # found in one look
PAUSE_FOR_EACH = 8e-6  # seconds until the next look, for each that was found in this one
LONGEST_PAUSE = 1e-3


class Burst:
    """Has a loop look again after a pause, by ``alarm``, as long as looks find many."""

    def __init__(self, alarm: Alarm) -> None:
        self._alarm = alarm
        self.goes_on = False  # False only if the alarm is not set

    def look_again(self, found: int) -> bool:
        """Has the loop look again in a moment if this look found many; returns whether it will.

        It does not where there are only the loop's own timers: a pause is too short for these.
        """
        if found >= MANY and self._alarm.is_exact():
            # First of all, so that an alarm that is set will be stopped, even if Ctrl-C strikes.
            self.goes_on = True
            self._alarm.set(min(found * PAUSE_FOR_EACH, LONGEST_PAUSE))
            return True
        if self.goes_on:
            self._alarm.set(math.inf)
            self.goes_on = False
        return False

    def close(self) -> None:
        """Leaves nothing with the loop, which has closed or gone; may be called again."""
        self._alarm.close()

"""When to poll a stream again, and what its last waits tell about the next.

A poll costs some tens of microseconds of the loop's time: polling often wastes it, polling
seldom wakes late. Waits on a stream resemble the waits before them. So the shortest and the
longest of the last few, but for an outlier on either side, tell when to poll: hardly at all
before the shortest; then, if the two are close together, a few times between them; if they are
not, at intervals that grow with the time already waited.

To try another schedule, write a class that has what `Schedule` has, and give it to `Watcher`.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

from ._policy import get_poll_policy


class Poll(NamedTuple):
    """A poll of a stream. All times are seconds since the stream began the awaited work.

    That was when its last awaited event was reached, or this one recorded, whichever is later.
    ``at`` may be before ``due``.
    """

    before: float  # when the work was last known to be pending: at the last poll, or the start
    due: float  # when this poll was due: what ``next_poll(before)`` returned
    at: float  # when it took place
    reached: bool  # whether the work was done


class Schedule(Protocol):
    """Tells when to poll one stream.

    Times count as in `Poll`. A schedule keeps within the policy itself.
    """

    @property
    def interval(self) -> float:
        """How long the last waits took, in seconds; 0 while nothing has been learned."""

    def next_poll(self, waited: float) -> float:
        """Returns when to poll next if the work is pending ``waited`` seconds into the wait.

        Later than ``waited``. Changes nothing.
        """

    def observe(self, poll: Poll) -> None:
        """Learns from a poll. Is called after each."""


class LearnedSchedule:
    """Polls when the waits before this one ended, within what the policy allows."""

    __slots__ = ("_high", "_late", "_least", "_low", "_regular", "_slept_through", "_waits")

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=16)
        self._late = 0.0  # how late wake-ups after a long pause are, on average
        self._least = self._low = self._high = 0.0
        self._regular = False
        self._slept_through = 0  # the last so many waits were over at their first poll

    @property
    def interval(self) -> float:
        return (self._low + self._high) / 2

    def next_poll(self, waited: float) -> float:
        policy = get_poll_policy()
        first = self._first_poll(waited)
        if waited < first:
            pause = first - waited
        elif self._regular:
            spread = self._high - self._low
            near_the_end = waited < self._high + spread
            pause = spread / 8 if near_the_end else min(waited / 4, _longest_pause(waited))
        else:
            pause = min(max(waited, self.interval) / 2, _longest_pause(waited))
        return waited + min(max(pause, policy.min_interval), policy.max_interval)

    def observe(self, poll: Poll) -> None:
        slept = poll.reached and poll.before < self._first_poll(poll.before)
        late, shortest = poll.at - poll.due, get_poll_policy().min_interval
        # After a long sleep, a machine takes longer to wake up.
        if late > 0 and poll.due - poll.before > 16 * shortest:
            self._late += (min(late, 16 * shortest) - self._late) / 4
        if poll.reached:
            self._learn((poll.before + poll.at) / 2, poll.at, slept)

    def _first_poll(self, waited: float) -> float:
        """Returns until when none of the last waits was over."""
        if not self._regular:
            return min(self._least - self._late, waited + 4 * _longest_pause(waited))
        # Poll earlier to make up for late wake-ups, and more so where they are very late:
        # the longer a machine sleeps, the less it keeps to a time.
        shortest = get_poll_policy().min_interval
        late = self._late + 2 * max(self._late - shortest, 0)
        return self._low + min((self._high - self._low) / 2, shortest) - late

    def _learn(self, wait: float, longest: float, slept: bool) -> None:
        if slept:
            # It was over before the first poll, perhaps long before. If it counted as
            # ``longest``, the next poll would come no earlier, and so for ever. The more
            # waits in a row were slept through, the earlier the next poll.
            self._slept_through += 1
            wait = max(wait, longest - 2**self._slept_through * get_poll_policy().min_interval)
        else:
            self._slept_through = 0
        self._waits.append(wait)
        waits = sorted(self._waits)
        outliers = len(waits) // 8
        self._least, self._low, self._high = waits[0], waits[outliers], waits[-1 - outliers]
        self._regular = len(waits) >= 4 and self._high - self._low <= self._low / 4


def _longest_pause(waited: float) -> float:
    # About half of what asyncio.sleep(0.001) takes, as long as that is little.
    return max(9 * get_poll_policy().min_interval, waited / 1024)

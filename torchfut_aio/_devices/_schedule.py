"""When to poll a stream: the policy of the program, and a schedule that learns from past waits.

A poll takes some tens of microseconds of the loop's time. Frequent polls waste that time, and rare
polls wake tasks late. Waits on a stream resemble earlier ones. So the schedule keeps the last waits
and drops an outlier on either side. Before the shortest of the others, it rarely polls. If shortest
and longest are close together, it polls a few times between them. Otherwise the intervals grow with
the time already waited.

To try another schedule, write a class with the methods of `Schedule`, and pass it to `Watcher`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from .._arguments import check_number_of_seconds
from .._repr import short


@dataclass(frozen=True, kw_only=True, slots=True)
class PollPolicy:
    """How event loops watch streams. The defaults suit most programs: measure before a change.

    Attributes:
        min_interval: The shortest time between two polls of a stream, in seconds. If the waits on
            the stream resemble each other, wake-ups are late by about this much.
        max_interval: The longest time between two polls, in seconds. A wait that is much
            shorter than the waits before it may be noticed this late.
        blocking: Do not poll. For each stream with pending events a helper thread blocks in
            ``event.synchronize()``, and then wakes the loop. That costs a thread switch, and
            one poll a second in case the wake-up was lost. The thread ends soon after its last
            event, and an interpreter that exits waits for it. The loop still polls events that
            the program has recorded itself, as their streams are not known, and streams for
            which no thread can be started.

    Raises:
        TypeError, ValueError: Not numbers; not ``0 < min_interval <= max_interval``.

    Example:
        >>> torchfut_aio.set_poll_policy(torchfut_aio.PollPolicy(max_interval=0.002))
        PollPolicy(min_interval=5e-05, max_interval=0.01, blocking=False)
        >>> torchfut_aio.set_poll_policy(torchfut_aio.PollPolicy())
        PollPolicy(min_interval=5e-05, max_interval=0.002, blocking=False)
    """

    min_interval: float = 50e-6
    max_interval: float = 10e-3
    blocking: bool = False

    def __post_init__(self) -> None:
        for name in ("min_interval", "max_interval"):
            check_number_of_seconds(getattr(self, name), f"{name} must be a number of seconds")
        if not 0 < self.min_interval <= self.max_interval < float("inf"):
            raise ValueError(
                "intervals are seconds, with 0 < min_interval <= max_interval, and finite; not "
                f"min_interval={short(self.min_interval)}, max_interval={short(self.max_interval)}"
            )


_policy = PollPolicy()


def get_poll_policy() -> PollPolicy:
    """Return the policy that all event loops of the process use."""
    return _policy


def set_poll_policy(policy: PollPolicy) -> PollPolicy:
    """Set how all event loops of the process watch streams. Each uses it from its next poll on.

    Returns:
        The previous policy.

    Raises:
        TypeError: ``policy`` is not a `PollPolicy`.
    """
    global _policy
    if not isinstance(policy, PollPolicy):
        raise TypeError(
            "set_poll_policy() takes a PollPolicy, such as PollPolicy(max_interval=0.001), "
            f"not {short(policy)}"
        )
    before, _policy = _policy, policy
    return before


class Poll(NamedTuple):
    """A poll of a stream. Times are seconds since the stream began the awaited work.

    The work began when the last awaited event was reached, or when this one was recorded, whichever
    is later. ``at`` may be before ``due``.
    """

    before: float  # when the work was last known to be pending: at the last poll, or the start
    due: float  # when this poll was due: what ``next_poll(before)`` returned
    at: float  # when it took place
    reached: bool  # whether the work was done


class Schedule(Protocol):
    """Decides when to poll one stream, within the limits of the policy. Times are as in `Poll`."""

    @property
    def interval(self) -> float:
        """How long the last waits took, in seconds; 0 while nothing has been learned."""

    def next_poll(self, waited: float) -> float:
        """Return when to poll next, if the work is still pending ``waited`` seconds into the wait.

        The result is later than ``waited``. The call changes nothing.
        """

    def observe(self, poll: Poll) -> None:
        """Learn from a poll; called after each."""


class LearnedSchedule:
    """Polls when the waits before this one ended."""

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=16)
        self._late = 0.0  # how late wake-ups after a long pause are, on average
        self._least = self._low = self._high = 0.0  # of the waits; _low and _high without outliers
        self._regular = False  # whether _low and _high are close together
        self._slept_through = 0  # how many waits in a row were over at their first poll
        self.interval = 0.0

    def next_poll(self, waited: float) -> float:
        policy = _policy
        first, spread = self._first_poll(), self._high - self._low
        # For the first half second, about half of the time that asyncio.sleep(0.001) takes.
        longest = max(9 * policy.min_interval, waited / 1024)
        if waited < first:
            pause = first - waited if self._regular else min(first - waited, 4 * longest)
        elif not self._regular:
            pause = min(max(waited, self.interval) / 2, longest)
        elif waited < self._high + spread:
            pause = spread / 8
        else:
            pause = min(waited / 4, longest)
        return waited + min(max(pause, policy.min_interval), policy.max_interval)

    def observe(self, poll: Poll) -> None:
        slept = poll.reached and poll.before < self._first_poll()
        late, shortest = poll.at - poll.due, _policy.min_interval
        # After a long sleep, a machine takes longer to wake up.
        if late > 0 and poll.due - poll.before > 16 * shortest:
            self._late += (min(late, 16 * shortest) - self._late) / 4
        if poll.reached:
            self._learn((poll.before + poll.at) / 2, poll.at, slept)

    def _first_poll(self) -> float:
        """Return the time before which none of the last waits was over."""
        if not self._regular:
            return self._least - self._late
        # Poll earlier to make up for late wake-ups, and more so if they are very late: the longer a
        # machine sleeps, the more its wake-ups vary.
        shortest = _policy.min_interval
        late = self._late + 2 * max(self._late - shortest, 0)
        return self._low + min((self._high - self._low) / 2, shortest) - late

    def _learn(self, wait: float, longest: float, slept: bool) -> None:
        if slept:
            # The wait was over before the first poll, perhaps long before. If it counted as
            # `longest`, the next first poll would be no earlier, and the schedule would never
            # notice. So each such wait in a row makes the first poll earlier.
            self._slept_through += 1
            wait = max(wait, longest - 2**self._slept_through * _policy.min_interval)
        else:
            self._slept_through = 0
        self._waits.append(wait)
        waits = sorted(self._waits)
        outliers = len(waits) // 8
        self._least, self._low, self._high = waits[0], waits[outliers], waits[-1 - outliers]
        self._regular = len(waits) >= 4 and self._high - self._low <= self._low / 4
        self.interval = (self._low + self._high) / 2

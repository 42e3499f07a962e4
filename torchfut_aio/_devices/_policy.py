"""When to look whether a kernel is done: the policy, and what is learned of a stream.

A look costs some tens of microseconds of the loop's time, so looking often wastes it, and
looking seldom wakes late. Waits on a stream resemble the waits before them. So the
shortest and the longest of the last few, but for an outlier on either side, tell when to
look: hardly at all while each of them was still waiting; then, where they are close
together, a few times within what lies between them; where they are not, at intervals that
grow with the time already waited.
"""

from __future__ import annotations

import numbers
from collections import deque
from dataclasses import dataclass

__all__ = ["History", "PollPolicy", "policy", "set_poll_policy"]


@dataclass(frozen=True)
class PollPolicy:
    """How event loops watch streams. The defaults serve; measure before changing them.

    Attributes:
        shortest: The shortest time between two looks at the events of a stream, in
            seconds. Wake-ups are late by about this much where waits on the stream
            resemble each other.
        longest: The longest time between two looks, in seconds. A wait that is much
            shorter than those before it may be noticed this late.
        blocking: Do not look at all: for each stream with pending events a helper thread
            blocks in ``event.synchronize()``, and wakes the loop. Costs no time of the
            loop while it waits, and a thread switch at the end. The thread ends soon after
            its last event, and the interpreter waits for that when it exits. Events that the
            program has recorded itself are looked at all the same, as nobody knows their
            streams.

    Raises:
        TypeError, ValueError: Not numbers; not ``0 < shortest <= longest``.

    Example:
        >>> torchfut_aio.set_poll_policy(torchfut_aio.PollPolicy(longest=0.002))
        PollPolicy(shortest=5e-05, longest=0.01, blocking=False)
        >>> torchfut_aio.set_poll_policy(torchfut_aio.PollPolicy())
        PollPolicy(shortest=5e-05, longest=0.002, blocking=False)
    """

    shortest: float = 50e-6
    longest: float = 10e-3
    blocking: bool = False

    def __post_init__(self) -> None:
        for name in ("shortest", "longest"):
            seconds = getattr(self, name)
            if not isinstance(seconds, numbers.Real):
                raise TypeError(
                    f"{name} must be a number of seconds, not {seconds!r} "
                    f"of type {type(seconds).__qualname__}"
                )
        if not 0 < self.shortest <= self.longest < float("inf"):
            raise ValueError(
                "intervals are seconds, with 0 < shortest <= longest, and finite; "
                f"not shortest={self.shortest!r}, longest={self.longest!r}"
            )


_policy = PollPolicy()


def policy() -> PollPolicy:
    """Returns the policy in force."""
    return _policy


def set_poll_policy(policy: PollPolicy) -> PollPolicy:
    """Sets how all event loops of the process watch streams, from their next look on.

    Args:
        policy: The policy.

    Returns:
        The one that was in force before.

    Raises:
        TypeError: ``policy`` is not a `PollPolicy`.
    """
    global _policy
    if not isinstance(policy, PollPolicy):
        raise TypeError(f"expected a PollPolicy, such as PollPolicy(), not {policy!r}")
    before, _policy = _policy, policy
    return before


class History:
    """What the last waits on a stream tell about the next."""

    __slots__ = ("_late", "_slept", "_slept_through", "_waits", "high", "least", "low", "regular")

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=16)
        self._late = 0.0
        self.least = self.low = self.high = 0.0
        self.regular = self._slept = False
        self._slept_through = 0

    def learn(self, missed: float, hit: float) -> None:
        """Notes a wait that was not over after ``missed`` seconds, and was after ``hit``."""
        wait = (missed + hit) / 2
        if self._slept:
            # It was over before the first look, perhaps long before. Had it to count as
            # ``hit``, then the next look would come no earlier, and so for ever. The more
            # waits in a row are slept through, the further it moves forward.
            self._slept_through += 1
            wait = max(wait, hit - 2**self._slept_through * _policy.shortest)
        else:
            self._slept_through = 0
        self._waits.append(wait)
        waits = sorted(self._waits)
        outliers = len(waits) // 8
        self.least, self.low, self.high = waits[0], waits[outliers], waits[-1 - outliers]
        self.regular = len(waits) >= 4 and self.high - self.low <= self.low / 4

    def note_wake_up(self, pause: float, late: float) -> None:
        """Notes how late a wake-up came: after a long sleep, a machine takes longer."""
        shortest = _policy.shortest
        if pause > 16 * shortest and late > 0:
            self._late += (min(late, 16 * shortest) - self._late) / 4

    def pause(self, waited: float) -> float:
        """Returns how long not to look, ``waited`` seconds into a wait."""
        shortest, longest = _policy.shortest, _policy.longest
        # About half of what asyncio.sleep(0.001) takes, as long as that is little.
        often = max(9 * shortest, waited / 1024)
        spread = self.high - self.low
        if self.regular:
            # Late wake-ups are made up for, and more so where they are very late: the longer
            # a machine sleeps, the less does it keep to a time.
            late = self._late + 2 * max(self._late - shortest, 0)
            near = self.low + min(spread / 2, shortest) - late
            pause = spread / 8 if waited < self.high + spread else min(waited / 4, often)
        else:
            near = min(self.least - self._late, waited + 4 * often)
            pause = min(max(waited, (self.low + self.high) / 2) / 2, often)
        self._slept = waited < near
        if self._slept:
            pause = near - waited
        return min(max(pause, shortest), longest)

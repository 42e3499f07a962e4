"""How event loops poll streams: the policy that the program has set."""

from __future__ import annotations

from dataclasses import dataclass

from .._arguments import check_number_of_seconds
from .._repr import short


@dataclass(frozen=True)
class PollPolicy:
    """How event loops watch streams. The defaults serve; measure before changing them.

    Attributes:
        shortest: The shortest time between two polls of a stream, in seconds. Wake-ups are late
            by about this much where waits on the stream resemble each other.
        longest: The longest time between two polls, in seconds. A wait that is much
            shorter than those before it may be noticed this late.
        blocking: Do not poll. For each stream with pending events a helper thread blocks in
            ``event.synchronize()``, and then wakes the loop. That costs a thread switch, and
            one poll a second in case the wake-up was lost. The thread ends soon after its last
            event, and an interpreter that exits waits for it. The loop still polls events that
            the program has recorded itself, as their streams are not known, and streams for
            which no thread can be started.

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
            check_number_of_seconds(getattr(self, name), f"{name} must be a number of seconds")
        if not 0 < self.shortest <= self.longest < float("inf"):
            raise ValueError(
                "intervals are seconds, with 0 < shortest <= longest, and finite; "
                f"not shortest={short(self.shortest)}, longest={short(self.longest)}"
            )


_policy = PollPolicy()


def policy() -> PollPolicy:
    """Returns the policy in force."""
    return _policy


def set_poll_policy(policy: PollPolicy) -> PollPolicy:
    """Sets how all event loops of the process watch streams, from their next poll on.

    Returns:
        The policy that was in force before.

    Raises:
        TypeError: ``policy`` is not a `PollPolicy`.
    """
    global _policy
    if not isinstance(policy, PollPolicy):
        raise TypeError(f"expected a PollPolicy, such as PollPolicy(), not {short(policy)}")
    before, _policy = _policy, policy
    return before

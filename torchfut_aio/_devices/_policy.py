"""How event loops poll streams: the policy that the program has set."""

from __future__ import annotations

from dataclasses import dataclass

from .._arguments import check_number_of_seconds
from .._repr import short


@dataclass(frozen=True, kw_only=True, slots=True)
class PollPolicy:
    """How event loops watch streams. The defaults serve; measure before changing them.

    Attributes:
        min_interval: The shortest time between two polls of a stream, in seconds. Wake-ups are late
            by about this much where waits on the stream resemble each other.
        max_interval: The longest time between two polls, in seconds. A wait that is much
            shorter than those before it may be noticed this late.
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
    """Return the policy in force."""
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
        raise TypeError(
            "set_poll_policy() takes a PollPolicy, such as PollPolicy(max_interval=0.001), "
            f"not {short(policy)}"
        )
    before, _policy = _policy, policy
    return before

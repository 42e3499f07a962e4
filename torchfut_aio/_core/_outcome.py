"""What a future completes with: a value or an error, as one object that travels.

Making an outcome may look at the value, ask devices for events, and fail; so it is made before
the future is claimed, in the thread that completes the future, and never raises. From then on
nothing about the outcome changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch

from .._devices import HOST_ONLY, Order, declared_order, found_order, joint_order

__all__ = ["Outcome", "joined_outcome", "outcome_of_error", "outcome_of_value"]


class Outcome:
    """A value, or an error with the traceback that it came with; and the value's readiness.

    ``readiness`` knows the kernels that may still fill the value; None if there are none.
    """

    __slots__ = ("__weakref__", "error", "readiness", "traceback", "value")

    value: Any
    error: BaseException | None
    traceback: TracebackType | None
    readiness: Order | None

    def read(self) -> Any:
        """Returns the value, or raises the error."""
        error = self.error
        if error is None:
            return self.value
        try:
            # A raised exception collects the frames that it passes. Each reader starts from the
            # traceback that it came with, so an error that is read often does not grow.
            raise error.with_traceback(self.traceback)
        finally:
            # The traceback of the error refers to this frame. Let that not refer to what holds
            # the error, or neither would go without the garbage collector.
            del self, error


def outcome_of_value(value: Any, devices: Sequence[torch.device] = ()) -> Outcome:
    """Returns the outcome of a future on ``devices`` that is completed with ``value`` here, now.

    The current streams are those on which kernels may still fill the value. If the devices take
    no more events, or the value is on a device that was not declared, this is an error's.
    """
    outcome = Outcome()  # not by a constructor: that would take longer than all of this
    outcome.value = value
    outcome.error = outcome.traceback = outcome.readiness = None
    if devices:
        outcome.readiness, outcome.error = declared_order(devices, value)
    elif type(value) not in HOST_ONLY:
        outcome.readiness, outcome.error = found_order(value)
    return outcome


def outcome_of_error(error: BaseException, devices: Sequence[torch.device] = ()) -> Outcome:
    """Returns the outcome of a future on ``devices`` that fails with ``error``."""
    outcome = Outcome()
    outcome.value = None
    outcome.error = error
    outcome.traceback = error.__traceback__
    # So that its callbacks run on dedicated streams, too.
    outcome.readiness = declared_order(devices, None)[0] if devices else None
    return outcome


def joined_outcome(value: Any, parts: Iterable[Outcome]) -> Outcome:
    """Returns the outcome whose value is made of those of ``parts``: ready when they are."""
    outcome = Outcome()
    outcome.value = value
    outcome.traceback = None
    outcome.readiness, outcome.error = joint_order(part.readiness for part in parts)
    return outcome

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

from .._devices import HOST_ONLY, Readiness, declared_readiness, found_readiness, joint_readiness


class Outcome:
    """A value that is ready, and the base of the others.

    Made without a constructor, which would take longer than all the rest.
    """

    __slots__ = ("value",)

    value: Any
    error: BaseException | None = None
    traceback: TracebackType | None = None  # that the error came with
    readiness: Readiness | None = None  # knows the kernels that may still fill the value

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


class _DeviceValue(Outcome):
    """A value that kernels may still fill."""

    __slots__ = ("readiness",)

    readiness: Readiness | None


class _Error(Outcome):
    """An error; the value is of no use."""

    __slots__ = ("__weakref__", "error", "readiness", "traceback")

    error: BaseException | None
    traceback: TracebackType | None
    readiness: Readiness | None


def outcome_of_value(value: Any, devices: Sequence[torch.device] = ()) -> Outcome:
    """Returns the outcome of a future on ``devices`` that is completed with ``value`` here, now.

    The current streams are those on which kernels may still fill the value. If the devices take
    no more events, or the value is on a device that was not declared, this is an error's.
    """
    if devices:
        return _outcome(value, *declared_readiness(devices, value))
    if type(value) not in HOST_ONLY:
        readiness, error = found_readiness(value)
        if readiness is not None or error is not None:
            return _outcome(value, readiness, error)
    outcome = Outcome()
    outcome.value = value
    return outcome


def _outcome(value: Any, readiness: Readiness | None, error: BaseException | None) -> Outcome:
    outcome: Outcome
    if error is not None:
        outcome = _Error()
        outcome.error = error
        outcome.traceback = error.__traceback__
        outcome.readiness = readiness
    elif readiness is not None:
        outcome = _DeviceValue()
        outcome.readiness = readiness
    else:
        outcome = Outcome()
    outcome.value = value
    return outcome


def outcome_of_error(error: BaseException, devices: Sequence[torch.device] = ()) -> Outcome:
    """Returns the outcome of a future on ``devices`` that fails with ``error``."""
    # With a readiness, so that its callbacks run on dedicated streams, too.
    return _outcome(None, declared_readiness(devices, None)[0] if devices else None, error)


def joined_outcome(value: Any, parts: Iterable[Outcome]) -> Outcome:
    """Returns the outcome whose value is made of those of ``parts``: ready when they are."""
    return _outcome(value, *joint_readiness(part.readiness for part in parts))

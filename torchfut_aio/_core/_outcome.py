"""The outcome of a future: a value or an error, as one object.

To make an outcome, it may be necessary to search the value and to record events on devices, and
that can fail. So the thread that completes the future makes the outcome before it claims the
future, and a failure makes an outcome with an error. After that an outcome never changes, except
that an error remembers whether it was retrieved. An error that was never retrieved is logged when
it is garbage-collected, as in asyncio.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from .._devices import (
    HOST_ONLY,
    Moment,
    Readiness,
    declared_readiness,
    found_readiness,
    joint_readiness,
)
from .._errors import CANCELLATIONS
from .._extension import speedup

if TYPE_CHECKING:
    from .._future import Future

_logger = logging.getLogger("torchfut_aio.unretrieved")


class Outcome:
    """A value that is ready; the base class of the others."""

    # No constructor: to call one would take longer than the other steps of `set_result`.
    __slots__ = ("value",)

    value: Any
    error: BaseException | None = None
    traceback: TracebackType | None = None  # of the error when it was set
    readiness: Readiness | None = None  # of the kernels that may still fill the value
    is_retrieved = True  # False for an error that has not been read

    def exception(self) -> BaseException | None:
        """Return the error, and mark it as retrieved; or return None if this is a value."""
        return None

    def mark_retrieved(self) -> None:
        """If this is an error, do not log it as never retrieved."""

    def read(self) -> Any:
        if self.error is None:
            return self.value
        error = self.exception()
        assert error is not None
        try:
            raise error
        finally:
            # The traceback of the error refers to this frame. If the frame referred to the error,
            # only the garbage collector could free them.
            del self, error


class _DeviceValue(Outcome):
    """A value that kernels may still fill."""

    __slots__ = ("readiness",)

    readiness: Readiness | None


class _Error(Outcome):
    """An error, and no value."""

    __slots__ = ("__weakref__", "error", "is_retrieved", "readiness", "traceback")

    error: BaseException | None
    traceback: TracebackType | None
    readiness: Readiness | None
    is_retrieved: bool

    def mark_retrieved(self) -> None:
        self.is_retrieved = True

    def exception(self) -> BaseException | None:
        self.is_retrieved = True
        assert self.error is not None
        # A raised exception collects the frames that it passes. Each reader starts from the
        # traceback that it came with, so an error that is read often does not grow.
        return self.error.with_traceback(self.traceback)

    def __del__(self) -> None:
        if getattr(self, "is_retrieved", True) or sys is None or sys.is_finalizing():
            return  # getattr, as an interrupt may have come before the attribute was set
        if not issubclass(type(self.error), CANCELLATIONS):
            _logger.error("The error of a future was never retrieved:", exc_info=self.error)


def outcome_of_value(
    value: Any, devices: Sequence[torch.device] = (), moment: Moment | None = None
) -> Outcome:
    """Return the outcome of a future on ``devices`` that is completed with ``value`` here and now.

    Kernels on the current streams may still fill the value. If the devices take no more events, or
    the value is on a device that was not declared, the outcome is an error. Values that are set at
    the same ``moment`` share events.
    """
    if devices:
        return _outcome(value, *declared_readiness(devices, value, moment or Moment()))
    if type(value) not in HOST_ONLY:
        readiness, error = found_readiness(value, moment or Moment())
        if readiness is not None or error is not None:
            return _outcome(value, readiness, error)
    outcome = Outcome()
    outcome.value = value
    return outcome


def _outcome(value: Any, readiness: Readiness | None, error: BaseException | None) -> Outcome:
    if error is not None:
        failure = _Error()
        failure.error = error
        failure.traceback = error.__traceback__
        failure.readiness = readiness
        failure.is_retrieved = False
        return failure
    outcome: Outcome
    if readiness is not None:
        outcome = _DeviceValue()
        outcome.readiness = readiness
    else:
        outcome = Outcome()
    outcome.value = value
    return outcome


def outcome_of_error(error: BaseException, devices: Sequence[torch.device] = ()) -> Outcome:
    # With a readiness, as callbacks of a failed future run on dedicated streams as well.
    return _outcome(
        None, declared_readiness(devices, None, Moment())[0] if devices else None, error
    )


@speedup
def outcomes_of_results(futures: Iterable[Future[Any]], results: Iterable[Any]) -> list[Outcome]:
    """Return the outcome that each future has here and now; an exception is an error."""
    outcomes = []
    moment = None
    for future, result in zip(futures, results, strict=True):
        devices = future._devices
        if type(result) in HOST_ONLY and not devices:  # as in Future.set_result()
            outcome = Outcome()
            outcome.value = result
        # Not isinstance(), which reads `__class__` and so could run the code of a proxy.
        elif issubclass(type(result), BaseException):
            outcome = outcome_of_error(result, devices)
        else:
            moment = moment or Moment()
            outcome = outcome_of_value(result, devices, moment)
        outcomes.append(outcome)
    return outcomes


def joined_outcome(value: Any, parts: Iterable[Outcome]) -> Outcome:
    """Return the outcome of a value made of those of ``parts``; it is ready when they are."""
    return _outcome(value, joint_readiness(part.readiness for part in parts), None)

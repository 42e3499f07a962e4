"""A `Promise` completes a future from a task, a thread or another library.

It is the only reference from there to the future. If it is garbage-collected, the future fails with
a CancelledError.
"""

from __future__ import annotations

from _thread import start_new_thread
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._devices import finish_devices
from .._errors import CancelledError, drop_catching_frame, own_cancellation
from .._repr import short
from .._threads import call_contained
from ._completion import outcome_of, try_complete_with_error, try_complete_with_value

if TYPE_CHECKING:
    from .._future import Future


class Promise:
    """Completes one future, unless it is done; errors show its ``name``."""

    __slots__ = ("__weakref__", "_future", "name")

    def __init__(self, future: Future[Any], name: str) -> None:
        self.name = name
        self._future: Future[Any] | None = future

    def keep(self, result: object) -> None:
        self._complete(result, try_complete_with_value, _complete_later)

    def fail(self, error: BaseException) -> None:
        self._complete(own_cancellation(error), try_complete_with_error, try_complete_with_error)

    def _complete(
        self, outcome: Any, complete: Callable[..., object], complete_later: Callable[..., object]
    ) -> None:
        future = self._future  # read once, as another thread may complete it at the same time
        if future is not None:
            try:
                complete(future, outcome)
            except BaseException:
                # An interrupt, or a full stack. The exception is the caller's, but the future may
                # be another thread's, so a new thread completes it.
                start_new_thread(call_contained, (complete_later, future, outcome))
                self._future = None  # `end` must not be faster than that thread
                raise
            # The traceback of an error leads through frames to this object, which must not lead
            # back to the future: the two would be a cycle.
            self._future = future = None

    def settle(
        self,
        read: Callable[[], object],
        translate: Callable[[BaseException], BaseException] = lambda error: error,
    ) -> None:
        """Complete the future with what ``read()`` returns, or with what it raises."""
        try:
            value = read()
        except BaseException as error:
            # `read` leads to the source, which may hold the error. The frames of the error lead
            # here.
            del read
            self.fail(translate(drop_catching_frame(error)))
        else:
            self.keep(value)

    def cancel(self, *why: object) -> None:
        """Complete the future with a CancelledError that says why."""
        reasons = [each if isinstance(each, str) else short(each) for each in why]
        text = ": ".join((f"{self.name} was cancelled", *reasons))
        self.fail(CancelledError(text))

    def end(self, _task: object = None) -> None:
        """Fail the future if it is pending: the task has ended without completing it."""
        future = getattr(self, "_future", None)  # None if `__init__` was interrupted
        if future is not None and outcome_of(future) is None:
            self.cancel(
                "before its first step, or because its event loop ended, or because nothing refers "
                "to what it waited for"
            )

    __del__ = end


def _complete_later(future: Future[Any], value: object) -> None:
    if outcome_of(future) is None:
        finish_devices()  # the streams that fill the value are current in another thread
        try_complete_with_value(future, value)

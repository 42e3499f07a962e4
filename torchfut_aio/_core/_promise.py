"""The only reference from what will complete a future to that future.

A task, a thread or a future of another library holds a `Promise`, and the promise holds the future
until that is done. Three guarantees follow:

1. A future does not wait for what has gone. If its promise is garbage-collected, the future fails
   with a CancelledError.
2. A future that has failed is freed with its error. The traceback of the error leads through frames
   to the promise, and the promise has let go of the future by then.
3. A promise that is kept is kept, as a callback that runs has run (``_callbacks.py``). If an
   interrupt or a full stack stops it halfway, a new thread completes the future, and the exception
   is raised.
"""

from __future__ import annotations

from _thread import start_new_thread
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._devices import finish_devices
from .._errors import CancelledError, drop_catching_frame, own_cancellation
from .._repr import short
from .._worker import call_contained
from ._completion import (
    outcome_of,
    try_complete_with_error,
    try_complete_with_value,
)

if TYPE_CHECKING:
    from .._future import Future


class Promise:
    """Completes one future, once, unless others have; ``name`` is what its errors call it."""

    __slots__ = ("__weakref__", "_future", "name")

    def __init__(self, future: Future[Any], name: str) -> None:
        self.name = name
        self._future: Future[Any] | None = future

    def keep(self, result: object) -> None:
        """Complete the future with a value."""
        future = self._future  # once, as another thread may keep or fail the promise meanwhile
        if future is not None:
            try:
                try_complete_with_value(future, result)
            except BaseException:
                start_new_thread(call_contained, (_complete_later, future, result))
                raise
            self._future = future = None

    def fail(self, error: BaseException) -> None:
        """Complete the future with an error."""
        future = self._future
        if future is not None:
            error = own_cancellation(error)
            try:
                try_complete_with_error(future, error)
            except BaseException:
                start_new_thread(call_contained, (try_complete_with_error, future, error))
                raise
            self._future = future = None

    def settle(
        self,
        read: Callable[[], object],
        translate: Callable[[BaseException], BaseException] = lambda error: error,
    ) -> None:
        """Complete the future with what ``read()`` returns, or with what that raises."""
        try:
            value = read()
        except BaseException as error:
            # `read` leads to the source, which may hold the error, whose frames lead here.
            del read
            self.fail(translate(drop_catching_frame(error)))
        else:
            self.keep(value)

    def is_pending(self) -> bool:
        """Return whether the future is not done yet."""
        future = self._future
        return future is not None and outcome_of(future) is None

    def cancel(self, *why: object) -> None:
        """Complete the future with a CancelledError that says why."""
        reasons = [each if isinstance(each, str) else short(each) for each in why]
        text = ": ".join((f"{self.name} was cancelled", *reasons))
        self.fail(CancelledError(text))

    def end(self, _task: object = None) -> None:
        """Fail the future if it is pending: what was to complete it has ended."""
        future = getattr(self, "_future", None)  # unless it was interrupted before it was whole
        if future is not None and outcome_of(future) is None:
            self.cancel_at_end()

    __del__ = end

    def cancel_at_end(self) -> None:
        """Complete the future when `end` finds it pending."""
        self.cancel(
            "before its first step, or because its event loop ended, or because nothing refers to "
            "what it waited for"
        )


def _complete_later(future: Future[Any], value: object) -> None:
    if outcome_of(future) is None:
        finish_devices()  # the streams that fill the value are current in another thread
        try_complete_with_value(future, value)

"""The child of ``then``: a future of what a callback returns or raises."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

from .._errors import callback_error, drop_catching_frame
from ._callbacks import DoneCallback
from ._completion import (
    is_cancelled,
    outcome_of,
    refuse_second,
    try_complete_with_error,
    try_complete_with_value,
)

if TYPE_CHECKING:
    from .._future import Future


class ThenCallback(DoneCallback):
    """Completes a child with what a function returns or raises, in the context of ``then()``."""

    __slots__ = ("_run", "child", "function")

    def __init__(self, function: Callable[[Any], object], child: Future[Any]) -> None:
        self.function = function
        self._run: Any = partial(copy_context().run, function)  # type: ignore[call-arg]
        self.child: Any = child

    def run(self, future: Future[Any]) -> None:
        try:
            result = self._run(future)
        except BaseException as error:
            outcome = outcome_of(future)
            if outcome is not None and error is outcome.error:
                # The callback has re-raised it. Restore the traceback, or every link of a chain
                # would add its frames.
                error.with_traceback(outcome.traceback)
            else:
                drop_catching_frame(error)
            is_first = try_complete_with_error(self.child, callback_error(error))
        else:
            is_first = try_complete_with_value(self.child, result)
        if not (is_first or is_cancelled(self.child)):
            refuse_second(self.child)
        # The child's error refers to the function's frame, and that to this object through its
        # callers. Without this line, only the garbage collector could free them.
        self.child = None

    def fail(self, _future: Future[Any], error: BaseException) -> None:
        child = self.child  # read once, as another thread may set it to None
        if child is not None:
            try_complete_with_error(child, error)

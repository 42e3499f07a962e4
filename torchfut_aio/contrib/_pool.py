"""Results of the pools of multiprocessing, which have no callbacks."""

from __future__ import annotations

from typing import Any

from .._adopt import AdoptedFuture, once, settle_in_thread
from .._core import Promise
from .._errors import drop_catching_frame


@once
def adopt(source: Any, future: AdoptedFuture[Any]) -> None:
    promise = Promise(future, "the adopted future")
    # settle() drops its own frame from the error's traceback, and this drops that of get(), which
    # refers to the source: the source keeps the error, so the two would be a cycle.
    if source.ready():
        promise.settle(source.get, drop_catching_frame)
    else:
        settle_in_thread(promise, source.get, drop_catching_frame)

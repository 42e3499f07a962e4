"""Results of the pools of multiprocessing: they tell only who blocks."""

from __future__ import annotations

from typing import Any

from .._core import Promise
from .._dependent import DependentFuture
from .._errors import drop_catching_frame
from ._registry import adopts, once
from ._threads import settle_in_thread


@adopts("multiprocessing.pool.AsyncResult")
@once
def _from_pool(source: Any, future: DependentFuture[Any]) -> None:
    promise = Promise(future, "the adopted future")
    if source.ready():
        promise.settle(source.get, drop_catching_frame)
    else:
        # The frame of get(), too, as it refers to the source, which keeps the error.
        settle_in_thread(promise, source.get, drop_catching_frame)

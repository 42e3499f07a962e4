"""Results of the pools of multiprocessing: they tell only who blocks."""

from __future__ import annotations

from typing import Any

from .._core import Promise
from .._dependent import DependentFuture
from ._registry import adopts, once
from ._threads import settle_in_thread


@adopts("multiprocessing.pool.AsyncResult")
@once
def _from_pool(source: Any, future: DependentFuture[Any]) -> None:
    promise = Promise(future, "the adopted future")
    if source.ready():
        promise.settle(source.get)
    else:
        settle_in_thread(promise, source.get)

"""Results of the pools of multiprocessing: they tell only who blocks."""

from __future__ import annotations

from typing import Any

from .._future import Future
from ._registry import adopts, copy_outcome, once
from ._threads import complete_in_thread


@adopts("multiprocessing.pool.AsyncResult")
@once
def _from_pool(source: Any, future: Future[Any]) -> None:
    if source.ready():
        copy_outcome(source.get, future)
    else:
        complete_in_thread(future, lambda future: copy_outcome(source.get, future))

"""Futures of a dask client, which has an event loop: in a thread of its own, or here."""

from __future__ import annotations

import asyncio
from typing import Any

from .._dependent import DependentFuture
from ._registry import Adoption, adopts, once


@adopts("distributed.client.Future")
@once
def _from_dask(source: Any, future: DependentFuture[Any]) -> None:
    # Only on its client's loop can one be awaited.
    waiting, loop = _wait_for(source), source.client.loop.asyncio_loop
    try:
        task = asyncio.run_coroutine_threadsafe(waiting, loop)
    except BaseException:
        waiting.close()
        raise
    task.add_done_callback(Adoption(task, future).callback())
    if loop.is_closed():  # perhaps within this, and then nobody runs the task
        task.cancel()


async def _wait_for(source: Any) -> Any:
    return await source

"""Futures of a dask client. Only a task on the client's loop can await one."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from .._adopt import AdoptedFuture, once


# While the coroutine keeps the source, its id is unique.
@partial(once, identity=id)
def adopt(source: Any, future: AdoptedFuture[Any]) -> None:
    waiting, loop = _wait_for(source), source.client.loop.asyncio_loop
    try:
        task = asyncio.run_coroutine_threadsafe(waiting, loop)
    except BaseException:
        waiting.close()
        raise
    task.add_done_callback(future.callback())
    # Check *after* the call: a loop that has closed during it never runs the task.
    if loop.is_closed():
        task.cancel()


async def _wait_for(source: Any) -> Any:
    return await source

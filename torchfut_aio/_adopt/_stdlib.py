"""Futures of the standard library."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

from .._cpython import running_loop
from .._future import Future
from ._registry import adopts, copy_outcome, once


@adopts("concurrent.futures.Future")
@once
def _from_concurrent(source: concurrent.futures.Future[Any], future: Future[Any]) -> None:
    source.add_done_callback(lambda source: copy_outcome(source.result, future))


@adopts("asyncio.Future", "asyncio.Task")
@once
def _from_asyncio(source: asyncio.Future[Any], future: Future[Any]) -> None:
    def copy(source: asyncio.Future[Any]) -> None:
        copy_outcome(source.result, future)

    loop = source.get_loop()
    if source.done():
        copy(source)
    elif running_loop() is loop:
        source.add_done_callback(copy)
    else:
        # Only the thread of its loop may touch a pending future of asyncio.
        try:
            loop.call_soon_threadsafe(source.add_done_callback, copy)
        except RuntimeError as error:
            if not source.done():
                raise RuntimeError(
                    f"{source!r} is pending on a loop that has closed: it will never complete"
                ) from error
            copy(source)

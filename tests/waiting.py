"""Waits, as tests see them: for device work, for events, and in streams."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel

from torchfut_aio import ValueStream, poll_statistics
from torchfut_aio.serving._stream import state_of

from .threads import PATIENCE


async def polled(times: int = 5) -> None:
    """Return when the watcher of this loop has polled ``times`` more times."""
    enough = poll_statistics().polls + times
    with anyio.fail_after(PATIENCE):
        while poll_statistics().polls < enough:  # noqa: ASYNC110
            await anyio.sleep(0.001)


async def pending(waits: int) -> None:
    """Return when the number of pending waits on this loop is ``waits``."""
    with anyio.fail_after(PATIENCE):
        while poll_statistics().pending != waits:
            await anyio.lowlevel.checkpoint()


def waiting(stream: ValueStream[Any]) -> tuple[int, int]:
    """Return how many tasks and threads wait for a value of the stream, and for room in it."""
    state = state_of(stream)
    return len(state.readers.waiting), len(state.writers.waiting)


async def eventually(condition: Callable[[], bool]) -> None:
    """Like `until`, for async code; between two checks, the loop has no callback of this task."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, "timed out"
        await anyio.sleep(0.001)


class Reader:
    """Awaits an object in a task, and stores the result or the error."""

    def __init__(self, awaitable: Any) -> None:
        self.awaitable = awaitable
        self.outcome: Any = None

    async def __call__(self) -> None:
        try:
            self.outcome = await self.awaitable
        except Exception as error:
            self.outcome = error

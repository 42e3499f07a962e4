"""An event loop in a separate thread, for async code that PyTorch's C++ threads call.

It starts with the first call and runs until it is closed, at the latest when the interpreter exits:
async code may keep locks and connections between calls, and those belong to a loop.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from threading import get_ident
from typing import Any

import torch

from .._core import Promise
from .._cpython import threads_within
from .._tasks import run_contained
from .._threads import LoopThread, WorkerThread, call_contained

_NAME = "torchfut_aio background loop"
_TIMEOUT = 10.0  # seconds for cancelled tasks to end
_BLOCKS_ITSELF = (
    f"backward() blocks the thread of the {_NAME}, which has to run a DDP hook; "
    "call it by await anyio.to_thread.run_sync(loss.backward)"
)

_logger = logging.getLogger("torchfut_aio")


def start_soon(promise: Promise, func: Callable[..., Awaitable[Any]], *args: object) -> None:
    """Run ``func(*args)`` as a task of the background loop, which completes ``promise``.

    Raises:
        RuntimeError: No thread could be started; the future stays pending.
    """
    _background.submit(promise, (func, args))


def check_that_it_may_be_waited_for() -> None:
    """Raise RuntimeError if a wait of the calling thread for the loop would never end."""
    if sys.is_finalizing():
        raise RuntimeError(f"the {_NAME} does not run any more: the interpreter exits")
    if get_ident() in _thread_ids():
        raise RuntimeError(_BLOCKS_ITSELF)


def check_that_no_backward_blocks_it() -> None:
    """Raise RuntimeError if a call of ``backward()`` blocks the loop."""
    # On an accelerator, PyTorch calls hooks in another thread, for which backward() waits.
    if not _thread_ids().isdisjoint(threads_within(torch.autograd.backward)):
        raise RuntimeError(_BLOCKS_ITSELF)


def _thread_ids() -> set[int | None]:
    return {thread.ident for thread in _background.threads()}


def is_running() -> bool:
    return bool(_background.threads())


def close() -> None:
    """Cancel the tasks of the background loop, wait until they have ended, and end the thread.

    Tasks that do not end in time are left. Later calls start another loop.
    """
    # Twice, as a new thread may continue with calls that had no task yet.
    if not (_background.end(_TIMEOUT) and _background.end(_TIMEOUT)):
        _logger.warning("the %s still runs cancelled tasks: %s", _NAME, _background.names())


class _Background(LoopThread):
    """Runs until it is closed; ``work`` maps promises to calls that have no task yet."""

    def __init__(self) -> None:
        super().__init__(_NAME, _new_loop)
        self._tasks: dict[asyncio.Task[None], bool] = {}  # whether they have been cancelled

    def run(self, thread: WorkerThread) -> None:
        # Not the tasks of the previous loop, which may be the loop of a forked child's parent.
        self._tasks = {}
        super().run(thread)

    def names(self) -> str:
        return ", ".join(task.get_name() for task in [*self._tasks])

    async def step(self, thread: WorkerThread) -> bool:
        for promise in self.take():
            call = self.work.pop(promise, None)
            if call is not None:
                task = asyncio.create_task(run_contained(promise, *call), name=promise.name)
                self._tasks[task] = False
                task.add_done_callback(self._tasks.pop)
                task.add_done_callback(promise.end)
        if not thread.should_end:
            return True
        # Let new tasks take their first step. A task that is cancelled before that runs no code, so
        # its future could not say why it was cancelled.
        await asyncio.sleep(0)
        for task, was_cancelled in [*self._tasks.items()]:
            if not was_cancelled:
                self._tasks[task] = True
                task.add_done_callback(lambda _: self.woken.set())
                task.cancel(f"the {_NAME} was shut down")
        return bool(self._tasks)

    def fail(self, promise: Promise, error: Exception) -> None:
        if self.work.pop(promise, None) is not None:
            call_contained(promise.fail, error)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.SelectorEventLoop()
    return uvloop.new_event_loop()


_background = _Background()

"""An event loop in a thread of its own, for async code that PyTorch's C++ threads call for.

It starts with the first call, and lives on until it is closed, at the latest when the
interpreter exits: what async code keeps between calls, such as locks and connections,
belongs to a loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import importlib.util
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio

from ._future import Future
from ._tasks import Promise, run

__all__ = ["close", "is_running", "start_soon"]

_NAME = "torchfut_aio background loop"


class _Running:
    """The loop, from when its thread starts until that ends."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        # A daemon, so that the interpreter gets to where it closes this.
        self.thread = threading.Thread(target=self._run, args=(started,), name=_NAME, daemon=True)
        self.thread.start()
        started.result()

    def _run(self, started: concurrent.futures.Future[None]) -> None:
        options = {"use_uvloop": importlib.util.find_spec("uvloop") is not None}
        try:
            anyio.run(self._serve, started, backend_options=options)
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    async def _serve(self, started: concurrent.futures.Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        started.set_result(None)
        await self._closing.wait()
        for task in self._tasks:
            task.cancel(f"the {_NAME} was shut down before {task.get_name()} was done")
        while self._tasks:
            await asyncio.wait(self._tasks)

    def call(self, promise: Promise, func: Callable[..., Awaitable[Any]], args: Any) -> None:
        # In a context of its own: that of the calling thread is none of its business.
        self._loop.call_soon_threadsafe(
            self._spawn, promise, func, args, context=contextvars.Context()
        )

    def _spawn(self, promise: Promise, func: Callable[..., Awaitable[Any]], args: Any) -> None:
        task = self._loop.create_task(_contained(promise, func, args), name=promise.name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)


async def _contained(promise: Promise, func: Callable[..., Awaitable[Any]], args: Any) -> None:
    # What would end the loop is for those who read the future.
    with suppress(KeyboardInterrupt, SystemExit):
        await run(promise, func, args)


# Held while a call is handed over, so that none comes to a loop that has been closed; no
# future is completed meanwhile.
_lock = threading.Lock()
_running: _Running | None = None


def start_soon(
    future: Future[Any], func: Callable[..., Awaitable[Any]], *args: object, name: str
) -> None:
    """Has the background loop run ``func(*args)`` as a task, to complete ``future``."""
    global _running
    promise = Promise(future, name)
    with _lock:
        if _running is None:
            _running = _Running()
        _running.call(promise, func, args)


def is_running() -> bool:
    """Tells whether there is a loop to close."""
    return _running is not None


def close(timeout: float | None = 10.0) -> None:
    """Cancels what runs on the background loop, waits for it, and ends the thread.

    It waits ``timeout`` seconds at most. What is called for after that starts another.
    """
    global _running
    with _lock:
        running, _running = _running, None
        if running is not None:
            running.close()
    if running is not None and running.thread is not threading.current_thread():
        running.thread.join(timeout)


def _forget() -> None:
    global _lock, _running
    _lock, _running = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

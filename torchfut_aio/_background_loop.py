"""An event loop in a thread of its own, for async code that PyTorch's C++ threads call for.

It starts with the first call, and lives on until it is closed, at the latest when the
interpreter exits: what async code keeps between calls, such as locks and connections,
belongs to a loop.

No lock is taken: a finaliser may call in the middle of any step. A call enters a deque, and
then somebody is told. If there is no thread, which a token stands for, that is a new one;
else the loop, unless it has yet to start, when it looks anyway. A thread that ends gives its
token back, and looks once more.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib.util
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio

from ._future import Future
from ._tasks import Promise, run_contained

__all__ = ["close", "is_running", "start_soon"]

_NAME = "torchfut_aio background loop"
_PATIENCE = 10.0  # seconds for what has been cancelled to end

_logger = logging.getLogger("torchfut_aio")

_Call = tuple[Promise, Callable[..., Awaitable[Any]], tuple[Any, ...]]

_calls: deque[_Call] = deque()
_token = [None]
_running: _Running | None = None


def start_soon(
    future: Future[Any], func: Callable[..., Awaitable[Any]], *args: object, name: str
) -> None:
    """Has the background loop run ``func(*args)`` as a task, to complete ``future``."""
    call = Promise(future, name), func, args
    _calls.append(call)
    try:
        _see_to_calls()
    except BaseException:  # no thread could be started
        with suppress(ValueError):
            _calls.remove(call)
        raise


def is_running() -> bool:
    """Tells whether there is a loop to close."""
    return _running is not None


def close() -> None:
    """Cancels what runs on the background loop, waits for it, and ends the thread.

    What does not end for that is waited for a while, and then left. What is called for later
    starts another loop. A signal handler or a finaliser that interrupts who starts the thread
    cannot wait for it: then the thread ends by itself.
    """
    running = _running
    if running is None:
        return
    running.close()
    if running.thread is not threading.current_thread() and running.can_be_joined():
        running.thread.join(_PATIENCE)
        if running.thread.is_alive():
            _logger.warning("the %s still runs what was cancelled: %s", _NAME, running.names())


def _see_to_calls() -> None:
    global _running
    try:
        _token.pop()
    except IndexError:
        running = _running
        if running is not None:
            running.ring()
        return
    _running = running = _Running()
    try:
        running.start()
    except BaseException:
        _running = None
        _token.append(None)
        raise


class _Running:
    """The loop, from when its thread starts until that ends."""

    def __init__(self) -> None:
        # A daemon, so that the interpreter gets to where it closes this.
        self.thread = threading.Thread(target=self._run, name=_NAME, daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._rung = False
        self._is_to_close = False
        # Of the thread that makes this and starts the other, until it has.
        self._starter: int | None = threading.get_ident()
        self._joinable = False

    def start(self) -> None:
        """Starts the thread."""
        try:
            self.thread.start()
            self._joinable = True
        finally:
            self._starter = None

    def can_be_joined(self) -> bool:
        """Waits until the thread can be joined; returns False if it cannot get there."""
        give_up = time.monotonic() + _PATIENCE
        # A signal handler may call in the middle of any step, this one included: no lock.
        while not self._joinable and self._starter not in (None, threading.get_ident()):
            if time.monotonic() > give_up:
                return False
            time.sleep(0.0005)
        return self._joinable

    def ring(self) -> None:
        """Has the loop look at what there is to do, from any thread."""
        # As an Inbox: what is to be seen has been written before, and it is read after.
        if self._loop is not None and not self._rung:
            self._rung = True
            with suppress(RuntimeError):  # it has closed, and the thread will look
                # In no one's context: the first to ring has nothing to do with the others.
                self._loop.call_soon_threadsafe(self._look, context=contextvars.Context())

    def close(self) -> None:
        self._is_to_close = True
        self.ring()

    def names(self) -> str:
        return ", ".join(task.get_name() for task in list(self._tasks))

    def _run(self) -> None:
        global _running
        self._joinable = True
        try:
            options = {"use_uvloop": importlib.util.find_spec("uvloop") is not None}
            anyio.run(self._serve, backend_options=options)
        finally:
            _running = None
            _token.append(None)
            if _calls:
                _see_to_calls()

    async def _serve(self) -> None:
        self._closing = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        contextvars.Context().run(self._look)
        await self._closing.wait()
        await asyncio.sleep(0)  # what has just begun takes a step, and can say why it ended
        for task in self._tasks:
            task.cancel(f"the {_NAME} was shut down")
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _look(self) -> None:
        self._rung = False
        assert self._loop is not None
        while (call := _next_call()) is not None:
            promise, func, args = call
            task = self._loop.create_task(run_contained(promise, func, args), name=promise.name)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(promise.end)
        if self._is_to_close:
            self._closing.set()


def _next_call() -> _Call | None:
    # Not by looking first: taking out locks the deque where there is no GIL, so a call that is
    # not seen here comes from one who sees what this thread has written before.
    try:
        return _calls.popleft()
    except IndexError:
        return None


def _forget() -> None:
    global _running
    _running = None
    _token[:] = [None]
    _calls.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

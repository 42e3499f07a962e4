"""An event loop in a thread of its own, for async code that PyTorch's C++ threads call.

It starts with the first call and lives until it is closed, at the latest when the interpreter
exits: async code may keep locks and connections between calls, and those belong to a loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib.util
import logging
import sys
from collections.abc import Awaitable, Callable
from threading import get_ident
from typing import Any

import anyio
import torch

from .._core import Promise
from .._cpython import threads_within
from .._tasks import run_contained
from .._worker import Worker, WorkerThread, call_contained

_NAME = "torchfut_aio background loop"
_PATIENCE = 10.0  # seconds for cancelled tasks to end
_BLOCKS_ITSELF = (
    f"backward() blocks the thread of the {_NAME}, which has to run a DDP hook meanwhile; "
    "call it by await anyio.to_thread.run_sync(loss.backward)"
)

_logger = logging.getLogger("torchfut_aio")


def start_soon(promise: Promise, func: Callable[..., Awaitable[Any]], *args: object) -> None:
    """Has the background loop run ``func(*args)`` as a task, to keep ``promise``.

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
    """Raise RuntimeError if a call of ``backward()`` blocks the loop.

    On an accelerator, PyTorch calls hooks in a thread of its own, for which ``backward()`` waits.
    """
    if not _thread_ids().isdisjoint(threads_within(torch.autograd.backward)):
        raise RuntimeError(_BLOCKS_ITSELF)


def _thread_ids() -> set[int | None]:
    return {thread.ident for thread in _background.threads()}


def is_running() -> bool:
    """Tells whether there is a loop to close."""
    return bool(_background.threads())


def close() -> None:
    """Cancels the tasks of the background loop, waits until they have ended, and ends the thread.

    It leaves tasks that do not end in time. Later calls start another loop. A signal handler or a
    finaliser that interrupts the start of the thread cannot wait: then the thread ends by itself.
    """
    # Twice, as another thread may take over the calls that had no task yet.
    if not (_background.end(_PATIENCE) and _background.end(_PATIENCE)):
        _logger.warning("the %s still runs what was cancelled: %s", _NAME, _background.names())


class _Background(Worker):
    """Runs the loop. The work is the promises of the calls that have no task yet."""

    def __init__(self) -> None:
        super().__init__(_NAME)
        self._running: _Running | None = None

    def has_to_know(self, _promise: Promise) -> bool:
        running = self._running
        return running is not None and not running.is_rung

    def ring(self) -> None:
        running = self._running
        if running is not None:
            running.ring()

    def names(self) -> str:
        """Returns the names of the tasks that run."""
        running = self._running
        return "" if running is None else ", ".join(t.get_name() for t in [*running.tasks])

    def serve(self, thread: WorkerThread) -> None:
        options = {"use_uvloop": importlib.util.find_spec("uvloop") is not None}
        try:
            anyio.run(self._serve, thread, backend_options=options)
        except Exception as error:  # there is no memory, or no descriptor for a loop
            self._fail_calls(error)
        finally:
            self._running = None

    def _fail_calls(self, error: Exception) -> None:
        for promise in [*self.work]:
            if self.work.pop(promise, None):
                call_contained(promise.fail, error)

    async def _serve(self, thread: WorkerThread) -> None:
        self._running = running = _Running(self, thread)
        contextvars.Context().run(running.make_tasks)
        await running.until_closed()


class _Running:
    """The loop, from when it begins to run until it is closed."""

    def __init__(self, worker: Worker, thread: WorkerThread) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self.is_rung = False
        self._worker = worker
        self._thread = thread
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        self._has_ended = False

    def ring(self) -> None:
        """Has the loop call `make_tasks`, from any thread."""
        # As in Loop.post: the caller has written its call before, and the loop reads it after.
        try:
            self.is_rung = True
            self._call_soon()
        except BaseException:  # Ctrl-C; but other threads may have seen is_rung
            self.is_rung = False
            self._call_soon()
            raise

    def _call_soon(self) -> None:
        try:
            # In an empty context: the loop serves other callers than the one that rings.
            self._loop.call_soon_threadsafe(self.make_tasks, context=contextvars.Context())
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            # The thread will look at the work again.

    def make_tasks(self) -> None:
        """Makes tasks of the new calls; begins to close if the thread is to end."""
        self.is_rung = False
        if self._has_ended:  # the loop is closing, and might not run the tasks; another thread does
            return
        for promise in self._worker.take():
            call = self._worker.work.pop(promise, None)
            if call is not None:
                coroutine = run_contained(promise, *call)
                task = self._loop.create_task(coroutine, name=promise.name)
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)
                task.add_done_callback(promise.end)
                if self._closing.is_set():
                    self._loop.call_soon(_cancel, task)
        if self._thread.is_to_end:
            self._closing.set()

    async def until_closed(self) -> None:
        """Serves until the thread is to end, and cancels the tasks then."""
        await self._closing.wait()
        await asyncio.sleep(0)  # new tasks take their first step, and can say why they ended
        for task in [*self.tasks]:
            _cancel(task)
        while self.tasks:
            await asyncio.wait(self.tasks)
        self._has_ended = True


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel(f"the {_NAME} was shut down")


_background = _Background()

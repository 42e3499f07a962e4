"""An event loop in a thread of its own, for async code that PyTorch's C++ threads call for.

It starts with the first call, and lives on until it is closed, at the latest when the
interpreter exits: what async code keeps between calls, such as locks and connections,
belongs to a loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib.util
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio

from ._future import Future
from ._tasks import Promise, run_contained
from ._worker import Worker, WorkerThread, call_contained

__all__ = ["close", "is_running", "start_soon"]

_NAME = "torchfut_aio background loop"
_PATIENCE = 10.0  # seconds for what has been cancelled to end

_logger = logging.getLogger("torchfut_aio")


def start_soon(
    future: Future[Any], func: Callable[..., Awaitable[Any]], *args: object, name: str
) -> None:
    """Has the background loop run ``func(*args)`` as a task, to complete ``future``.

    Raises:
        RuntimeError: No thread could be started; the future stays pending.
    """
    _background.submit(Promise(future, name), (func, args))


def is_running() -> bool:
    """Tells whether there is a loop to close."""
    return bool(_background.threads())


def close() -> None:
    """Cancels what runs on the background loop, waits for it, and ends the thread.

    What does not end for that is waited for a while, and then left. What is called for later
    starts another loop. A signal handler or a finaliser that interrupts whoever starts the thread
    cannot wait for it: then the thread ends by itself.
    """
    # Twice, as what was called for before may go to a thread that takes over.
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
        contextvars.Context().run(running.look)
        await running.until_closed()


class _Running:
    """The loop, from when it begins to run until it is closed."""

    def __init__(self, worker: Worker, thread: WorkerThread) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self._worker = worker
        self._thread = thread
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        self.is_rung = False

    def ring(self) -> None:
        """Has the loop look at what there is to do, from any thread."""
        # As in Loop.post: what is to be seen has been written before, and it is read after.
        try:
            self.is_rung = True
            self._call_look_soon()
        except BaseException:  # Ctrl-C; but others may have seen that it was rung
            self.is_rung = False
            self._call_look_soon()
            raise

    def _call_look_soon(self) -> None:
        with suppress(RuntimeError):  # it has closed, and the thread will look again
            # In no one's context: the first to ring has nothing to do with the others.
            self._loop.call_soon_threadsafe(self.look, context=contextvars.Context())

    def look(self) -> None:
        """Makes tasks of the calls that are new; begins to close if the thread is to end."""
        self.is_rung = False
        for promise in self._worker.take():
            call = self._worker.work.pop(promise, None)
            if call is not None:
                coroutine = run_contained(promise, *call)
                task = self._loop.create_task(coroutine, name=promise.name)
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)
                task.add_done_callback(promise.end)
                if self._closing.is_set():
                    self._loop.call_soon(self._cancel, task)
        if self._thread.is_to_end:
            self._closing.set()

    async def until_closed(self) -> None:
        """Serves until the thread is to end, and cancels the tasks then."""
        await self._closing.wait()
        await asyncio.sleep(0)  # what has just begun takes a step, and can say why it ended
        for task in [*self.tasks]:
            self._cancel(task)
        while self.tasks:
            await asyncio.wait(self.tasks)

    def _cancel(self, task: asyncio.Task[None]) -> None:
        task.cancel(f"the {_NAME} was shut down")


_background = _Background()

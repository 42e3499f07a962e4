"""How a completion, in any thread, reaches a task that waits on an event loop.

One file a kind of loop, and one interface, `Loop`. A task that waits makes a *waiter*,
leaves it where the completing thread will find it, and parks. The completing thread
calls ``waiter.wake()``; nothing else crosses threads.

What has to be looked at now and then gets an `Alarm`, so that the loop drives it.

Nothing here knows what a future is, or a device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

from .._cpython import running_loop
from . import _asyncio
from ._thread import ThreadWaiter

__all__ = [
    "Alarm",
    "Loop",
    "ThreadWaiter",
    "Waiter",
    "current",
    "current_asyncio",
    "loop_in_this_thread",
]


class Waiter(Protocol):
    """One wait of a task or a thread."""

    def wake(self) -> None:
        """Wakes it, from any thread; does nothing if it is awake, or has gone."""


class TaskWaiter(Waiter, Iterable[Any], Protocol):
    """One wait of a task: ``yield from waiter`` suspends it until it is woken, or cancelled."""


class Loop(Protocol):
    """A running event loop, as the tasks that wait on it see it."""

    def checkpoint(self) -> Iterable[Any]:
        """Does what an await that need not wait does on this loop; for ``yield from``."""

    def waiter(self) -> TaskWaiter:
        """Returns a waiter, hashable, for one wait of the current task."""

    def wake_later(self, waiter: Any, found: int) -> bool:
        """Wakes ``waiter`` in a moment, if after ``found`` arrivals that is best; or returns False.

        It is where arrivals come faster than tasks can be woken for each. For the loop's own
        thread.
        """

    watcher: Any
    """What the device side keeps for this loop."""

    def alarm(self, function: Callable[[], None]) -> Alarm:
        """Returns an alarm that is not set; for the loop's own thread."""

    def call_soon(self, function: Callable[[], None]) -> None:
        """Has the loop call ``function``, from any thread; does nothing if it has closed."""

    def spawn(
        self,
        ended: Callable[[], None],
        function: Callable[..., Coroutine[Any, Any, None]],
        *args: object,
    ) -> None:
        """Runs an async function, which must not raise, in the loop's own thread.

        The loop calls ``ended`` when the task has ended, also if it was cancelled before its
        first step. It cannot if it closes before: then it drops both. asyncio does not keep the
        task: what it waits for has to, or else it may be dropped.
        """


class Alarm(Protocol):
    """Calls a function on the loop when its time has come. Not to be used in other threads.

    From when it is made until it is closed, something is registered with the loop.
    """

    def set(self, seconds: float, /) -> None:
        """Calls the function in so many seconds, or never, and not when last set to.

        It may go on calling the function when its time has come until it is set again.
        """

    def close(self) -> None:
        """Calls nothing any more, and leaves nothing with the loop."""


def _in_trio_task() -> bool:
    # trio is asked only if somebody imported it, and all of it: while another thread
    # is still importing it, no task of its own can be running.
    in_trio_task = getattr(sys.modules.get("trio.lowlevel"), "in_trio_task", None)
    return in_trio_task is not None and in_trio_task()


def current() -> Loop:
    """Returns the loop that runs the calling task.

    In trio's guest mode a host loop runs in the same thread; a task that trio runs is
    trio's, so trio is asked first.

    Raises:
        RuntimeError: No event loop runs here.
    """
    if "trio" in sys.modules and _in_trio_task():
        from . import _trio

        return _trio.current()
    loop = current_asyncio()
    if loop is None:
        raise RuntimeError(
            "no asyncio, uvloop or trio event loop runs here to await a torchfut_aio "
            "future on; use wait() in code that is not asynchronous"
        )
    return loop


def current_asyncio() -> _asyncio.AsyncioLoop | None:
    """Returns the asyncio or uvloop loop that runs in this thread, if one does."""
    loop = running_loop()
    return None if loop is None else _asyncio.current(loop)


def loop_in_this_thread() -> bool:
    """Tells whether blocking the calling thread would block an event loop."""
    return running_loop() is not None or _in_trio_task()

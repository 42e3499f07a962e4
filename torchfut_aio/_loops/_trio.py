"""Tasks on trio's loop, also in its guest mode; a waiter refers to the sleeping task.

``_loop.py`` imports this module once a program has imported trio.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator, Iterable
from typing import Any

import trio

from .._cpython import is_inner, place_of, running_loop
from ._alarm import TimerFd
from ._loop import AsyncFunction, Loop
from ._waker import Waiter

_ALARM = "torchfut_aio alarm"  # the name of tasks that wait for a time


class _Waiter:
    """One wait; ``task`` is None unless the task sleeps or is about to sleep."""

    __slots__ = ("task", "woken")

    def __init__(self) -> None:
        self.task: trio.lowlevel.Task | None = None
        self.woken = False

    def __iter__(self) -> Generator[Any, Any, None]:
        if self.woken:
            return
        try:
            self.task = task = trio.lowlevel.current_task()
            # trio resets this when the task is rescheduled. So `resume` does not reschedule twice,
            # which trio forbids.
            task.custom_sleep_data = self
            yield from trio.lowlevel.wait_task_rescheduled(self._abort).__await__()  # noqa: ASYNC105
        finally:
            self.task = None  # it runs now, and may sleep elsewhere next
        if not self.woken:
            raise RuntimeError(
                "other code has rescheduled a task that awaits a torchfut_aio future; only the "
                "future or a cancellation may wake it"
            )

    __await__ = __iter__

    def _abort(self, _raise_cancel: Callable[[], Any]) -> trio.lowlevel.Abort:
        # Without `task`, a signal handler cannot wake the task from here on. One may have done so
        # before: then the cancellation has failed.
        task, self.task = self.task, None
        sleeps = task is not None and task.custom_sleep_data is self
        return trio.lowlevel.Abort.SUCCEEDED if sleeps else trio.lowlevel.Abort.FAILED


class TrioLoop(Loop):
    """One ``trio.run``."""

    __slots__ = ("_process", "_token")

    cancelled = trio.Cancelled

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        super().__init__()
        self._process = os.getpid()
        self._token = token

    # ------------------------------------------------------------- in any thread

    def wake(self, waiter: _Waiter, /) -> None:
        if waiter.task is not None and self._can_resume(waiter.task):
            self.resume(waiter)
        else:
            super().wake(waiter)

    def _can_resume(self, task: trio.lowlevel.Task) -> bool:
        """Return True if the caller may reschedule ``task`` itself."""
        # Only while trio runs a task of this very run: in guest mode, callbacks of the host share
        # the thread, and trio may be asleep. And not if the caller is a signal handler or a
        # finaliser in the waiting task itself, which may be about to sleep.
        return (
            trio.lowlevel.in_trio_task()
            and trio.lowlevel.current_trio_token() is self._token
            and trio.lowlevel.current_task() is not task
        )

    def call_soon(self, function: Callable[[], object]) -> bool:
        # A forked child does not run the parent's tasks. And another thread of the parent may have
        # held the token's lock at the fork. In the child, nothing would release it.
        if os.getpid() != self._process:
            return False
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            return False
        return True

    def stands_still(self) -> bool:
        return (
            trio.lowlevel.in_trio_task()
            and trio.lowlevel.current_trio_token() is self._token
            and _in_asyncio_within_trio()
        )

    def describe(self, waiter: _Waiter, /) -> Waiter:
        task = waiter.task
        if task is None:
            return Waiter(kind="task", name=None)
        return Waiter(kind="task", name=task.name, where=place_of(task.coro))

    # ------------------------------------------------------ in the loop's own thread

    def new_waiter(self) -> _Waiter:
        return _Waiter()

    def resume(self, waiter: _Waiter) -> None:
        waiter.woken = True  # if the task has yet to wait, it returns at once
        task = waiter.task
        if task is not None and task.custom_sleep_data is waiter:
            trio.lowlevel.reschedule(task)

    def checkpoint(self) -> Iterable[Any]:
        return trio.lowlevel.checkpoint().__await__()  # noqa: ASYNC105

    def current_task_name(self) -> str | None:
        return trio.lowlevel.current_task().name

    def spawn(self, ended: Callable[[], None], function: AsyncFunction, *args: object) -> None:
        async def run() -> None:  # trio lets every task take its first step
            try:
                await function(*args)
            finally:
                ended()

        trio.lowlevel.spawn_system_task(run, name=function)

    def watch(self, timer: TimerFd, function: Callable[[TimerFd], object]) -> None:
        trio.lowlevel.spawn_system_task(self._watch, timer, function, name=_ALARM)

    def unwatch(self, timer: TimerFd) -> None:
        try:
            trio.lowlevel.notify_closing(timer.value)
        except RecursionError:
            raise
        except RuntimeError:  # the run has ended, and its tasks with it
            pass

    def call_later(self, seconds: float, function: Callable[[], object]) -> trio.CancelScope:
        async def call() -> None:
            with scope:
                await trio.sleep(seconds)
                function()

        scope = trio.CancelScope()
        trio.lowlevel.spawn_system_task(call, name=_ALARM)
        return scope

    async def _watch(self, timer: TimerFd, function: Callable[[TimerFd], object]) -> None:
        try:
            await _call_whenever_readable(timer, function)
        except (trio.ClosedResourceError, trio.BusyResourceError):
            # `unwatch` was called. Or Ctrl-C interrupted `watch`, and another task watches it.
            pass
        except trio.Cancelled:  # the run is ending
            self.abandon()
            raise


async def _call_whenever_readable(timer: TimerFd, function: Callable[[TimerFd], object]) -> None:
    while True:
        await trio.lowlevel.wait_readable(timer.value)
        function(timer)


def _in_asyncio_within_trio() -> bool:
    """Return True if a trio task runs an asyncio loop, and that loop runs the caller."""
    if running_loop() is None:
        return False
    task = asyncio.current_task()
    return task is not None and is_inner(task.get_coro(), trio.lowlevel.current_task().coro)


_this_run: trio.lowlevel.RunVar[TrioLoop] = trio.lowlevel.RunVar("torchfut_aio")


def current() -> TrioLoop | None:
    """Return the trio run that runs the calling task, or None."""
    if not trio.lowlevel.in_trio_task() or _in_asyncio_within_trio():
        return None
    try:
        return _this_run.get()
    except LookupError:
        loop = TrioLoop(trio.lowlevel.current_trio_token())
        _this_run.set(loop)
        return loop

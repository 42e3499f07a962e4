"""Tasks on trio's loop, in its guest mode too: the waiter names the sleeping task.

Only `torchfut_aio._loops.current` imports this module, and only when trio runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any

import trio

from ._inbox import Inbox

__all__ = ["current"]


class _Waiter:
    """One wait; ``task`` is None before the task sleeps and once it has woken."""

    __slots__ = ("task",)

    def __init__(self) -> None:
        self.task: trio.lowlevel.Task | None = None

    def __iter__(self) -> Generator[Any, Any, object]:
        self.task = trio.lowlevel.current_task()
        return trio.lowlevel.wait_task_rescheduled(self.abort).__await__()  # noqa: ASYNC105

    def wake(self) -> None:
        task, self.task = self.task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def abort(self, _raise_cancel: Callable[[], Any]) -> trio.lowlevel.Abort:
        # A signal handler may have woken the task on the way here.
        task, self.task = self.task, None
        return trio.lowlevel.Abort.SUCCEEDED if task else trio.lowlevel.Abort.FAILED


class TrioLoop(Inbox):
    """The inbox of one ``trio.run``."""

    __slots__ = ("_token",)

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        super().__init__()
        self._token = token

    def checkpoint(self) -> Iterable[Any]:
        return trio.lowlevel.checkpoint().__await__()  # noqa: ASYNC105

    def waiter(self) -> _Waiter:
        return _Waiter()

    def wake(self, waiter: _Waiter) -> None:
        if self._can_resume(waiter):
            waiter.wake()
        else:
            self.post(waiter)

    def _can_resume(self, waiter: _Waiter) -> bool:
        # Only while trio runs a task of this very run: in guest mode the host's
        # callbacks share the thread, and trio may be asleep. And not the waiting task
        # itself, which a signal handler or a finaliser may interrupt on its way to sleep.
        if waiter.task is None or not trio.lowlevel.in_trio_task():
            return False
        if trio.lowlevel.current_trio_token() is not self._token:
            return False
        return trio.lowlevel.current_task() is not waiter.task

    def _call_soon(self, _waiter: _Waiter) -> bool:
        try:
            self._token.run_sync_soon(self._serve)
        except trio.RunFinishedError:
            return False
        return True

    def _resume(self, waiters: deque[_Waiter], count: int) -> None:
        for _ in range(count):
            waiters[0].wake()
            del waiters[0]


_this_run: trio.lowlevel.RunVar[TrioLoop] = trio.lowlevel.RunVar("torchfut_aio")


def current() -> TrioLoop:
    """Returns the inbox of the trio run that runs the calling task."""
    try:
        return _this_run.get()
    except LookupError:
        inbox = TrioLoop(trio.lowlevel.current_trio_token())
        _this_run.set(inbox)
        return inbox

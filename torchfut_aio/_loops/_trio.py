"""Tasks on trio's loop, in its guest mode too: the waiter names the sleeping task.

Only `torchfut_aio._loops.current` imports this module, and only when trio runs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextlib import suppress
from typing import Any

import trio

from . import _timer
from ._inbox import Inbox

__all__ = ["current"]


class _Waiter:
    """One wait; ``task`` is None before the task sleeps and once it has woken."""

    __slots__ = ("_inbox", "task")

    def __init__(self, inbox: TrioLoop) -> None:
        self._inbox = inbox
        self.task: trio.lowlevel.Task | None = None

    def __iter__(self) -> Generator[Any, Any, object]:
        self.task = trio.lowlevel.current_task()
        return trio.lowlevel.wait_task_rescheduled(self.abort).__await__()  # noqa: ASYNC105

    def wake(self) -> None:
        if self._inbox.can_resume(self):
            self.resume()
        else:
            self._inbox.post(self)

    def resume(self) -> None:
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
        return _Waiter(self)

    def can_resume(self, waiter: _Waiter) -> bool:
        # Only while trio runs a task of this very run: in guest mode the host's
        # callbacks share the thread, and trio may be asleep. And not the waiting task
        # itself, which a signal handler or a finaliser may interrupt on its way to sleep.
        if waiter.task is None or not trio.lowlevel.in_trio_task():
            return False
        if trio.lowlevel.current_trio_token() is not self._token:
            return False
        return trio.lowlevel.current_task() is not waiter.task

    def alarm(self, function: Callable[[], None]) -> _Alarm | _CoarseAlarm:
        return (_Alarm if _timer.available() else _CoarseAlarm)(function)

    def call_soon(self, function: Callable[[], None]) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function)

    def spawn(
        self,
        ended: Callable[[], None],
        function: Callable[..., Coroutine[Any, Any, None]],
        *args: object,
    ) -> None:
        async def run() -> None:  # trio lets every task take its first step
            try:
                await function(*args)
            finally:
                ended()

        trio.lowlevel.spawn_system_task(run, name=function)

    def _call_soon(self) -> bool:
        try:
            self._token.run_sync_soon(self._serve)
        except trio.RunFinishedError:
            return False
        return True

    def _resume(self, waiters: deque[_Waiter], count: int) -> None:
        for _ in range(count):
            waiters[0].resume()
            del waiters[0]


class _Alarm:
    """A timerfd, and a system task that watches it."""

    __slots__ = ("_function", "_scope", "_timer")

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._timer = _timer.TimerFd()
        self._scope = trio.CancelScope()
        trio.lowlevel.spawn_system_task(self._run, name="torchfut_aio alarm")

    async def _run(self) -> None:
        try:
            with self._scope:
                await self._watch()
        finally:
            self._timer.close()

    # A function of its own: from Python 3.12 on, an interrupt at the jump that closes a loop
    # may miss the ``finally`` around it.
    async def _watch(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._timer.fd)
            if not self._scope.cancel_called:  # after its time had come
                self._function()

    def set(self, seconds: float) -> None:
        self._timer.set(seconds)

    def close(self) -> None:
        self._scope.cancel()


class _CoarseAlarm:
    """A system task that sleeps, for platforms that have no timerfd."""

    __slots__ = ("_closed", "_deadline", "_function", "_pause")

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._closed = False
        self._deadline = math.inf
        self._pause = trio.CancelScope()
        trio.lowlevel.spawn_system_task(self._run, name="torchfut_aio alarm")

    async def _run(self) -> None:
        while not self._closed:
            self._pause = trio.CancelScope(deadline=self._deadline)
            with self._pause:
                await trio.sleep_forever()
            self._deadline = math.inf
            if not self._closed:
                self._function()

    def set(self, seconds: float) -> None:
        self._deadline = self._pause.deadline = trio.current_time() + seconds

    def close(self) -> None:
        self._closed = True
        self._pause.cancel()


_this_run: trio.lowlevel.RunVar[TrioLoop] = trio.lowlevel.RunVar("torchfut_aio")


def current() -> TrioLoop:
    """Returns the inbox of the trio run that runs the calling task."""
    try:
        return _this_run.get()
    except LookupError:
        inbox = TrioLoop(trio.lowlevel.current_trio_token())
        _this_run.set(inbox)
        return inbox

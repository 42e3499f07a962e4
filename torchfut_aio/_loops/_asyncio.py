"""Tasks on asyncio's loops and on uvloop's: the waiter is an ``asyncio.Future``."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterable
from typing import Any

from ._inbox import Inbox

__all__ = ["current"]

_get_running_loop = asyncio._get_running_loop


class AsyncioLoop(Inbox):
    """The inbox of one loop. It does not keep the loop alive; the waiters do."""

    __slots__ = ("_loop",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = weakref.ref(loop)

    def checkpoint(self) -> Iterable[Any]:
        # As with an asyncio future that is done: the task goes on at once.
        return ()

    def waiter(self) -> asyncio.Future[None]:
        loop = self._loop()
        assert loop is not None  # it is running the caller
        return loop.create_future()

    def wake(self, waiter: asyncio.Future[None]) -> None:
        if _get_running_loop() is waiter.get_loop():
            if not waiter.done():
                waiter.set_result(None)
        else:
            self.post(waiter)

    def _call_soon(self, waiter: asyncio.Future[None]) -> bool:
        loop = waiter.get_loop()
        try:
            loop.call_soon_threadsafe(self._serve)
        except RuntimeError:
            if not loop.is_closed():
                raise
            return False
        return True

    def _resume(self, waiters: list[asyncio.Future[None]]) -> None:
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class _LastUsed(threading.local):
    """The inbox of the loop that this thread last ran: nearly always the right one."""

    inbox: AsyncioLoop | None = None


_last_used = _LastUsed()
_inboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncioLoop] = (
    weakref.WeakKeyDictionary()
)


def current(loop: asyncio.AbstractEventLoop) -> AsyncioLoop:
    """Returns the inbox of ``loop``, which runs in the calling thread."""
    inbox = _last_used.inbox
    if inbox is None or inbox._loop() is not loop:
        inbox = _inboxes.get(loop)
        if inbox is None:
            inbox = _inboxes[loop] = AsyncioLoop(loop)
        _last_used.inbox = inbox
    return inbox

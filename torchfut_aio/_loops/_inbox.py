"""One wake-up of a loop for any number of completions.

Waking a loop from another thread means a write to its self-pipe, a system call that
also hands the GIL over: it costs more than everything else on the way. So a waiter is
not woken directly. It is put into the inbox of its loop, and only the first to arrive
in an empty-handed inbox writes to the pipe; the loop then serves whatever has come by
the time it looks.

A loop that finds many may mean to look again of its own accord, a moment later; as long as it
means to, posters rely on it.

No lock is held, so an inbox may be posted to from a signal handler or a finaliser. What
makes that right is the order of two steps on either side. A poster appends, then reads
``_armed``. The loop clears ``_armed``, then reads the queue. Whichever way they
interleave, either the poster sees False and wakes the loop, or the loop sees the waiter.
(Where there is no GIL, appending to a deque and copying it lock it; asking for its length does
not. So the loop copies it.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import Any

__all__ = ["Inbox"]


class Inbox(ABC):
    """The waiters of one loop that were completed elsewhere and await their wake-up."""

    __slots__ = ("__weakref__", "_armed", "_queue", "watcher")

    def __init__(self) -> None:
        self.watcher: Any = None
        self._queue: deque[Any] = deque()
        self._armed = False

    def abandon(self) -> None:
        """Is told that the loop has gone."""
        self._queue.clear()
        watcher, self.watcher = self.watcher, None
        if watcher is not None:
            watcher.abandon()

    def post(self, waiter: Any) -> None:
        """Has the loop resume ``waiter``; callable from any thread."""
        self._queue.append(waiter)
        if not self._armed:
            self._arm()

    def wake_later(self, _waiter: Any, _found: int) -> bool:
        return False

    def _arm(self) -> None:
        try:
            self._armed = True
            open_ = self._call_soon()
        except BaseException:
            # An interrupt may have struck before the loop was told: let the next
            # poster tell it. Should it know already, it will find nothing to do.
            self._armed = False
            raise
        if not open_:
            # Nobody is left to resume, here or in the queue.
            self._armed = False
            self._queue.clear()

    def _serve(self) -> None:
        """Resumes, on the loop, all that has been posted when it starts."""
        self._armed = False
        queue = self._queue
        try:
            self._resume(queue, len(queue.copy()))
        except BaseException:  # Ctrl-C cut it short
            if queue:
                self._arm()
            raise

    @abstractmethod
    def _call_soon(self) -> bool:
        """Has the loop call `_serve`; returns False if it has closed."""

    @abstractmethod
    def _resume(self, waiters: deque[Any], count: int) -> None:
        """Takes out ``count`` waiters, each once its task is resumed, if that is there."""

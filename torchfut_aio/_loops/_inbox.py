"""One wake-up of a loop for any number of completions.

Waking a loop from another thread means a write to its self-pipe, a system call that also hands
the GIL over: it costs more than everything else on the way. So a waiter is not woken directly.
It is posted to the inbox of its loop, and whoever finds no wake-up under way asks the loop for
one; the loop then serves whatever has come by the time it looks.

A loop that finds many may mean to look again of its own accord, a moment later. That counts as
a wake-up under way, too.

No lock is held, so a signal handler or a finaliser may post. What makes that right is the order
of two steps on either side. A poster appends the waiter, then reads ``_wake_up``. The loop sets
``_wake_up`` to None, then reads the queue. Whichever way they interleave, either the poster sees
None and wakes the loop, or the loop sees the waiter. (Where there is no GIL, appending to a deque
and copying it lock it; asking for its length does not. So the loop copies it.)

Ctrl-C may strike in the loop, when it has taken the call from its list and not made it yet. An
inbox that went on to count on this call would be deaf for ever. So it does not keep the call, but
a weak reference: when the loop drops the call, made or not, the reference tells. A traceback, or
any frame whose callers lead to the loop, may keep the call for longer. So the next task that is
about to wait on this loop asks for another, if it finds a wake-up under way.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["Inbox"]

_PAUSE = object()  # the wake-up under way is the loop's own


class Inbox(ABC):
    """The waiters of one loop that were completed elsewhere and await their wake-up."""

    __slots__ = ("__weakref__", "_queue", "_renewed", "_wake_up")

    _wake_up: object | None
    """What stands for the wake-up under way, if there is one."""

    def __init__(self) -> None:
        self._queue: deque[Any] = deque()
        self._wake_up = None
        self._renewed = False

    def post(self, waiter: Any) -> None:
        """Has the loop resume ``waiter``; callable from any thread."""
        self._queue.append(waiter)
        if self._wake_up is None:
            self._ask_for_wake_up()

    def serve(self) -> None:
        """Resumes, on the loop, all who have been posted when it starts."""
        self._wake_up = None
        try:
            self._renewed = False
            self._resume(len(self._queue.copy()))
        except BaseException:  # Ctrl-C cut it short
            if self._queue:
                self._ask_for_wake_up()
            raise

    def abandon(self) -> None:
        """Forgets who waits, as the loop has closed or gone; may be called again."""
        self._queue.clear()

    def _ask_for_wake_up(self) -> None:
        try:
            serve = self.serve  # a method object that only this call refers to
            self._wake_up = weakref.ref(serve, self._wake_up_lost)
            is_open = self._schedule(serve)
        except BaseException:
            # Perhaps the loop has not been told: let the next poster tell it. If it has been, it
            # will find nothing to do.
            self._wake_up = None
            raise
        if not is_open:
            # Nobody is left to resume, here or in the queue.
            self._wake_up = None
            self._queue.clear()

    def _wake_up_lost(self, wake_up: object) -> None:
        """Called when the loop has dropped a call that it has not made."""
        if self._wake_up is wake_up:
            self._wake_up = None
            if self._queue.copy():
                self._ask_for_wake_up()

    def _renew_wake_up(self) -> None:
        """Asks for another wake-up, once, as that under way may be lost; for a task of the loop."""
        if not self._renewed and self._wake_up is not _PAUSE:
            self._renewed = True
            self._ask_for_wake_up()

    def _pause(self) -> None:
        """Counts on a call of `serve` that the loop has seen to itself."""
        self._wake_up = _PAUSE

    @abstractmethod
    def _schedule(self, serve: Callable[[], None]) -> bool:
        """Has the loop call ``serve``, from any thread; returns False if it has closed."""

    @abstractmethod
    def _resume(self, count: int) -> None:
        """Resumes the first ``count`` in the queue, and takes each out once it is resumed.

        There may be fewer by then.
        """

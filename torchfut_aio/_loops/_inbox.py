"""One wake-up of a loop for any number of completions.

Waking a loop from another thread takes a write to its pipe, a system call that also hands the GIL
over: it costs more than all else on the way. So a waiter is posted to the inbox of its loop.
Whoever finds no wake-up under way asks the loop for one, and the loop then serves all who have
been posted by the time it looks. A loop that has just found many may look again of its own
accord, in a moment: that counts as a wake-up under way, too.

No lock is held, so a signal handler or a finaliser may post. What makes that right is the order
of two steps on either side. A poster appends the waiter, then reads ``wake_up``. The loop sets
``wake_up`` to None, then reads the queue. Whichever way they interleave, either the poster sees
None and wakes the loop, or the loop sees the waiter. (Where there is no GIL, appending to a deque
and copying it lock it; asking for its length does not. So the loop copies it.)

Ctrl-C may strike in the loop when it has taken the call of `Inbox.serve` from its list, and has
not made it. An inbox that went on to count on this call would be deaf for ever. So it keeps only
a weak reference to the call, which tells when the loop drops it. A traceback may keep the call
for longer. So a task that is about to wait on the loop, and finds a wake-up under way, asks for
another. (A poster does not: most of them find one under way, and to tell whether it is late they
would each have to look at the clock.)
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

PAUSE = object()
"""Stands for a wake-up that the loop has seen to itself."""


class Inbox(ABC):
    """The waiters of one loop that were completed elsewhere and await their wake-up.

    Attributes:
        queue: These waiters.
        wake_up: What stands for the wake-up under way; None if there is none.
    """

    __slots__ = ("__weakref__", "_renewed", "queue", "wake_up")

    def __init__(self) -> None:
        self.queue: deque[Any] = deque()
        self.wake_up: object | None = None
        self._renewed = False

    def post(self, waiter: Any) -> None:
        """Has the loop resume ``waiter``, from any thread."""
        self.queue.append(waiter)
        if self.wake_up is None:
            self.ask_for_wake_up()

    def serve(self) -> None:
        """Resumes, on the loop, all who have been posted when it starts."""
        self.wake_up = None
        try:
            self._renewed = False
            self.resume(len(self.queue.copy()))
        except BaseException:  # Ctrl-C cut it short
            if self.queue:
                self.ask_for_wake_up()
            raise

    def abandon(self) -> None:
        """Forgets who waits, as the loop has closed or gone; may be called again."""
        self.queue.clear()

    def ask_for_wake_up(self) -> None:
        """Has the loop call `serve`; whoever cannot leaves that to the next poster."""
        try:
            serve = self.serve  # a method object that only this call refers to
            self.wake_up = weakref.ref(serve, self._wake_up_lost)
            is_open = self.call_soon(serve)
        except BaseException:
            self.wake_up = None  # if the loop was told, it will find nothing to do
            raise
        if not is_open:
            # Nobody is left to resume, here or in the queue.
            self.wake_up = None
            self.queue.clear()

    def renew_wake_up(self) -> None:
        """Asks for another wake-up, once, as that under way may be lost; for a task of the loop."""
        if not self._renewed and self.wake_up is not PAUSE:
            self._renewed = True
            self.ask_for_wake_up()

    def _wake_up_lost(self, wake_up: object) -> None:
        # The loop has dropped the call. If it had made it, another would be under way, or none.
        if self.wake_up is wake_up:
            self.wake_up = None
            if self.queue.copy():
                self.ask_for_wake_up()

    @abstractmethod
    def call_soon(self, function: Callable[[], object]) -> bool:
        """Has the loop call ``function``, from any thread; returns False if it has closed.

        If Ctrl-C strikes the loop when it is about to, it may never call it. So whatever must
        not be lost needs something that makes up for that.
        """

    @abstractmethod
    def resume(self, count: int) -> None:
        """Resumes the first ``count`` in the queue, and takes each out once it is resumed.

        There may be fewer by then.
        """

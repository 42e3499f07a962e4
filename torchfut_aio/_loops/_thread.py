"""Threads that block: the waiter has a lock, held until the wake-up releases it.

``Lock.acquire`` is the one wait that takes a timeout, lets other threads run, and is
interrupted by Ctrl-C, in every version of Python that is supported.
"""

from __future__ import annotations

import threading
from contextlib import suppress


class ThreadWaiter:
    """One wait of a thread."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def block(self, timeout: float | None) -> None:
        """Blocks until it is woken, or for ``timeout`` seconds, or as long as Python can wait."""
        limit = threading.TIMEOUT_MAX  # centuries
        self._lock.acquire(timeout=-1 if timeout is None else min(timeout, limit))

    def wake(self) -> None:
        with suppress(RuntimeError):  # it is woken once more
            self._lock.release()

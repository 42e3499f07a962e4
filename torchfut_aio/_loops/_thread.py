"""Threads that block: the waiter is a lock, held until the wake-up releases it.

``Lock.acquire`` is the one wait that takes a timeout, lets other threads run, and is
interrupted by Ctrl-C, in every version of Python that is supported.
"""

from __future__ import annotations

import threading

__all__ = ["THREADS"]


class Threads:
    """All threads alike: they need no inbox."""

    __slots__ = ()

    def waiter(self) -> threading.Lock:
        waiter = threading.Lock()
        waiter.acquire()
        return waiter

    def block(self, waiter: threading.Lock, timeout: float | None) -> None:
        """Blocks until ``waiter`` is woken, or for ``timeout`` seconds.

        A timeout beyond what the platform can count, centuries, waits that long.
        """
        if timeout is None:
            waiter.acquire()
        else:
            waiter.acquire(timeout=min(timeout, threading.TIMEOUT_MAX))

    def wake(self, waiter: threading.Lock) -> None:
        if waiter.locked():  # not when it is woken once more
            waiter.release()


THREADS = Threads()

"""Waiters and their wakers: a lock wakes a thread, a loop wakes its tasks."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from sys import is_finalizing
from typing import Any, Final, Literal, Protocol


class Waker(Protocol):
    """The loop that wakes waiting tasks, or `THREADS`, which wakes waiting threads."""

    @property
    def closed(self) -> bool:
        """True once the waker was found closed. None of its waiters wakes any more."""

    def wake(self, waiter: Any, /) -> None:
        """Wake ``waiter``, from any thread; do nothing if it is awake or was dropped."""

    def wake_all(self, waiters: list[Any], /) -> None:
        """Wake several waiters, with one wake-up of the loop."""

    def describe(self, waiter: Any, /) -> Waiter:
        """Return a description of the task or thread that waits, from any thread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiter:
    """A task, thread or callback that waits.

    Attributes:
        kind: "task", "thread" or "callback".
        name: The name of the task, thread or function; None if it is unknown.
        since: When the wait began, on the clock of ``time.perf_counter``; None unless waits were
            recorded then.
        where: The function, file and line where a task waits, such as ``handler, app.py:42``. It is
            the innermost function outside this package, asyncio, anyio and trio. None if it is
            unknown, and for threads and callbacks.
    """

    kind: Literal["task", "thread", "callback"]
    name: str | None
    since: float | None = None
    where: str | None = None

    def __str__(self) -> str:
        where = "" if self.where is None else f" in {self.where}"
        return f"{self.kind} {self.name or 'of unknown name'}{where}"


class ThreadWaiter:
    """One wait of the calling thread, on a lock that is held until the thread is woken.

    Attributes:
        thread: The identifier of the thread.
    """

    # A lock, as acquiring one takes a timeout, lets other threads run, and can be interrupted by
    # Ctrl-C, in every supported version of Python.

    __slots__ = ("_lock", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self._lock = threading.Lock()
        self._lock.acquire()

    def block(self, timeout: float | None) -> None:
        """Block until woken, at most ``timeout`` seconds.

        Raises:
            RuntimeError: The interpreter is finalizing: no other thread runs that could wake it.
        """
        if is_finalizing():
            raise RuntimeError("the interpreter is shutting down: no thread is left to wait for")
        limit = threading.TIMEOUT_MAX  # centuries; acquire() takes no more
        self._lock.acquire(timeout=-1 if timeout is None else min(timeout, limit))

    def unblock(self) -> None:
        """End the wait; do nothing if it has ended."""
        try:
            self._lock.release()
        except RecursionError:
            raise
        except RuntimeError:  # it is not locked
            pass


class _Threads:
    closed = False

    def wake(self, waiter: ThreadWaiter, /) -> None:
        waiter.unblock()

    def wake_all(self, waiters: list[ThreadWaiter], /) -> None:
        for waiter in waiters:
            waiter.unblock()

    def describe(self, waiter: ThreadWaiter, /) -> Waiter:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return Waiter(kind="thread", name=names.get(waiter.thread))


THREADS: Final = _Threads()

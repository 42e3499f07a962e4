"""Threads that block until an event is reached: the policy that does not poll."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from ._events import Mark

__all__ = ["Blocker"]

# A thread that has nothing to do waits for so long, in seconds, for more to come.
_LINGER = 0.1


class Blocker:
    """Waits for the marks of one stream, one after the other, in at most one thread.

    The thread is not a daemon: to end a thread that is inside of torch, as the end of the
    interpreter does, can abort the process. So an interpreter that exits waits for it.
    """

    __slots__ = ("_arrived", "_jobs", "_running")

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._jobs: deque[tuple[Mark, Callable[[], object]]] = deque()
        self._running = False

    def block(self, mark: Mark, then: Callable[[], object]) -> None:
        """Has ``then`` called, in a thread, once ``mark`` is reached or has failed."""
        with self._arrived:
            self._jobs.append((mark, then))
            if self._running:
                self._arrived.notify()
                return
            self._running = True
        try:
            threading.Thread(target=self._run, name="torchfut_aio blocker", daemon=False).start()
        except BaseException:  # let the next one try
            self._running = False
            raise

    def _run(self) -> None:
        while True:
            with self._arrived:
                if not self._jobs and not self._arrived.wait_for(lambda: self._jobs, _LINGER):
                    self._running = False
                    return
                mark, then = self._jobs.popleft()
            with suppress(Exception):  # who looks at the event will see it, too
                mark.event.synchronize()
            then()
            del mark, then

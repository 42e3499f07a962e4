"""Threads that block: for those who would rather not poll, and for whole devices."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Blocker"]

# A thread that has nothing to do waits for so long, in seconds, for more to come.
_LINGER = 0.1

_Notify = Callable[[Exception | None], object]


class Blocker:
    """Calls a function that blocks, in at most one thread, for any number of who wait.

    The thread is not a daemon: to end a thread that is inside of torch, as the end of the
    interpreter does, can abort the process. So an interpreter that exits waits for it.
    """

    __slots__ = ("_arrived", "_notify", "_running")

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._notify: dict[_Notify, Callable[[], object]] = {}
        self._running = False

    def block(self, function: Callable[[], object], notify: _Notify) -> None:
        """Has ``notify(error or None)`` called, in a thread, after ``function`` has been.

        One call of a function serves all who have asked for it by the time it starts.
        """
        with self._arrived:
            self._notify[notify] = function
            if self._running:
                self._arrived.notify()
                return
            self._running = True
        try:
            threading.Thread(target=self._run, name="torchfut_aio blocker", daemon=False).start()
        except BaseException:  # let the next one try
            self._running = False
            raise

    def forget(self, notify: _Notify) -> None:
        """Does not call ``notify`` any more, unless it is being called."""
        self._notify.pop(notify, None)

    def _run(self) -> None:
        while True:
            with self._arrived:
                if not self._notify and not self._arrived.wait_for(lambda: self._notify, _LINGER):
                    self._running = False
                    return
                asked = list(self._notify.items())
            function, error = asked[0][1], None
            try:
                function()
            except Exception as exception:
                error = exception
            for notify, wanted in asked:
                if wanted == function and self._notify.pop(notify, None) is not None:
                    notify(error)
            del asked, function, error

"""Threads that block: for those who would rather not poll, and for whole devices."""

from __future__ import annotations

from collections.abc import Callable

from .._worker import Worker, WorkerThread, call_contained

__all__ = ["Blocker"]

# A thread that has nothing to do waits for so long, in seconds, for more to come.
_LINGER = 0.1

_Notify = Callable[[Exception | None], object]


class Blocker(Worker):
    """Calls a function that blocks, in at most one thread, for any number of waiters.

    The work is who is to be notified, each with the function to call first.
    """

    daemon = False

    def __init__(self, name: str = "torchfut_aio blocker") -> None:
        super().__init__(name)

    def block(self, function: Callable[[], object], notify: _Notify) -> None:
        """Has ``notify(error or None)`` called, in a thread, after ``function`` has been.

        One call of a function serves all who have asked for it by the time it starts.

        Raises:
            RuntimeError: No thread could be started; ``notify`` is not called.
        """
        self.submit(notify, function)

    def forget(self, notify: _Notify) -> None:
        """Does not call ``notify`` any more, unless it is being called."""
        self.work.pop(notify, None)

    def serve(self, thread: WorkerThread) -> None:
        while not thread.is_to_end and (self._call_one() or self.rest(_LINGER)):
            pass

    def _call_one(self) -> bool:
        """Calls one function, and notifies all who had asked for it; tells whether anybody had."""
        self.take()  # what is new is in the dict, too
        # Others may forget one meanwhile. Listing the keys runs no Python code.
        wanted = {notify: self.work.get(notify) for notify in [*self.work]}
        function = next(filter(None, wanted.values()), None)
        if function is None:
            return False
        error: Exception | None = None
        try:
            function()
        except Exception as exception:
            error = exception
        for notify, other in wanted.items():
            if other == function and self.work.pop(notify, None) is not None:
                call_contained(notify, error)
        return True

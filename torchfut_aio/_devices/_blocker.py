"""Threads that block: for who would rather not poll, and for whole devices, which have no event."""

from __future__ import annotations

from collections.abc import Callable

from .._errors import own_copy
from .._worker import Worker, WorkerThread, call_contained

Notify = Callable[[Exception | None], object]

# A thread that has nothing to do waits this long, in seconds, for more to come.
_LINGER = 0.1


class Blocker(Worker):
    """Calls functions that block, in at most one thread, for any number of waiters.

    ``submit(notify, function)`` has the thread call ``function()`` and then ``notify(error or
    None)``. One call of a function serves all who have asked for it by the time it starts. To
    stop waiting, pop ``notify`` from `work`.
    """

    daemon = False

    def __init__(self) -> None:
        super().__init__("torchfut_aio blocker")

    def serve(self, thread: WorkerThread) -> None:
        while not thread.is_to_end and (self._call_one() or self.rest(_LINGER)):
            pass

    def _call_one(self) -> bool:
        """Calls one function, and notifies all who had asked for it; tells whether anybody had."""
        self.take()  # what is new is in the dict, too
        # Others may pop one meanwhile. Listing the keys runs no Python code.
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
                call_contained(notify, None if error is None else own_copy(error))
        return True

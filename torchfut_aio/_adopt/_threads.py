"""Sources that tell only a thread that blocks: one thread for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._future import Future
from .._worker import Worker, WorkerThread, call_contained


def complete_in_thread(future: Future[Any], complete: Callable[[Future[Any]], None]) -> None:
    """Calls ``complete(future)``, which blocks, in a thread of its own.

    Raises:
        RuntimeError: No thread could be started.
    """
    _OneWait().submit(future, complete)


class _OneWait(Worker):
    """A thread that blocks for one source.

    At exit, the process leaves it behind: a peer may keep it waiting for as long as it likes, and
    nothing can interrupt it.
    """

    def __init__(self) -> None:
        super().__init__("torchfut_aio wait")

    def serve(self, _thread: WorkerThread) -> None:
        for future in self.take():
            complete = self.work.pop(future, None)
            if complete is not None:
                call_contained(complete, future)

"""Sources that notify only a thread that blocks: one thread for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._core import Promise
from .._worker import Worker, WorkerThread, call_contained


def settle_in_thread(
    promise: Promise,
    read: Callable[[], Any],
    translate: Callable[[BaseException], BaseException] = lambda error: error,
) -> None:
    """Call ``promise.settle(read, translate)``, which blocks, in a thread of its own.

    Raises:
        RuntimeError: No thread could be started.
    """
    _OneWait().submit(promise, (read, translate))


class _OneWait(Worker):
    """A thread that blocks for one source.

    At exit, the process leaves it behind: a peer may keep it waiting for as long as it likes, and
    nothing can interrupt it.
    """

    def __init__(self) -> None:
        super().__init__("torchfut_aio wait")

    def serve(self, _thread: WorkerThread) -> None:
        for promise in self.take():
            how = self.work.pop(promise, None)
            if how is not None:
                call_contained(promise.settle, *how)

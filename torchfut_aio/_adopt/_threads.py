"""Sources that notify only a thread that blocks: one thread for each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .._core import Promise
from .._threads import BlockingThread


def settle_in_thread(
    promise: Promise,
    read: Callable[[], Any],
    translate: Callable[[BaseException], BaseException] = lambda error: error,
) -> None:
    """Call ``promise.settle(read, translate)``, which blocks, in a thread of its own.

    At exit, the process leaves the thread behind: a peer may keep it waiting for as long as it
    likes, and nothing can interrupt it.

    Raises:
        RuntimeError: No thread could be started.
    """
    BlockingThread("torchfut_aio wait").submit(
        promise.end, partial(promise.settle, read, translate)
    )

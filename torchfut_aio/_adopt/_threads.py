"""Sources without callbacks: a thread blocks for each."""

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
    """Call ``promise.settle(read, translate)``, which blocks, in a new thread.

    At exit, the process does not wait for the thread: the source may never complete, and nothing
    can interrupt the thread.

    Raises:
        RuntimeError: No thread could be started.
    """
    thread = BlockingThread("torchfut_aio wait", linger=0)  # no other source will use it
    thread.submit(promise.end, partial(promise.settle, read, translate))

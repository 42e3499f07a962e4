"""Asking a device while some thread captures a CUDA graph.

A capture in "global" mode, the default, forbids queries to all threads: a query fails then, and
invalidates the capture. That spares a thread in "thread-local" mode which captures nothing itself.
So a thread is in that mode while it asks. The function that sets the mode is that of CUDA, or of
ROCm, which PyTorch has loaded; where it is not found, the question has to be put again later.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

T = TypeVar("T")

_THREAD_LOCAL = 1


@functools.cache
def mode_exchange(kind: str) -> Callable[[int], int] | None:
    """Returns what sets the mode of this thread and returns the one before, if there is such."""
    if kind != "cuda":
        return None
    platform = "hip" if torch.version.hip else "cuda"
    with suppress(Exception):
        exchange = getattr(ctypes.PyDLL(None), f"{platform}ThreadExchangeStreamCaptureMode")

        def exchange_mode(mode: int) -> int:
            both = ctypes.c_int(mode)
            exchange(ctypes.byref(both))
            return both.value

        return exchange_mode
    return None


def call_beside_captures(device: torch.device | None, ask: Callable[[], T]) -> T:
    """Returns ``ask()``, which asks ``device``, and disturbs no capture if that is possible."""
    exchange = None if device is None else mode_exchange(device.type)
    if exchange is None:
        return ask()
    before = exchange(_THREAD_LOCAL)
    try:
        return ask()
    finally:
        exchange(before)


def is_of_a_capture(error: Exception) -> bool:
    """Tells whether a device refused to answer only because a graph is being captured."""
    # An event that was recorded within a capture fails for ever, and with another text.
    text = str(error)
    return "stream is capturing" in text or "StreamCaptureUnsupported" in text

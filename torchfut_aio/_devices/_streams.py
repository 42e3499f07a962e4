"""Devices and streams of the accelerator: which are in use, which are current.

A call to a device has side effects. Making a device current creates its context, which takes half a
gigabyte on CUDA, and a new thread starts with the first device current. So we make the device
current and then restore the one before without creating a context. And while any thread captures a
CUDA graph in "global" mode, the default, a query from another thread fails and invalidates the
capture. A thread that captures nothing itself may query in "thread-local" mode.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

from .._pytorch import (
    can_exchange,
    current_accelerator,
    device_exchange,
    device_index,
    has_primary_context,
    set_stream,
    stream_of_index,
)

T = TypeVar("T")

_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal


def accelerator_in_use() -> torch.device | None:
    """Return the accelerator of this process, without an index, if it is initialised."""
    accelerator = current_accelerator()
    if accelerator is None:
        return None
    # This must not initialise it. A backend without is_initialized() counts as in use.
    module = torch.get_device_module(accelerator)
    return accelerator if getattr(module, "is_initialized", lambda: True)() else None


def devices_in_use() -> list[torch.device]:
    """Return the devices that have a context; all devices, if the backend cannot say."""
    accelerator = accelerator_in_use()
    if accelerator is None:
        return []
    has_context = has_primary_context(accelerator.type)
    count = torch.accelerator.device_count()
    return [torch.device(accelerator.type, n) for n in range(count) if has_context(n)]


@functools.cache
def kind_of(device: torch.device) -> str:
    """Return the type of ``device``; cached, as reading the attribute is slow."""
    return device.type


@functools.cache
def _is_accelerators(device: torch.device) -> bool:
    accelerator = current_accelerator()
    return accelerator is not None and kind_of(accelerator) == kind_of(device)


def call_with_current(device: torch.device, function: Callable[..., T], *args: Any) -> T:
    """Return ``function(*args)``, called while ``device`` is current."""
    if not _is_accelerators(device):
        return function(*args)
    before = device_index()
    # On backends other than CUDA and XPU, restoring the device before could create its context.
    if device.index in (before, None) or not can_exchange(device):
        return function(*args)
    torch.accelerator.set_device_index(device)
    try:
        return function(*args)
    finally:
        _restore_current(device, before)


def _restore_current(device: torch.device, index: int) -> None:
    """Make the device of the same kind with this index current; create no context on it."""
    if index != device_index():
        device_exchange(device.type)(index)


def call_beside_captures(device: torch.device | None, function: Callable[[], T]) -> T:
    """Return ``function()``, called while ``device`` is current, without disturbing a capture."""
    if device is None:
        return function()
    exchange = mode_exchange(kind_of(device))
    if exchange is None:
        return call_with_current(device, function)
    before = exchange(_THREAD_LOCAL)
    try:
        return call_with_current(device, function)
    finally:
        exchange(before)


@functools.cache
def mode_exchange(kind: str) -> Callable[[int], int] | None:
    """Return the function that sets the capture mode of this thread and returns the one before.

    It is a function of CUDA or ROCm, which PyTorch has loaded. Without it, refused queries are
    repeated later.
    """
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


def is_of_a_capture(error: Exception) -> bool:
    """Return True if a device refused a query only because a graph is being captured."""
    # An event that was recorded within a capture fails permanently, with another text.
    text = str(error)
    return "stream is capturing" in text or "StreamCaptureUnsupported" in text


def current_stream(device: torch.device) -> torch.Stream:
    """Return the stream of ``device`` that is current in this thread."""
    if _is_accelerators(device):
        return stream_of_index(device_index() if device.index is None else device.index)
    stream: torch.Stream = torch.get_device_module(device).current_stream(device)
    return stream


def finish_current_streams() -> None:
    """Block until the work on the current streams of this thread is done."""
    for device in devices_in_use():
        current_stream(device).synchronize()


def finish_devices() -> None:
    """Block until all devices in use are idle."""
    for device in devices_in_use():
        finish_device(device)


def finish_device(device: torch.device) -> None:
    """Block until ``device`` is idle."""
    call_with_current(device, torch.accelerator.synchronize, device)


def new_stream(device: torch.device) -> torch.Stream:
    """Return a stream for callbacks or copies; the current one, if the device makes no streams."""
    # With another priority than streams of the program have. Streams of one priority take turns, so
    # this could otherwise be one on which `torch.cuda.graph` captures. Such a stream must not be
    # ordered after anything.
    try:
        return torch.Stream(device, priority=-1)
    except RecursionError:
        raise
    except RuntimeError:
        return current_stream(device)


@functools.cache
def side_stream(device: torch.device) -> torch.Stream:
    """Return the stream of ``device`` that is used for copies only."""
    return new_stream(device)


def dedicated_stream(device: torch.device) -> torch.Stream:
    """Return a stream for a callback. It is not the stream for copies: the callback may be slow."""
    stream = new_stream(device)
    return new_stream(device) if stream == side_stream(device) else stream


@contextmanager
def on_streams(streams: Sequence[torch.Stream]) -> Iterator[None]:
    """Make streams current, one of each device. The current device stays the same."""
    # Not `with stream`: two threads must not enter the same `torch.Stream`.
    device = device_index()
    before = [current_stream(stream.device) for stream in streams]
    try:
        _make_all_current(streams, device)
        yield
    finally:
        try:
            _make_all_current(before, device)
        except BaseException:  # interrupted: the thread must not keep these streams
            _make_all_current(before, device)
            raise


def _make_all_current(streams: Sequence[torch.Stream], device: int) -> None:
    for stream in streams:
        set_stream(stream)
    if streams:  # last, as setting a stream makes its device current
        _restore_current(streams[0].device, device)

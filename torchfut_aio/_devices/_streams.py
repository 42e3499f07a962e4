"""Devices and streams of the accelerator: which are in use, which are current.

To make a device current gives it a context, which on CUDA takes half a gigabyte; and a thread has
the first device current when it starts. So what asks a device makes that one current, and what was
current before is made so again in such a way that no context comes of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


def accelerator_in_use() -> torch.device | None:
    """Returns the accelerator of this process, without an index, if it has been initialised."""
    accelerator = current_accelerator()
    if accelerator is None:
        return None
    # Asking must not initialise it. One that cannot be asked counts as in use.
    module = torch.get_device_module(accelerator)
    return accelerator if getattr(module, "is_initialized", lambda: True)() else None


def devices_in_use() -> list[torch.device]:
    """Returns the devices of the accelerator that have a context, as far as anybody can tell."""
    accelerator = accelerator_in_use()
    if accelerator is None:
        return []
    has_context = has_primary_context(accelerator.type)
    count = torch.accelerator.device_count()
    return [torch.device(accelerator.type, n) for n in range(count) if has_context(n)]


def call_with_current(device: torch.device | None, function: Callable[..., T], *args: Any) -> T:
    """Returns ``function(*args)``, called while ``device`` is current."""
    if device is None or not _is_accelerators(device):
        return function(*args)
    before = device_index()
    # Other backends than CUDA and XPU could not undo it: see device_exchange.
    if device.index in (before, None) or not can_exchange(device):
        return function(*args)
    torch.accelerator.set_device_index(device)
    try:
        return function(*args)
    finally:
        _restore_current(device, before)


def _restore_current(device: torch.device, index: int) -> None:
    """Makes the device of the same kind current that was so before, without giving it a context."""
    if index != device_index():
        device_exchange(device.type)(index)


@functools.cache
def kind_of(device: torch.device) -> str:
    """Returns the type of ``device``, which takes longer to ask for than its current stream."""
    return device.type


def _is_accelerators(device: torch.device) -> bool:
    accelerator = current_accelerator()
    return accelerator is not None and kind_of(accelerator) == kind_of(device)


def current_stream(device: torch.device) -> torch.Stream:
    """Returns the stream of ``device`` that is current in this thread."""
    if _is_accelerators(device):
        return stream_of_index(device_index() if device.index is None else device.index)
    stream: torch.Stream = torch.get_device_module(device).current_stream(device)
    return stream


def finish_current_streams() -> None:
    """Blocks until the work on the streams that are current in this thread is done."""
    for device in devices_in_use():
        current_stream(device).synchronize()


def finish_devices() -> None:
    """Blocks until the devices that are in use have done all their work."""
    for device in devices_in_use():
        finish_device(device)


def finish_device(device: torch.device) -> None:
    """Blocks until ``device`` has done all its work."""
    call_with_current(device, torch.accelerator.synchronize, device)


def new_stream(device: torch.device) -> torch.Stream:
    """Returns a stream for callbacks or copies; the current one, where the device makes none.

    The streams of a device take turns, so it is at times one that was returned before. But those
    of the program have another priority, and so take turns among themselves. Among these is the
    one on which ``torch.cuda.graph`` captures, which must not be ordered after anything.
    """
    try:
        return torch.Stream(device, priority=-1)
    except RecursionError:
        raise
    except RuntimeError:
        return current_stream(device)


@functools.cache
def side_stream(device: torch.device) -> torch.Stream:
    """Returns the stream of ``device`` for copies, and for nothing else."""
    return new_stream(device)


def dedicated_stream(device: torch.device) -> torch.Stream:
    """Returns a stream for a callback, which holds up no copy."""
    stream = new_stream(device)
    return new_stream(device) if stream == side_stream(device) else stream


@contextmanager
def on_streams(streams: Sequence[torch.Stream]) -> Iterator[None]:
    """Makes streams current, one of each device. The current device stays so.

    A stream is a context manager itself, but not one that two threads may enter.
    """
    device = device_index()
    before = [current_stream(stream.device) for stream in streams]
    try:
        _make_all_current(streams, device)
        yield
    finally:
        try:
            _make_all_current(before, device)
        except BaseException:  # an interrupt: once more
            _make_all_current(before, device)
            raise


def _make_all_current(streams: Sequence[torch.Stream], device: int) -> None:
    for stream in streams:
        set_stream(stream)
    if streams:  # last, as setting a stream makes its device current
        _restore_current(streams[0].device, device)

"""Devices and streams of the accelerator: which are in use, which are current.

To make a device current gives it a context, which on CUDA takes half a gigabyte; and a thread has
the first device current when it starts. So a thread of this package makes the device current that
it waits for, and leaves it so; in a thread of the program, whatever was current is made so again
in such a way that no context comes of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeGuard, TypeVar

import torch

from .._pytorch import (
    can_exchange,
    device_exchange,
    device_index,
    has_primary_context,
    set_stream,
    stream_of_index,
)

T = TypeVar("T")


def accelerator_in_use() -> torch.device | None:
    """Returns the accelerator of this process, without an index, if it has been initialised."""
    accelerator = torch.accelerator.current_accelerator()
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


def make_current(device: torch.device | None) -> None:
    """Makes ``device`` current, in a thread of this package."""
    if _is_another(device):
        torch.accelerator.set_device_index(device)


def call_with_current(device: torch.device | None, function: Callable[[], T]) -> T:
    """Returns ``function()``, called while ``device`` is current, in a thread of the program."""
    if not _is_another(device):
        return function()
    if not can_exchange(device):
        return function()  # other backends than CUDA and XPU could not undo it: see device_exchange
    before = device_index()
    torch.accelerator.set_device_index(device)
    try:
        return function()
    finally:
        restore_current(device.type, before)


def _is_another(device: torch.device | None) -> TypeGuard[torch.device]:
    """Tells whether ``device`` is one of several, and not the current one."""
    if device is None or device.index is None:
        return False
    try:
        return device.index != device_index()
    except RecursionError:
        raise
    except RuntimeError:  # this process has no accelerator: what is asked next will tell
        return False


def restore_current(kind: str, index: int) -> None:
    """Makes a device current that was so before, without giving it a context."""
    if index != device_index():
        device_exchange(kind)(index)


def current_stream(device: torch.device) -> torch.Stream:
    """Returns the stream of ``device`` that is current in this thread."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type == device.type:
        index = device.index
        return stream_of_index(device_index() if index is None else index)
    stream: torch.Stream = torch.get_device_module(device).current_stream(device)
    return stream


def finish_current_streams() -> None:
    """Blocks until the work on the streams that are current in this thread is done."""
    for device in devices_in_use():
        current_stream(device).synchronize()


def finish_devices() -> None:
    """Blocks until the devices that are in use have done all their work."""
    for device in devices_in_use():
        call_with_current(device, partial(torch.accelerator.synchronize, device))


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
        restore_current(streams[0].device.type, device)

"""The streams and the devices of this process's accelerator, asked without initialising it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = [
    "accelerator_in_use",
    "current_stream",
    "devices_in_use",
    "finish_current_streams",
    "on_stream",
]


def current_stream(device: torch.device) -> torch.Stream:
    """Returns the stream of ``device`` that is current in this thread."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type == device.type:
        return torch.accelerator.current_stream(device)
    stream: torch.Stream = torch.get_device_module(device).current_stream(device)
    return stream


def accelerator_in_use() -> torch.device | None:
    """Returns the accelerator of this process, without an index, if it has been initialised."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    # Asking must not initialise it; where it cannot be asked, it counts as in use.
    module = torch.get_device_module(accelerator)
    return accelerator if getattr(module, "is_initialized", lambda: True)() else None


def devices_in_use() -> list[torch.device]:
    """Returns all devices of the accelerator, if it has been initialised."""
    accelerator = accelerator_in_use()
    if accelerator is None:
        return []
    return [torch.device(accelerator.type, n) for n in range(torch.accelerator.device_count())]


def finish_current_streams() -> None:
    """Blocks until the work on the streams that are current in this thread is done."""
    for device in devices_in_use():
        current_stream(device).synchronize()


@contextmanager
def on_stream(stream: torch.Stream) -> Iterator[None]:
    """Makes ``stream`` current, and its device.

    A stream is a context manager itself, but not one that two threads may enter.
    """
    device = torch.accelerator.current_device_index()
    before = torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)
        torch.accelerator.set_device_index(device)

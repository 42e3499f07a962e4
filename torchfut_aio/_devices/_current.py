"""Which device of the accelerator is current in a thread, and which stream of each device."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .._pytorch import device_exchange, set_stream
from ._streams import current_stream, devices_in_use


class CurrentStreams:
    """What is current in this thread, of the devices that have a context; changes nothing."""

    __slots__ = ("device", "streams")

    def __init__(self) -> None:
        self.streams = {
            device: torch.accelerator.current_stream(device.index) for device in devices_in_use()
        }
        # A new thread has device 0 current.
        self.device = torch.accelerator.current_device_index() if self.streams else 0

    def restoring(self, seen: CurrentStreams | None) -> list[Callable[[], Any]]:
        """Returns calls, all into C, that make all this current again where ``seen`` is."""
        devices = dict.fromkeys([*self.streams, *(seen.streams if seen else ())])
        # A device that had no context yet had the stream that a thread begins with.
        streams = [self.streams.get(device) or _first_stream(device) for device in devices]
        calls: list[Callable[[], Any]] = [partial(set_stream, stream) for stream in streams]
        if devices:  # last, as setting a stream makes its device current
            calls.append(partial(device_exchange(next(iter(devices)).type), self.device))
        return calls

    def differences(self, other: CurrentStreams) -> list[str]:
        """Returns the names of what is not the same here as in ``other``."""
        names = ["current device"] * (self.device != other.device)
        for device, stream in self.streams.items():
            if stream != (other.streams.get(device) or _first_stream(device)):
                names.append(f"current stream of {device}")
        return names


@functools.cache
def _first_stream(device: torch.device) -> torch.Stream:
    """Returns the stream of ``device`` that is current in a thread that has chosen none."""
    streams: list[torch.Stream] = []
    thread = threading.Thread(target=lambda: streams.append(current_stream(device)))
    thread.start()
    thread.join()
    return streams[0]

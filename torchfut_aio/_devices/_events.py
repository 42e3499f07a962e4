"""Marks: places in the work of a stream, each with an event that tells when it is reached.

Creating and destroying an event of a device can block, so events are taken from a pool
and go back to it. A mark that nobody needs any more gives its event back, reached or not:
recording an event again does not disturb who waits for its last recording.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import torch

from ._policy import policy

__all__ = [
    "Mark",
    "accelerator_in_use",
    "current_stream",
    "devices_in_use",
    "finish_current_streams",
    "mark_of",
    "mark_stream",
    "on_stream",
]

# By device, and whether to wait for them blocks rather than spins. Taking from and adding
# to a deque are indivisible steps: no lock, so a finaliser may.
_pools: dict[tuple[torch.device, bool], deque[torch.Event]] = {}

_ticks = itertools.count()


class Mark:
    """A place in the work of a stream.

    Marks on one stream are reached in the order in which they were made, whatever the
    threads. Between ``begun`` and ``ended`` the event was recorded, so the order of two
    is known when one ended before the other began.
    """

    __slots__ = ("_pool", "begun", "device", "ended", "event", "made", "stream")

    def __init__(
        self,
        event: torch.Event,
        stream: torch.Stream | None,
        device: torch.device,
        pool: deque[torch.Event] | None,
    ) -> None:
        self.event = event
        self._pool = pool
        self.device = device
        # Of a program's own event nobody knows the stream.
        self.stream = None if stream is None else (device, stream.stream_id)
        self.begun = next(_ticks)
        if stream is not None:
            event.record(stream)
        self.ended = next(_ticks)
        self.made = monotonic()

    def __del__(self) -> None:
        pool = getattr(self, "_pool", None)  # unless Ctrl-C struck at the very beginning
        if pool is not None:
            pool.append(self.event)


def mark_stream(stream: torch.Stream) -> Mark:
    """Marks the end of what is enqueued on ``stream`` so far."""
    device = stream.device
    blocking = policy().blocking
    pool = _pools.get((device, blocking))
    if pool is None:
        pool = _pools.setdefault((device, blocking), deque())
    try:
        event = pool.pop()
    except IndexError:
        event = _new_event(device, blocking)
    return Mark(event, stream, device, pool)


def _new_event(device: torch.device, blocking: bool) -> torch.Event:
    if blocking:
        # torch.Event takes the argument, and ignores it: CUDA would spin.
        kind = getattr(torch.get_device_module(device), "Event", None)
        if kind is not None:
            event: torch.Event = kind(blocking=True)
            return event
    return torch.Event(device, enable_timing=False)


def mark_of(event: torch.Event) -> Mark:
    """Returns the mark that a program has made itself, by recording ``event``."""
    return Mark(event, None, event.device, None)


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

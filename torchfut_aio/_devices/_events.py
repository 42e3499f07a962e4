"""Streams of the accelerator, and the events that are recorded on them.

Creating and destroying an event of a device can block, so events are taken from a pool. An event
goes back when nothing refers to its `RecordedEvent` any more, so that nobody who waits for one
recording sees the next; and only if it is known to be reached. A pending event that is recorded
again tells of the later recording on CUDA, but is done at the first on other devices. So an event
that was given up, or that nobody has asked about, is destroyed: only a query could tell whether
it is reached, and a query can invalidate another thread's capture of a CUDA graph.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import torch

from ._policy import policy

# By device, and whether a thread that waits for them blocks rather than spins. To append to a
# deque and to pop from it are atomic: no lock is needed, and a finaliser may append.
_pools: dict[tuple[torch.device, bool], deque[torch.Event]] = {}

_ticks = itertools.count()


class RecordedEvent:
    """An event, and where in the work of a stream it was recorded, as far as is known.

    A stream reaches its events in the order in which they were recorded, whatever the threads.
    This one was recorded between the ticks ``begun`` and ``ended``, so the order of two events
    is known if one ended before the other began.
    """

    __slots__ = ("_pool", "begun", "ended", "event", "is_reached", "recorded_at", "stream")

    def __init__(
        self,
        event: torch.Event,
        stream: torch.Stream | None = None,
        pool: deque[torch.Event] | None = None,
    ) -> None:
        self.event = event
        self._pool = pool
        # The stream of an event that the program recorded itself is not known.
        self.stream = None if stream is None else (stream.device, stream.stream_id)
        self.begun = next(_ticks)
        if stream is not None:
            event.record(stream)
        self.ended = next(_ticks)
        self.recorded_at = monotonic()
        self.is_reached = False  # as far as anybody has found out

    def synchronize(self) -> None:
        """Blocks the thread until the event is reached."""
        self.event.synchronize()
        self.is_reached = True

    def __del__(self) -> None:
        # An interrupt may have struck before the attributes were set.
        if getattr(self, "is_reached", False) and self._pool is not None:
            self._pool.append(self.event)


def record_event(stream: torch.Stream) -> RecordedEvent:
    """Records an event at the end of what is enqueued on ``stream`` so far."""
    kind = stream.device, policy().blocking
    pool = _pools.get(kind)
    if pool is None:
        pool = _pools.setdefault(kind, deque())
    try:
        event = pool.pop()
    except IndexError:
        event = _new_event(*kind)
    return RecordedEvent(event, stream, pool)


def already_recorded(event: torch.Event) -> RecordedEvent:
    """Returns a recorded event for one that the program has recorded itself."""
    return RecordedEvent(event)


def _new_event(device: torch.device, blocking: bool) -> torch.Event:
    if blocking:
        # torch.Event accepts the argument and ignores it: CUDA would spin.
        module = torch.get_device_module(device)
        if hasattr(module, "Event"):
            event: torch.Event = module.Event(blocking=True)
            return event
    return torch.Event(device, enable_timing=False)


def accelerator_in_use() -> torch.device | None:
    """Returns the accelerator of this process, without an index, if it has been initialised."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    # Asking must not initialise it. One that cannot be asked counts as in use.
    module = torch.get_device_module(accelerator)
    return accelerator if getattr(module, "is_initialized", lambda: True)() else None


def devices_in_use() -> list[torch.device]:
    """Returns all devices of the accelerator, if it has been initialised."""
    accelerator = accelerator_in_use()
    if accelerator is None:
        return []
    return [torch.device(accelerator.type, n) for n in range(torch.accelerator.device_count())]


def current_stream(device: torch.device) -> torch.Stream:
    """Returns the stream of ``device`` that is current in this thread."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type == device.type:
        return torch.accelerator.current_stream(device)
    stream: torch.Stream = torch.get_device_module(device).current_stream(device)
    return stream


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

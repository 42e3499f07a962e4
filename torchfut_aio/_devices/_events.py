"""Recorded events: places in the work of a stream, which tell when it has got there.

Creating and destroying an event of a device can block, so events are taken from a pool
and go back to it. A recorded event that nobody needs any more goes back whether it has been
reached or not: recording it again does not disturb who waits for its last recording.
"""

from __future__ import annotations

import itertools
from collections import deque
from time import monotonic

import torch

from ._policy import policy

__all__ = ["RecordedEvent", "already_recorded", "record_event"]

# By device, and whether to wait for them blocks rather than spins. Taking from and adding
# to a deque are indivisible steps: no lock is needed, and a finaliser may do either.
_pools: dict[tuple[torch.device, bool], deque[torch.Event]] = {}

_ticks = itertools.count()


class RecordedEvent:
    """An event, and what is known of where in the work of a stream it was recorded.

    Events recorded on one stream are reached in the order in which they were recorded, whatever
    the threads. It was recorded between the ticks ``begun`` and ``ended``, so the order of two
    events is known when one ended before the other began.
    """

    __slots__ = ("_pool", "begun", "device", "ended", "event", "recorded_at", "stream")

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
        # The stream of an event that the program recorded itself is not known.
        self.stream = None if stream is None else (device, stream.stream_id)
        self.begun = next(_ticks)
        if stream is not None:
            event.record(stream)
        self.ended = next(_ticks)
        self.recorded_at = monotonic()

    def __del__(self) -> None:
        pool = getattr(self, "_pool", None)  # an interrupt may have struck before it was set
        if pool is not None:
            pool.append(self.event)


def record_event(stream: torch.Stream) -> RecordedEvent:
    """Records an event at the end of what is enqueued on ``stream`` so far."""
    device = stream.device
    blocking = policy().blocking
    pool = _pools.get((device, blocking))
    if pool is None:
        pool = _pools.setdefault((device, blocking), deque())
    try:
        event = pool.pop()
    except IndexError:
        event = _new_event(device, blocking)
    return RecordedEvent(event, stream, device, pool)


def already_recorded(event: torch.Event) -> RecordedEvent:
    """Returns a recorded event for one that the program has recorded itself."""
    return RecordedEvent(event, None, event.device, None)


def _new_event(device: torch.device, blocking: bool) -> torch.Event:
    if blocking:
        # torch.Event accepts the argument and ignores it: CUDA would spin.
        kind = getattr(torch.get_device_module(device), "Event", None)
        if kind is not None:
            event: torch.Event = kind(blocking=True)
            return event
    return torch.Event(device, enable_timing=False)

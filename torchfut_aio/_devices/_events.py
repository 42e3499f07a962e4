"""Events that are recorded on streams of the accelerator.

Creating or destroying an event can block, so events come from a pool. An event returns to the pool
when its `RecordedEvent` is garbage-collected, so that nothing that waits for one recording sees the
next.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

import torch

from ._schedule import get_poll_policy
from ._streams import call_beside_captures, call_with_current, is_of_a_capture

# By device, and by whether synchronize() blocks rather than spins. append() and pop() of a deque
# are atomic, so no lock is needed, and a finaliser may append.
_pools: defaultdict[tuple[torch.device, bool], deque[torch.Event]] = defaultdict(deque)

_ticks = itertools.count()

_RETRY = 0.005  # seconds between two calls of synchronize() that a capture refuses


class RecordedEvent:
    """An event, and its place among the events of its stream.

    A stream reaches its events in the order in which any threads recorded them. This event was
    recorded between the ticks ``begun`` and ``ended``. So it comes before another event if it ended
    before the other one began.
    """

    __slots__ = ("_pool", "begun", "ended", "event", "is_reached", "recorded_at", "stream")

    def __init__(
        self,
        event: torch.Event | StreamEnd,
        stream: torch.Stream | None = None,
        pool: deque[torch.Event] | None = None,
    ) -> None:
        self.event: Any = event
        self._pool = pool
        # None if the place among other events is unknown: the program has recorded the event, or
        # the stream is external.
        self.stream: tuple[torch.device, int] | None = None
        if stream is not None and not _is_external(stream):
            self.stream = stream.device, stream.stream_id
        self.begun = next(_ticks)
        if stream is not None:
            call_with_current(stream.device, event.record, stream)
        self.ended = next(_ticks)
        self.recorded_at = monotonic()
        self.is_reached = False  # as far as is known

    def query(self) -> bool:
        """Return True if the event is known to be reached; False if a capture forbids the query."""
        event = self.event
        try:
            self.is_reached = call_beside_captures(event.device, event.query)
        except RuntimeError as error:
            if not is_of_a_capture(error):
                raise
        return self.is_reached

    def synchronize(self) -> None:
        event = self.event
        while not self.is_reached:
            try:
                call_beside_captures(event.device, event.synchronize)
                self.is_reached = True
            except RuntimeError as error:
                if not is_of_a_capture(error):
                    raise
                sleep(_RETRY)

    def order(self, stream: torch.Stream) -> None:
        """Order ``stream``, which is current on the event's device, after the event."""
        if self.stream == (stream.device, stream.stream_id):
            return  # a stream is in order with itself
        if type(self.event) is not torch.Event:
            stream = _of_own_class(stream)
        call_with_current(stream.device, self.event.wait, stream)

    def __del__(self) -> None:
        # __init__ may have raised before these were set.
        # Only an event that is known to be reached returns to the pool. If a pending event is
        # recorded again, a query sees the later recording on CUDA, but the first one on other
        # devices. And we must not query here: that could invalidate another thread's capture of a
        # CUDA graph.
        if getattr(self, "is_reached", False) and self._pool is not None:
            self._pool.append(self.event)


class StreamEnd:
    """Used on a device without events. It is reached when its stream is idle."""

    def record(self, stream: torch.Stream) -> None:
        self.device = stream.device
        self.query, self.synchronize = stream.query, stream.synchronize

    def wait(self, _stream: torch.Stream) -> None:
        """Order nothing: the device cannot."""


def _is_external(stream: torch.Stream) -> bool:
    """Return True if the stream's id is a pointer, or 2, a different stream in each thread."""
    return stream.stream_id == 2 or (stream.stream_id > 0xFFFF and stream.stream_id % 2 == 0)


def record_event(stream: torch.Stream) -> RecordedEvent:
    device, blocking = stream.device, get_poll_policy().blocking
    pool = _pools[device, blocking]
    try:
        event = pool.pop()
    except IndexError:
        event = _new_event(device, blocking)
    try:
        return RecordedEvent(event, _of_own_class(stream) if blocking else stream, pool)
    except RuntimeError as error:
        if not says_no_events(error):
            raise
        return RecordedEvent(StreamEnd(), stream)


def says_no_events(error: BaseException) -> bool:
    return issubclass(type(error), RuntimeError) and "doesn't support events" in str(error)


def _new_event(device: torch.device, blocking: bool) -> torch.Event:
    """Return a new event; if ``blocking``, one whose synchronize() does not spin, if possible.

    Only CUDA's event class has that option: ``torch.Event`` ignores it, XPU's class raises
    TypeError, and events of MPS's class can be recorded on the default stream only.
    """
    kind = getattr(torch.get_device_module(device), "Event", None)
    if blocking and isinstance(kind, type) and issubclass(kind, torch.Event):
        with suppress(TypeError):
            return kind(blocking=True)
    return torch.Event(device, enable_timing=False)


def _of_own_class(stream: torch.Stream) -> torch.Stream:
    """Return ``stream`` as an instance of the device's own class, which its events need."""
    # Until PyTorch's change 173908, CUDA's events took any stream for a CUDA stream, unchecked.
    kind = getattr(torch.get_device_module(stream.device), "Stream", None)
    if kind is None or isinstance(stream, kind):
        return stream
    parts = ("stream_id", "device_index", "device_type")
    with suppress(TypeError):
        stream = kind(**{part: getattr(stream, part) for part in parts})
    return stream

"""Events that are recorded on streams of the accelerator.

Creating and destroying an event of a device can block, so events are taken from a pool. An event
goes back when nothing refers to its `RecordedEvent` any more, so that nobody who waits for one
recording sees the next; and only if it is known to be reached. A pending event that is recorded
again tells of the later recording on CUDA, but is done at the first on other devices. So an event
that was given up, or that nobody has asked about, is destroyed: only a query could tell whether
it is reached, and a query can invalidate another thread's capture of a CUDA graph.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

import torch

from ._capture import call_beside_captures, is_of_a_capture
from ._policy import get_poll_policy
from ._streams import call_with_current

# By device, and whether a thread that waits for them blocks rather than spins. To append to a
# deque and to pop from it are atomic: no lock is needed, and a finaliser may append.
_pools: defaultdict[tuple[torch.device, bool], deque[torch.Event]] = defaultdict(deque)

_ticks = itertools.count()

# A thread that a capture keeps from blocking for an event tries again after so many seconds.
_CAPTURE = 0.005


class RecordedEvent:
    """An event, and where in the work of a stream it was recorded, as far as is known.

    A stream reaches its events in the order in which they were recorded, whatever the threads.
    This one was recorded between the ticks ``begun`` and ``ended``, so the order of two events
    is known if one ended before the other began.
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
        # None where nothing can be told from other events: the program has recorded this one
        # itself, or the stream is external.
        self.stream: tuple[torch.device, int] | None = None
        if stream is not None and not _is_external(stream):
            self.stream = stream.device, stream.stream_id
        self.begun = next(_ticks)
        if stream is not None:
            call_with_current(stream.device, event.record, stream)
        self.ended = next(_ticks)
        self.recorded_at = monotonic()
        self.is_reached = False  # as far as anybody has found out

    def query(self) -> bool:
        """Tells whether the event is known to be reached; False if a capture forbids to ask."""
        device = getattr(self.event, "device", None)
        ask = self.event.query
        try:
            self.is_reached = call_with_current(device, call_beside_captures, device, ask)
        except RuntimeError as error:
            if not is_of_a_capture(error):
                raise
        return self.is_reached

    def synchronize(self) -> None:
        """Blocks the thread until the event is reached."""
        device = self.event.device
        block = self.event.synchronize
        while not self.is_reached:
            try:
                call_with_current(device, call_beside_captures, device, block)
                self.is_reached = True
            except RuntimeError as error:
                if not is_of_a_capture(error):
                    raise
                sleep(_CAPTURE)

    def order(self, stream: torch.Stream) -> None:
        """Order ``stream``, which is current on the event's device, after it."""
        if self.stream == (stream.device, stream.stream_id):
            return  # it is in order
        if type(self.event) is not torch.Event:
            stream = _of_own_class(stream)
        call_with_current(stream.device, self.event.wait, stream)

    def __del__(self) -> None:
        # It may have been interrupted before the attributes were set.
        if getattr(self, "is_reached", False) and self._pool is not None:
            self._pool.append(self.event)


class StreamEnd:
    """In the place of an event on a device that has none: reached once its stream is idle."""

    def record(self, stream: torch.Stream) -> None:
        self.device = stream.device
        self.query, self.synchronize = stream.query, stream.synchronize

    def wait(self, _stream: torch.Stream) -> None:
        """Order nothing: the device cannot."""


def _is_external(stream: torch.Stream) -> bool:
    """Tells whether the stream's id is a pointer, or 2, which is another stream in each thread."""
    return stream.stream_id == 2 or (stream.stream_id > 0xFFFF and stream.stream_id % 2 == 0)


def record_event(stream: torch.Stream) -> RecordedEvent:
    """Records an event at the end of what is enqueued on ``stream`` so far."""
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
    """Tells whether ``error`` is what a device says that has no events at all."""
    return issubclass(type(error), RuntimeError) and "doesn't support events" in str(error)


def _new_event(device: torch.device, blocking: bool) -> torch.Event:
    """Returns an event, for which a thread that blocks does not spin if the device has such."""
    # torch.Event accepts the argument and ignores it. The class of CUDA does not; that of XPU
    # does not know it; and that of MPS can be recorded on no stream but the default one.
    kind = getattr(torch.get_device_module(device), "Event", None)
    if blocking and isinstance(kind, type) and issubclass(kind, torch.Event):
        with suppress(TypeError):
            return kind(blocking=True)
    return torch.Event(device, enable_timing=False)


def _of_own_class(stream: torch.Stream) -> torch.Stream:
    """Returns ``stream`` as one of the device's own class, where events take no other."""
    # Those of CUDA took any stream for one of theirs, unchecked, until PyTorch's change 173908.
    kind = getattr(torch.get_device_module(stream.device), "Stream", None)
    if kind is None or isinstance(stream, kind):
        return stream
    parts = ("stream_id", "device_index", "device_type")
    with suppress(TypeError):
        stream = kind(**{part: getattr(stream, part) for part in parts})
    return stream

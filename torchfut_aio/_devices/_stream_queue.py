"""The events of one stream that somebody waits for, and which of them have been reached.

A stream reaches its events in order. So its queue keeps them in that order, and a poll is one
query, of the oldest; more only when that is reached, and then as few as it takes to find how
many are.

Only the watcher knows which waits are pending. Events of waits that are over, or were given up,
stay in the queue until they come to the front, or there are many of them.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Container, Hashable, Sequence
from typing import NamedTuple

from .._threads import BlockingThread, Notify
from ._events import RecordedEvent
from ._schedule import Schedule


class Wait:
    """One wait for some events."""

    __slots__ = ("error", "missing", "notify")

    def __init__(self, events: Sequence[RecordedEvent], notify: Notify) -> None:
        self.notify = notify
        self.missing = set(events)  # those that are not known to be reached
        self.error: Exception | None = None


class AwaitedEvent(NamedTuple):
    """An event in the queue of its stream, and a wait that it is part of."""

    event: RecordedEvent
    wait: Wait


class StreamQueue:
    """The awaited events of one stream, in the order in which they will be reached."""

    def __init__(self, key: Hashable, schedule: Schedule) -> None:
        self.key = key
        self.schedule = schedule
        self.events: list[AwaitedEvent] = []
        self._tidy_at = 16
        self.reached = -1  # all events that ended before this tick are reached
        self.since = 0.0  # when, as far as is known, the stream began what it does now
        self.polled_at = 0.0  # when it was last known not to be done
        self.next_poll = 0.0
        self.scheduled = True  # whether ``next_poll`` is the schedule's
        self.blocker: BlockingThread | None = (
            None  # it has work while it blocks for the oldest event
        )

    def oldest(self, pending: Container[Wait]) -> RecordedEvent | None:
        """Returns the oldest event that one of the ``pending`` waits is for."""
        events = self.events
        stale = 0
        while stale < len(events) and events[stale].wait not in pending:
            stale += 1
        if stale:
            del events[:stale]
        return events[0].event if events else None

    def add(self, awaited: AwaitedEvent, pending: Container[Wait]) -> None:
        events = self.events
        if len(events) >= self._tidy_at:
            events[:] = [other for other in events if other.wait in pending]
            self._tidy_at = 2 * len(events) + 16
        # Nearly always it is the last: tasks mostly come in the order of the work.
        if not events or events[-1].event.begun <= awaited.event.begun:
            events.append(awaited)
        else:
            insort(events, awaited, key=lambda other: other.event.begun)


def search(
    events: Sequence[AwaitedEvent], query: Callable[[RecordedEvent], bool]
) -> tuple[int, int, Exception | None]:
    """Returns how many events are reached, from which on they have failed, and the error."""
    reached, unreached = 0, len(events)  # those in between are to be found out about
    failed, error = unreached, None
    at, step = 0, 1
    while reached < unreached:
        try:
            hit = query(events[at].event)
        except Exception as exception:
            hit, failed, error = False, at, exception
        if hit:
            reached = at + 1
            step *= 2
        else:
            unreached = at
        # As long as every query was a hit, ever further; then halfway.
        galloping = unreached == len(events)
        at = min(reached + step, unreached) - 1 if galloping else (reached + unreached) // 2
    return reached, failed, error

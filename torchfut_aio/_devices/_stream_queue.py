"""The awaited events of one stream, and the poll that finds out which of them are reached.

A stream reaches its events in order, and its queue keeps them in that order. So most polls are one
query, of the oldest event. If that is reached, the poll searches for the last event that is.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .._errors import own_copy
from .._repr import function_name
from .._threads import BlockingThread, Notify
from ._events import RecordedEvent
from ._schedule import Poll, Schedule

_logger = logging.getLogger("torchfut_aio")


@dataclass(eq=False, slots=True)
class Wait:
    """A wait for all of some events."""

    notify: Notify
    missing: set[RecordedEvent]  # the events not known to be reached; the last one stays
    error: Exception | None = None


@dataclass(eq=False, slots=True)
class Waits:
    """The waits of one loop, which its queues share, and the counts of its queries."""

    # To give up a wait, delete its key. That takes no call, so it cannot be interrupted.
    pending: dict[Wait, None]
    queries: int = 0
    hits: int = 0


class AwaitedEvent(NamedTuple):
    """An event in the queue of its stream, and a wait that it is part of."""

    event: RecordedEvent
    wait: Wait


class StreamQueue:
    """The awaited events of one stream, in the order in which they will be reached."""

    def __init__(self, key: Hashable, schedule: Schedule, waits: Waits) -> None:
        self.key = key
        self.schedule = schedule
        self.events: list[AwaitedEvent] = []
        self.polled_at = 0.0  # when the oldest event was last known to be pending
        self.next_poll = 0.0
        self.scheduled = True  # whether the schedule chose ``next_poll``
        self.blocker: BlockingThread | None = None  # it has work while it blocks for an event
        self._waits = waits
        self._tidy_at = 16
        self._reached = -1  # events that ended before this tick are reached
        self._since = 0.0  # when the stream began its present work, as far as is known

    def oldest(self) -> RecordedEvent | None:
        """Return the oldest event of a pending wait, and drop those before it."""
        events, pending = self.events, self._waits.pending
        stale = 0
        for event, wait in events:
            if wait in pending and event in wait.missing:
                break
            stale += 1
        if stale:
            del events[:stale]
        return events[0].event if events else None

    def is_reached(self, event: RecordedEvent) -> bool:
        """Return True if ``event`` is reached. Query it, unless other events answer that."""
        if event.ended < self._reached:
            event.is_reached = True
            return True
        oldest = self.oldest()
        # The oldest counts as pending until the next poll, and so does any event after it.
        if oldest is not None and oldest.ended < event.begun:
            return False
        self._waits.queries += 1
        if not event.query():
            return False
        self._waits.hits += 1
        self._reached = max(self._reached, event.begun)
        return True

    def add(self, event: RecordedEvent, wait: Wait, now: float) -> None:
        """Add an event of ``wait``, which is pending."""
        if self.oldest() is None:
            self._since = max(self._since, event.recorded_at)
            self.polled_at, self.scheduled = now, True
            self.next_poll = self._since + self.schedule.next_poll(now - self._since)
        events = self.events
        if len(events) >= self._tidy_at:
            # oldest() drops waits that were given up at the front only, so drop the others here.
            # As the limit doubles, this takes constant time per event on average.
            pending = self._waits.pending
            events[:] = [awaited for awaited in events if awaited.wait in pending]
            self._tidy_at = 2 * len(events) + 16
        # Most tasks wait in the order of the work, so most events belong at the end.
        if not events or events[-1].event.begun <= event.begun:
            events.append(AwaitedEvent(event, wait))
        else:
            insort(events, AwaitedEvent(event, wait), key=lambda other: other.event.begun)

    def poll(self, now: float, early: float) -> RecordedEvent | None:
        """If a poll is due, notify the waits that are over, and schedule the next poll.

        Returns:
            The oldest event that is still awaited.
        """
        oldest = self.oldest()
        # The loop is awake now, so a poll that is a little early may save a wake-up. It is due once
        # half of the pause before it is over, but at most `early` / 2 seconds before its time.
        if oldest is None or now < self.next_poll - min(self.next_poll - self.polled_at, early) / 2:
            return oldest
        since, waited, due = self._since, now - self._since, self.next_poll - self._since
        reached, failed, error = self._search()
        if reached or failed:
            self._end(reached, failed, error)
            oldest = self.oldest()
        if self.scheduled:
            self.schedule.observe(Poll(self.polled_at - since, due, waited, bool(reached)))
        elif reached:  # the blocking thread has found it without delay
            self.schedule.observe(Poll(waited, waited, waited, reached=True))
        if reached:
            self._since = now
        if oldest is not None:
            self.polled_at, self.scheduled = now, True
            self.next_poll = self._since + self.schedule.next_poll(now - self._since)
        return oldest

    def _search(self) -> tuple[list[AwaitedEvent], list[AwaitedEvent], Exception | None]:
        """Return the reached events, the failed events, and the error of the failed ones."""
        events = self.events
        reached, unreached = 0, len(events)  # the events in between are unknown
        failed, error = unreached, None
        at, step = 0, 1
        while reached < unreached:
            self._waits.queries += 1
            try:
                hit = events[at].event.query()
            except Exception as exception:
                hit, failed, error = False, at, exception
            if hit:
                self._waits.hits += 1
                reached = at + 1
                step *= 2
            else:
                unreached = at
            # While every query is a hit, the steps double. After a miss, halve the interval.
            galloping = unreached == len(events)
            at = min(reached + step, unreached) - 1 if galloping else (reached + unreached) // 2
        return events[:reached], events[failed:], error

    def _end(
        self,
        reached: Sequence[AwaitedEvent],
        failed: Sequence[AwaitedEvent],
        error: Exception | None,
    ) -> None:
        # If two threads recorded at the same time, the ticks do not say which event is earlier.
        # Such events stay in the queue, and a later poll queries them.
        if reached:
            newest = reached[-1].event
            self._reached = max(self._reached, newest.begun)
            for event, wait in reached:
                if event is newest or event.ended < newest.begun:
                    event.is_reached = True
                    if len(wait.missing) > 1:
                        wait.missing.discard(event)
                    elif event in wait.missing:
                        self._notify(wait, None)
            pending = self._waits.pending
            # *After* notifying. An interrupt before this loses nothing, as the next poll repeats
            # what it cut short. A finaliser may have given up any of the waits meanwhile.
            self.events[: len(reached)] = [
                e for e in reached if e.wait in pending and e.event in e.wait.missing
            ]
        if error is not None:
            first = failed[0].event
            self.fail([e for e in failed if e.event is first or e.event.begun > first.ended], error)

    def fail(self, events: Iterable[AwaitedEvent], error: Exception) -> None:
        for awaited in events:
            self._notify(awaited.wait, error)

    def _notify(self, wait: Wait, error: Exception | None) -> None:
        if wait not in self._waits.pending:
            return
        wait.error = None if error is None else own_copy(error)  # every wait raises its own
        try:
            wait.notify(wait.error)
        except Exception:
            _logger.exception(
                "Got the following error when calling %s:", function_name(wait.notify)
            )
        # *After* the call. If it is interrupted, the next poll finds the wait pending, and repeats
        # it.
        self._waits.pending.pop(wait, None)

"""The event watcher: one a loop, and driven by it.

Each stream has a queue of the events that somebody waits for. The first sets an alarm with the
loop, and when the last wait is over the alarm is closed. When it goes off is for the queue's
schedule to tell. Where the policy is to block, a thread tells the loop when to poll instead.

An interrupt may strike anywhere, so the watcher keeps no counts that could go wrong, and
whatever was left half done is done again at the next poll:

- A wait is pending exactly as long as it is a key of ``waits``. To give it up is to delete it
  there, which takes no call: nothing can strike half-way. Queues find out by themselves.
- A poll takes events out of a queue only after their waits were put into ``_over``, and a wait
  out of ``_over`` only after it was notified. A wait may be notified twice, never zero times.
- The alarm keeps going off until it is set anew, and a poll does that last: a poll that was
  struck is repeated. ``_alarm_at`` is never earlier than what the alarm is set to, so that
  whoever waits next sets it if there is any doubt.

All of this runs in the thread of the loop; but a finaliser may close a coroutine, and so give
up a wait, in the middle of any step.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from time import monotonic

import torch

from .._loops import Alarm, Loop, current, loop_in_this_thread
from .._repr import function_name
from ._blocker import Blocker
from ._events import RecordedEvent
from ._policy import policy
from ._schedule import LearnedSchedule, Poll, Schedule
from ._statistics import EndedWatchers, Statistics, total
from ._stream_queue import AwaitedEvent, StreamQueue, Wait, search

__all__ = ["Watcher", "statistics", "watcher_of"]

# Streams come and go. What was learned of those at rest is kept for so many.
_QUEUES_AT_REST = 256

# Where a thread blocks for a stream, the stream is polled all the same after so many seconds,
# in case an interrupt struck the wake-up.
_FALLBACK = 1.0

_logger = logging.getLogger("torchfut_aio")


class Watcher:
    """Watches recorded events for the tasks of one loop."""

    def __init__(self, loop: Loop, new_schedule: Callable[[], Schedule] = LearnedSchedule) -> None:
        self.waits: dict[Wait, None] = {}  # those that are pending
        self.polls = self.queries = self.hits = 0
        self._loop = loop
        self._new_schedule = new_schedule
        self._alarm: Alarm | None = None
        self._alarm_at = inf
        self._queues: dict[tuple[torch.device, int], StreamQueue] = {}
        # The streams of events that the program has recorded itself are unknown. These have a
        # queue each, by id, while they are waited for; and a schedule for each device.
        self._own_events: dict[object, StreamQueue] = {}
        self._own_schedules: dict[torch.device, Schedule] = {}
        self._active: dict[StreamQueue, None] = {}  # those in which somebody may wait
        self._over: deque[Wait] = deque()  # still to be notified

    @property
    def pending(self) -> int:
        """How many waits are pending."""
        return len(self.waits)

    def statistics(self) -> Statistics:
        """Returns what this watcher has done."""
        learned = {s: queue.schedule.interval for s, queue in list(self._queues.items())}
        intervals = {stream: interval for stream, interval in learned.items() if interval}
        return Statistics(self.pending, self.polls, self.queries, self.hits, intervals)

    # --------------------------------------------------------------------- waiting

    def watch(self, wait: Wait) -> bool:
        """Has ``wait`` notified, on the loop, when its events are reached, or one has failed.

        Whoever stops waiting deletes the wait from ``waits``, also if this raises.

        Returns:
            False if they are reached now: then it is not notified.

        Raises:
            RuntimeError: What the device says of a kernel that failed.
        """
        missing = [(event, q) for event in wait.missing if (q := self._queue_if_pending(event))]
        if not missing:
            return False
        wait.missing = {event for event, _ in missing}
        # First of all, or else the queues would take what is added for given up.
        self.waits[wait] = None
        for event, queue in missing:
            self._add(AwaitedEvent(event, wait), queue)
        self._set_alarm()
        return True

    def notify_when_reached(
        self, events: Sequence[RecordedEvent], notify: Callable[[Exception | None], object]
    ) -> Callable[[], None]:
        """Has ``notify(error or None)`` called, on the loop, when all ``events`` are reached.

        At once, if they are now. If it raises, it is called again, with what it raised; and if
        it was interrupted, with the same, so perhaps twice.

        Returns:
            A function that withdraws this.
        """
        wait, error = Wait(events, notify), None
        try:
            pending = self.watch(wait)
        except Exception as exception:
            self.forget(wait)
            pending, error = False, exception
        except BaseException:
            self.forget(wait)
            raise
        if not pending:
            notify(error)
        return partial(self.forget, wait)

    def forget(self, wait: Wait) -> None:
        """Gives up ``wait``; does nothing if it is over."""
        if wait in self.waits:
            del self.waits[wait]
            self.close_if_idle()

    def _add(self, awaited: AwaitedEvent, queue: StreamQueue) -> None:
        event = awaited.event
        self._active[queue] = None
        if event.stream is None:
            self._own_events[id(event.event)] = queue
        if queue.oldest(self.waits) is None:
            now = monotonic()
            queue.since = max(queue.since, now if event.stream is None else event.recorded_at)
            self._set_next_poll(queue, event, now)
        queue.add(awaited, self.waits)

    def _queue_if_pending(self, event: RecordedEvent) -> StreamQueue | None:
        queue = self._queue_of(event)
        if event.ended < queue.reached:
            return None
        if not queue.knows_pending(event, self.waits) and self._query(event):
            queue.reached = max(queue.reached, event.begun)
            return None
        return queue

    def _queue_of(self, event: RecordedEvent) -> StreamQueue:
        stream = event.stream
        if stream is None:
            key = id(event.event)
            queue = self._own_events.get(key)
            if queue is None:
                schedule = self._own_schedules.get(event.device)
                if schedule is None:
                    schedule = self._own_schedules[event.device] = self._new_schedule()
                queue = StreamQueue(key, schedule)
            return queue
        queue = self._queues.get(stream)
        if queue is None:
            if len(self._queues) >= _QUEUES_AT_REST:
                self._queues = {s: q for s, q in self._queues.items() if q in self._active}
            queue = self._queues[stream] = StreamQueue(stream, self._new_schedule())
        return queue

    def _query(self, event: RecordedEvent) -> bool:
        self.queries += 1
        reached = event.event.query()
        self.hits += reached
        return reached

    # --------------------------------------------------------------------- polling

    def poll(self) -> None:
        """Polls the queues that are due, and notifies those whose wait is over."""
        if self.waits or self._over:
            self.polls += 1
            self._poll_due()
            self._notify_over()
        if not self.waits:
            # Not at once: who has been woken may well be about to wait again.
            self._loop.call_soon(self.close_if_idle)
        # Last of all: up to here it keeps going off.
        self._alarm_at = inf
        self._set_alarm()

    def _poll_due(self) -> None:
        now = monotonic()
        early = 10 * policy().shortest
        for queue in list(self._active):
            # One wake-up serves those, too, that are half-way to their own.
            if queue.next_poll - min(queue.next_poll - queue.polled_at, early) / 2 <= now:
                oldest = queue.oldest(self.waits)
                if oldest is not None:
                    try:
                        oldest = self._poll(queue, now)
                    except Exception as error:
                        # Not one of the device's, which are found in the search.
                        self._settle(queue.events, error)
                        oldest = None
                if oldest is None:
                    self._own_events.pop(queue.key, None)
                    self._active.pop(queue, None)

    def _poll(self, queue: StreamQueue, now: float) -> RecordedEvent | None:
        """Polls ``queue``; returns the oldest event that somebody still waits for."""
        events = queue.events
        reached, failed, error = search(events, self._query)
        if reached:
            newest = events[reached - 1].event
            queue.reached = max(queue.reached, newest.begun)
            # Of those recorded at the same time as the newest, nobody knows.
            self._settle(
                [e for e in events[:reached] if e.event is newest or e.event.ended < newest.begun]
            )
        if error is not None:
            first = events[failed].event
            self._settle(
                [e for e in events[failed:] if e.event is first or e.event.begun > first.ended],
                error,
            )
            events[failed:] = [e for e in events[failed:] if e.event in e.wait.missing]
        events[:reached] = [e for e in events[:reached] if e.event in e.wait.missing]
        self._observe(queue, reached > 0, now)
        oldest = queue.oldest(self.waits)
        if oldest is not None:
            self._set_next_poll(queue, oldest, now)
        return oldest

    def _settle(self, events: Sequence[AwaitedEvent], error: Exception | None = None) -> None:
        """Ends the waits for ``events``: with an error, or if they wait for no others."""
        for awaited in events:
            wait = awaited.wait
            if error is None:
                wait.missing.discard(awaited.event)
            else:
                wait.error = error
                wait.missing.clear()
            if not wait.missing and wait in self.waits:
                self._over.append(wait)
                del self.waits[wait]

    def _notify_over(self) -> None:
        while self._over:
            _notify(self._over[0])
            self._over.popleft()

    def _observe(self, queue: StreamQueue, reached: bool, now: float) -> None:
        since, at = queue.since, now - queue.since
        if queue.scheduled:
            due = queue.next_poll - since
            queue.schedule.observe(Poll(queue.polled_at - since, due, at, reached))
        elif reached:  # which the thread has told at once
            queue.schedule.observe(Poll(at, at, at, reached))
        if reached:
            queue.since = now

    def _set_next_poll(self, queue: StreamQueue, oldest: RecordedEvent, now: float) -> None:
        queue.polled_at = now
        queue.scheduled = not policy().blocking or oldest.stream is None
        if not queue.scheduled:
            queue.next_poll = now + _FALLBACK
            if queue.blocked or self._block(queue, oldest):
                return
            queue.scheduled = True
        queue.next_poll = queue.since + queue.schedule.next_poll(now - queue.since)

    def _block(self, queue: StreamQueue, oldest: RecordedEvent) -> bool:
        """Has the queue polled when ``oldest`` is reached; returns False if no thread starts."""
        queue.blocker = blocker = queue.blocker or Blocker()
        queue.blocked = True
        try:
            blocker.block(oldest.event.synchronize, partial(self._unblock, queue))
        except BaseException as error:
            queue.blocked = False
            if isinstance(error, Exception):
                return False
            raise
        return True

    def _unblock(self, queue: StreamQueue, _error: Exception | None) -> None:
        """Has ``queue`` polled; the thread calls this. The poll will find the error, too."""
        queue.blocked = False
        queue.next_poll = queue.polled_at
        self._loop.call_soon(self.poll)

    # ---------------------------------------------------------------------- alarm

    def _set_alarm(self) -> None:
        at = 0.0 if self._over else min([q.next_poll for q in list(self._active)], default=inf)
        alarm = self._alarm
        if at == inf:
            if alarm is not None:
                alarm.set(inf)
        elif at < self._alarm_at:
            if alarm is None:
                alarm = self._alarm = self._loop.alarm(self.poll)
            self._alarm_at = inf  # unknown, until it is set
            alarm.set(max(at - monotonic(), 0.0))
            self._alarm_at = at

    def close_if_idle(self) -> None:
        """Leaves nothing with the loop if nobody waits."""
        if not self.waits and not self._over:
            self._own_events.clear()
            for queue in list(self._active):
                queue.events.clear()
            self._active.clear()
            self._close_alarm()

    def _close_alarm(self) -> None:
        alarm = self._alarm
        self._alarm_at = inf
        if alarm is not None:
            alarm.close()  # if an interrupt strikes now, whoever waits next sets it again
            self._alarm = None

    # ------------------------------------------------------------------- the end

    def abandon(self) -> None:
        """Gives up all waits: the loop has gone, with the tasks that waited."""
        self.waits.clear()
        self._over.clear()
        self.close_if_idle()

    def __del__(self) -> None:
        if hasattr(self, "_over"):  # unless an interrupt struck before it was whole
            self.abandon()
            if not sys.is_finalizing():
                _ended.add(self.statistics())


def _notify(wait: Wait) -> None:
    try:
        wait.notify(wait.error)
    except Exception as error:
        # What it was to tell cannot be told. That concerns this wait only.
        try:
            wait.notify(error)
        except Exception:
            name = function_name(wait.notify)
            _logger.exception("%s raised, and so did telling it of that:", name)


_watchers: weakref.WeakValueDictionary[int, Watcher] = weakref.WeakValueDictionary()  # by id
_ended = EndedWatchers()


def watcher_of(loop: Loop) -> Watcher:
    """Returns the watcher of ``loop``, for its own thread."""
    watcher = loop.watcher
    if watcher is None:
        watcher = loop.watcher = Watcher(loop)
        _watchers[id(watcher)] = watcher
    assert isinstance(watcher, Watcher)
    return watcher


def statistics() -> Statistics:
    """Tells what the event watcher of the running loop has done, and is doing.

    Where no event loop runs: what those of all loops of the process have, ended ones
    included.

    Example:
        >>> torchfut_aio.statistics().pending
        0
    """
    if loop_in_this_thread():
        return watcher_of(current()).statistics()
    # Of a list, as other threads may start and end loops meanwhile.
    watchers = [ref() for ref in _watchers.valuerefs()]
    return total([w.statistics() for w in watchers if w is not None] + _ended.parts())

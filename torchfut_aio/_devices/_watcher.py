"""The event watcher: one a loop, and driven by it.

Each stream has a queue of the events that somebody waits for. The first sets an alarm with the
loop, at the time that the queue's schedule says; after the last wait the alarm is closed. Where
the policy is to block, a thread tells the loop instead when to poll.

An interrupt may strike anywhere, and the next poll does again whatever was left half done:

- A wait is pending exactly as long as it is a key of ``waits``. To give it up is to delete it
  there, which takes no call: nothing can strike half-way. Queues find out by themselves.
- A poll takes events out of a queue only after it has put their waits into ``_over``, and a wait
  out of ``_over`` only after it has notified it. It may notify a wait twice, never zero times.
- The alarm keeps going off until it is set anew, and a poll does that last: a poll that was
  interrupted is repeated. ``_alarm_at`` is never earlier than what the alarm is set to, so the next
  wait sets it if there is any doubt.

All of this runs in the thread of the loop. But a finaliser may close a coroutine, and so give up
a wait, in the middle of any step.
"""

from __future__ import annotations

import logging
import sys
import threading
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Hashable, Sequence
from functools import partial
from math import inf
from time import monotonic
from typing import Any

import torch

from .._errors import own_copy
from .._loops import Alarm, Loop, current, loop_in_this_thread
from .._repr import function_name
from .._threads import BlockingThread, Notify
from ._events import RecordedEvent
from ._policy import get_poll_policy
from ._schedule import LearnedSchedule, Poll, Schedule
from ._statistics import PollStatistics, total
from ._stream_queue import AwaitedEvent, StreamQueue, Wait, search

# Where a thread blocks for a stream, the stream is polled all the same after so many seconds,
# in case the wake-up was interrupted.
_FALLBACK = 1.0
BLOCKER = "torchfut_aio blocker"  # the name of a thread that blocks

Attach = Callable[[Callable[..., None]], object]

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
        # By stream. Streams of a device take turns, so there are not many.
        self._queues: dict[tuple[torch.device, int], StreamQueue] = {}
        self._active: dict[Hashable, StreamQueue] = {}  # those in which somebody may wait, by key
        # The stream of an event that the program has recorded itself is unknown. Each of these
        # events has a queue while somebody waits for it; all on a device share a schedule.
        self._own_schedules: defaultdict[torch.device, Schedule] = defaultdict(new_schedule)
        self._over: deque[Wait] = deque()  # still to be notified

    def statistics(self) -> PollStatistics:
        """Return what this watcher has done."""
        learned = {s: queue.schedule.interval for s, queue in list(self._queues.items())}
        intervals = {stream: interval for stream, interval in learned.items() if interval}
        return PollStatistics(
            pending=len(self.waits),
            polls=self.polls,
            queries=self.queries,
            hits=self.hits,
            intervals=intervals,
        )

    def watch(self, wait: Wait) -> bool:
        """Notifies ``wait``, on the loop, when all its events are reached or one has failed.

        Returns False if they are reached now: then it is not notified. To stop waiting, also if
        this raises, delete the wait from ``waits``.
        """
        missing = [(event, q) for event in wait.missing if (q := self._queue_if_pending(event))]
        if not missing:
            return False
        wait.missing = {event for event, _ in missing}
        # First of all, or else the queues would take the events for given up.
        self.waits[wait] = None
        for event, queue in missing:
            self._add(AwaitedEvent(event, wait), queue)
        self._set_alarm()
        return True

    def notify_when_reached(
        self, events: Sequence[RecordedEvent], notify: Notify, attach: Attach = lambda _: None
    ) -> None:
        """Calls ``notify(error or None)``, on the loop, when all ``events`` are reached.

        At once, if they are now. If it raises, it is called again, with what it raised; if it
        was interrupted, with the same. First of all, ``attach`` gets a function that gives up the
        wait, for whoever is interrupted later.
        """
        wait, error = Wait(events, notify), None
        attach(partial(self.forget, wait))
        try:
            if self.watch(wait):
                return
        except BaseException as exception:
            self.forget(wait)
            if not isinstance(exception, Exception):
                raise
            error = exception.with_traceback(None)
        notify(error)

    def forget(self, wait: Wait, _done: object = None) -> None:
        """Gives up ``wait``; does nothing if it is over."""
        if wait in self.waits:
            del self.waits[wait]
            self.close_if_idle()

    def _add(self, awaited: AwaitedEvent, queue: StreamQueue) -> None:
        queue = self._active.setdefault(queue.key, queue)
        if queue.oldest(self.waits) is None:
            queue.since = max(queue.since, awaited.event.recorded_at)
            self._set_next_poll(queue, awaited.event, monotonic())
        queue.add(awaited, self.waits)

    def _queue_if_pending(self, event: RecordedEvent) -> StreamQueue | None:
        queue = self._queue_of(event)
        if event.ended < queue.reached:
            event.is_reached = True
            return None
        oldest = queue.oldest(self.waits)
        known_pending = oldest is not None and oldest.ended < event.begun
        if not known_pending and self._query(event):
            queue.reached = max(queue.reached, event.begun)
            return None
        return queue

    def _queue_of(self, event: RecordedEvent) -> StreamQueue:
        stream = event.stream
        if stream is None:
            key, schedule = id(event.event), self._own_schedules[event.event.device]
            return self._active.get(key) or StreamQueue(key, schedule)
        queue = self._queues.get(stream)
        if queue is None:
            queue = self._queues[stream] = StreamQueue(stream, self._new_schedule())
        return queue

    def _query(self, event: RecordedEvent) -> bool:
        self.queries += 1
        is_reached = event.query()
        self.hits += is_reached
        return is_reached

    def poll(self) -> None:
        """Polls the queues that are due, and notifies those whose wait is over."""
        if self.waits or self._over:
            self.polls += 1
            self._poll_due()
            self._notify_over()
        if not self.waits:
            # Not at once: a task that has just been woken often waits again.
            self._loop.call_soon(self.close_if_idle)
        # Last of all: up to here it keeps going off.
        self._alarm_at = inf
        self._set_alarm()

    def _poll_due(self) -> None:
        now = monotonic()
        early = 10 * get_poll_policy().min_interval
        for queue in list(self._active.values()):
            # This wake-up also serves queues that are half-way to their own next poll.
            if queue.next_poll - min(queue.next_poll - queue.polled_at, early) / 2 <= now:
                oldest = queue.oldest(self.waits)
                if oldest is not None:
                    try:
                        oldest = self._poll(queue, now)
                    except Exception as error:
                        # Not the device's error: the search catches those.
                        self._settle(queue.events, error)
                        oldest = None
                if oldest is None:
                    self._active.pop(queue.key, None)

    def _poll(self, queue: StreamQueue, now: float) -> RecordedEvent | None:
        """Polls ``queue``; returns the oldest event that somebody still waits for."""
        events = queue.events
        reached, failed, error = search(events, self._query)
        if reached:
            newest = events[reached - 1].event
            queue.reached = max(queue.reached, newest.begun)
            # Those recorded at the same time as the newest may be later on the stream.
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
                awaited.event.is_reached = True
                wait.missing.discard(awaited.event)
            else:
                wait.error = own_copy(error)  # others wait for the same kernel
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
        elif reached:  # and the thread has said so at once
            queue.schedule.observe(Poll(at, at, at, reached))
        if reached:
            queue.since = now

    def _set_next_poll(self, queue: StreamQueue, oldest: RecordedEvent, now: float) -> None:
        queue.polled_at = now
        blocking = get_poll_policy().blocking and oldest.stream is not None
        queue.scheduled = not (blocking and self._block(queue, oldest))
        if queue.scheduled:
            queue.next_poll = queue.since + queue.schedule.next_poll(now - queue.since)
        else:
            queue.next_poll = now + _FALLBACK

    def _block(self, queue: StreamQueue, oldest: RecordedEvent) -> bool:
        """Has the queue polled when ``oldest`` is reached; returns False if no thread starts."""
        queue.blocker = blocker = queue.blocker or BlockingThread(BLOCKER, daemon=False)
        if not blocker.has_work():
            try:
                blocker.submit(partial(self._unblock, queue), oldest.synchronize)
            except Exception:
                return False
        return True

    def _unblock(self, queue: StreamQueue, _error: Exception | None) -> None:
        """Has ``queue`` polled; the thread calls this. The poll will find the error, too."""
        queue.next_poll = queue.polled_at
        self._loop.call_soon(self.poll)

    def _set_alarm(self) -> None:
        queues = list(self._active.values())
        at = 0.0 if self._over else min([q.next_poll for q in queues], default=inf)
        if at < self._alarm_at:
            alarm = self._alarm  # which a finaliser may close, and drop, meanwhile
            if alarm is None:
                alarm = self._alarm = self._loop.alarm(self.poll)
            self._alarm_at = inf  # unknown, until it is set
            alarm.set(max(at - monotonic(), 0.0))
            self._alarm_at = at

    def close_if_idle(self) -> None:
        """Leaves nothing with the loop if nobody waits."""
        if self.waits or self._over:
            return
        for queue in list(self._active.values()):
            queue.events.clear()
        self._active.clear()
        self._alarm_at = inf
        alarm = self._alarm
        if alarm is not None:
            alarm.close()  # if an interrupt strikes now, the next wait sets it again
            self._alarm = None

    def abandon(self) -> None:
        """Gives up all waits: the loop has gone, with the tasks that waited."""
        self.waits.clear()
        self._over.clear()
        self.close_if_idle()

    def __del__(self) -> None:
        if hasattr(self, "_over"):  # unless it was interrupted before it was whole
            self.abandon()
            if not sys.is_finalizing():
                _ended.append(self.statistics())


def _notify(wait: Wait) -> None:
    try:
        wait.notify(wait.error)
    except Exception as error:
        # Whoever waits cannot be told. That concerns this wait only.
        try:
            wait.notify(error)
        except Exception:
            name = function_name(wait.notify)
            _logger.exception("%s raised, and so did telling it of that:", name)


_watchers: weakref.WeakValueDictionary[int, Watcher] = weakref.WeakValueDictionary()  # by id
_ended: list[PollStatistics] = []  # of watchers that are gone: finalisers append to it
_summing = threading.Lock()


def watcher_of(loop: Loop) -> Watcher:
    """Returns the watcher of ``loop``, for its own thread."""
    watcher = loop.watcher
    if watcher is None:
        _sum_up_ended()
        watcher = Watcher(loop)
        _watchers[id(watcher)] = watcher
        loop.watcher = watcher
    assert isinstance(watcher, Watcher)
    return watcher


def until_reached(events: Sequence[RecordedEvent]) -> Generator[Any, Any, None]:
    """Suspends the current task until all ``events`` are reached, or one has failed."""
    loop = current()
    watcher = watcher_of(loop)
    waits = watcher.waits
    wait = Wait(events, lambda _: loop.wake(waiter))
    try:
        if not watcher.watch(wait):
            return
        waiter = loop.waiter()  # in time: the loop notifies when this task has suspended
        yield from waiter
    except BaseException:
        if wait in waits:
            del waits[wait]  # no call, so no interrupt can come before it
        watcher.close_if_idle()
        raise
    if wait.error is not None:
        try:
            # Others may raise the same one: each starts from an empty traceback.
            raise wait.error.with_traceback(None)
        finally:
            del wait


@types.coroutine
def reached(events: Sequence[RecordedEvent]) -> Generator[Any, Any, None]:
    """Waits for recorded events, with a checkpoint even if all are reached; for ``await``."""
    yield from current().checkpoint()
    yield from until_reached(events)


def poll_statistics() -> PollStatistics:
    """Return what the event watcher of the running loop has done, and is doing.

    Where no event loop runs: what those of all loops of the process have, ended ones included.

    Example:
        >>> torchfut_aio.poll_statistics().pending
        0
    """
    if loop_in_this_thread():
        return watcher_of(current()).statistics()
    # Of a list, as other threads may start and end loops meanwhile.
    watchers = [ref() for ref in _watchers.valuerefs()]
    return total([w.statistics() for w in watchers if w is not None] + _ended)


def _sum_up_ended() -> None:
    if len(_ended) > 1 and _summing.acquire(blocking=False):
        try:
            count = len(_ended)
            _ended[:count] = [total(_ended[:count])]
        finally:
            _summing.release()

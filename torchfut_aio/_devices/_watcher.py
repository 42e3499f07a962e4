"""The event watcher: it polls streams on one event loop, and wakes the tasks that wait for them.

Each stream with awaited events has a queue, and a schedule that says when to poll it. One alarm of
the loop is set to the earliest of these times, and closed after the last wait. With
``PollPolicy(blocking=True)``, a thread blocks for a stream instead and then starts the poll.

Everything runs in the thread of the loop. A finaliser may close a coroutine there in the middle of
any step, and so give up a wait.
"""

from __future__ import annotations

import sys
import threading
import types
import weakref
from collections import defaultdict
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from operator import attrgetter
from time import monotonic
from typing import Any

import torch

from .._loops import Alarm, Loop, current, loop_in_this_thread
from .._threads import BlockingThread, Notify
from ._events import RecordedEvent
from ._schedule import LearnedSchedule, Schedule, get_poll_policy
from ._stream_queue import StreamQueue, Wait, Waits

# Seconds until a stream for which a thread blocks is polled nevertheless: an interrupt may have
# stopped the thread's wake-up.
_FALLBACK = 1.0
BLOCKER = "torchfut_aio blocker"  # the name of a thread that blocks

_next_poll = attrgetter("next_poll")


@dataclass(frozen=True, kw_only=True, slots=True)
class PollStatistics:
    """What the event watcher of one loop, or the watchers of all loops, have done and are doing.

    Attributes:
        pending: How many waits for device work are pending now.
        polls: How often the watcher polled pending events.
        queries: How many events it queried.
        hits: How many of these queries found the work done.
        intervals: The learned interval of each stream, by device and stream id: the recent time
            from one awaited piece of work to the next, in seconds.
    """

    pending: int = 0
    polls: int = 0
    queries: int = 0
    hits: int = 0
    intervals: Mapping[tuple[torch.device, int], float] = field(default_factory=dict)


def total(parts: Sequence[PollStatistics]) -> PollStatistics:
    """Return the sums of the parts, and their intervals in one dict."""
    return PollStatistics(
        pending=sum(part.pending for part in parts),
        polls=sum(part.polls for part in parts),
        queries=sum(part.queries for part in parts),
        hits=sum(part.hits for part in parts),
        intervals={stream: seconds for part in parts for stream, seconds in part.intervals.items()},
    )


class Watcher:
    """Watches recorded events for the tasks of one loop."""

    def __init__(self, loop: Loop, new_schedule: Callable[[], Schedule] = LearnedSchedule) -> None:
        self.polls = 0
        self.waits = Waits({})
        self._loop = loop
        self._new_schedule = new_schedule
        self._alarm: Alarm | None = None
        self._alarm_at = inf  # when the alarm fires; inf if unknown, so that the next wait sets it
        # By stream. They are never removed, as a device has few streams, which take turns.
        self._queues: dict[tuple[torch.device, int], StreamQueue] = {}
        self._active: dict[Hashable, StreamQueue] = {}  # those with awaited events, by key
        # The stream of an event that the program has recorded itself is unknown. Such an event has
        # a separate queue while it is awaited. Those of one device share a schedule.
        self._own_schedules: defaultdict[torch.device, Schedule] = defaultdict(new_schedule)

    def statistics(self) -> PollStatistics:
        learned = {s: queue.schedule.interval for s, queue in list(self._queues.items())}
        return PollStatistics(
            pending=len(self.waits.pending),
            polls=self.polls,
            queries=self.waits.queries,
            hits=self.waits.hits,
            intervals={stream: interval for stream, interval in learned.items() if interval},
        )

    def watch(self, wait: Wait) -> bool:
        """Notify ``wait``, on the loop, when all its events are reached or one has failed.

        Return False, and do not notify it, if all are reached now. To give the wait up, or if this
        raises, the caller deletes it from ``waits.pending``.
        """
        queues = [(event, self._queue_of(event)) for event in wait.missing]
        missing = [(event, queue) for event, queue in queues if not queue.is_reached(event)]
        if not missing:
            return False
        wait.missing = {event for event, _ in missing}
        self.waits.pending[wait] = None  # *before* a queue gets it: queues drop other waits
        policy, now = get_poll_policy(), monotonic()
        for event, new_queue in missing:
            queue = self._active.setdefault(new_queue.key, new_queue)
            queue.add(event, wait, now)
            if policy.blocking and queue.polled_at == now:
                self._block(queue, event, now)
        self._set_alarm()
        return True

    def notify_when_reached(
        self, events: Iterable[RecordedEvent], notify: Notify
    ) -> Callable[[object], None]:
        """Call ``notify(error or None)`` on the loop when all ``events`` are reached.

        If they are reached now, call it at once.

        Returns:
            A function of one ignored argument that gives up the wait.
        """
        wait = Wait(notify, {*events})
        give_up, error = partial(self.forget, wait), None
        try:
            if self.watch(wait):
                return give_up
        except BaseException as exception:
            self.forget(wait)
            if not isinstance(exception, Exception):
                raise
            error = exception.with_traceback(None)
        notify(error)
        return give_up

    def forget(self, wait: Wait, _done: object = None) -> None:
        """Give up ``wait``; do nothing if it is over."""
        if wait in self.waits.pending:
            del self.waits.pending[wait]
            self.close_if_idle()

    def _queue_of(self, event: RecordedEvent) -> StreamQueue:
        stream = event.stream
        if stream is None:
            key, schedule = id(event.event), self._own_schedules[event.event.device]
            return self._active.get(key) or StreamQueue(key, schedule, self.waits)
        queue = self._queues.get(stream)
        if queue is None:
            queue = self._queues[stream] = StreamQueue(stream, self._new_schedule(), self.waits)
        return queue

    def poll(self) -> None:
        """Poll the queues that are due, and notify the waits that are over."""
        if self.waits.pending:
            self.polls += 1
            policy, now = get_poll_policy(), monotonic()
            for queue in list(self._active.values()):
                try:
                    oldest = queue.poll(now, 10 * policy.min_interval)
                except Exception as error:
                    # The schedule raised it. The queue handles the errors of the device.
                    queue.fail(list(queue.events), error)
                    oldest = None
                if oldest is None:
                    self._active.pop(queue.key, None)
                elif policy.blocking and queue.polled_at == now:
                    self._block(queue, oldest, now)
        if not self.waits.pending:
            # Not now: a task that has just been woken often waits again.
            self._loop.call_soon(self.close_if_idle)
        # Set the alarm *last*. Until it is set, it keeps firing, so the loop repeats a poll that
        # was interrupted.
        self._alarm_at = inf
        self._set_alarm()

    def _block(self, queue: StreamQueue, oldest: RecordedEvent, now: float) -> None:
        """Let a thread block for ``oldest``, unless its stream is unknown or no thread starts."""
        if oldest.stream is None:
            return
        blocker = queue.blocker = queue.blocker or BlockingThread(BLOCKER, daemon=False)
        scheduled = queue.next_poll
        # *Before* submitting: _unblock() sets the time in the thread, perhaps at once.
        queue.next_poll, queue.scheduled = now + _FALLBACK, False
        if not blocker.has_work():
            try:
                blocker.submit(partial(self._unblock, queue), oldest.synchronize)
            except Exception:
                queue.next_poll, queue.scheduled = scheduled, True

    def _unblock(self, queue: StreamQueue, _error: Exception | None) -> None:
        # The thread calls this. It ignores the error, which the poll finds as well.
        queue.next_poll = queue.polled_at
        self._loop.call_soon(self.poll)

    def _set_alarm(self) -> None:
        at = min(map(_next_poll, list(self._active.values())), default=inf)
        if at < self._alarm_at:
            alarm = self._alarm  # read once: a finaliser may close and drop it in between
            if alarm is None:
                alarm = self._alarm = self._loop.alarm(self.poll)
            self._alarm_at = inf  # unknown, if set() is interrupted
            alarm.set(max(at - monotonic(), 0.0))
            self._alarm_at = at

    def close_if_idle(self) -> None:
        """Remove everything from the loop if nothing is awaited."""
        if self.waits.pending:
            return
        for queue in list(self._active.values()):
            queue.events.clear()
        self._active.clear()
        self._alarm_at = inf
        alarm = self._alarm
        if alarm is not None:
            alarm.close()
            self._alarm = None  # *after* close(): if that is interrupted, the next wait sets it

    def abandon(self) -> None:
        """Give up all waits: the loop has closed."""
        self.waits.pending.clear()
        self.close_if_idle()

    def __del__(self) -> None:
        if hasattr(self, "_own_schedules"):  # otherwise __init__ was interrupted
            self.abandon()
            if not sys.is_finalizing():
                _ended.append(self.statistics())


_watchers: weakref.WeakValueDictionary[int, Watcher] = weakref.WeakValueDictionary()  # by id
_ended: list[PollStatistics] = []  # of closed watchers; finalisers append to it
_summing = threading.Lock()


def watcher_of(loop: Loop) -> Watcher:
    watcher = loop.watcher
    if watcher is None:
        _sum_up_ended()
        watcher = Watcher(loop)
        _watchers[id(watcher)] = watcher
        loop.watcher = watcher
    assert isinstance(watcher, Watcher)
    return watcher


def until_reached(events: Sequence[RecordedEvent]) -> Generator[Any, Any, None]:
    """Suspend the current task until all ``events`` are reached, or one has failed."""
    loop = current()
    watcher = watcher_of(loop)
    pending = watcher.waits.pending
    wait = Wait(lambda _: loop.wake(waiter), {*events})
    try:
        if not watcher.watch(wait):
            return
        waiter = loop.waiter()  # in time: the watcher notifies only after this task has suspended
        yield from waiter
    except BaseException:
        # Not forget(): there is no call before the deletion, so an interrupt cannot prevent it.
        if wait in pending:
            del pending[wait]
        watcher.close_if_idle()
        raise
    if wait.error is not None:
        try:
            # If the error could not be copied, waits share it. Do not add to its traceback.
            raise wait.error.with_traceback(None)
        finally:
            del wait


@types.coroutine
def reached(events: Sequence[RecordedEvent]) -> Generator[Any, Any, None]:
    """Wait for recorded events, with a checkpoint even if all are reached; for ``await``."""
    yield from current().checkpoint()
    yield from until_reached(events)


def poll_statistics() -> PollStatistics:
    """Return what the event watcher of the running loop has done and is doing.

    If no event loop runs in this thread, return the sums of all loops of the process, also of
    closed ones.

    Example:
        >>> torchfut_aio.poll_statistics().pending
        0
    """
    if loop_in_this_thread():
        return watcher_of(current()).statistics()
    # valuerefs() is a list, as other threads may start and close loops at the same time.
    watchers = [ref() for ref in _watchers.valuerefs()]
    return total([w.statistics() for w in watchers if w is not None] + _ended)


def _sum_up_ended() -> None:
    # Not blocking: a signal handler could find the lock locked by this very thread.
    if len(_ended) > 1 and _summing.acquire(blocking=False):
        try:
            count = len(_ended)
            _ended[:count] = [total(_ended[:count])]
        finally:
            _summing.release()

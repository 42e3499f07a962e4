"""The event watcher: one a loop, and driven by it.

Marks on one stream are reached in order. So each stream has a *lane*, its pending marks
in that order, and a look at a lane is one query, of the oldest; further ones only when
that turns out to be reached, and then as few as it takes to find how many are.

The first pending mark sets an alarm with the loop, and the last one closes it. When it
goes off is for `History` to tell; where the policy is to block, a thread tells the loop
when to look instead.

All of this runs in the thread of the loop. But a finaliser may close a coroutine, and so
call `forget`, in the middle of any step: it changes no list, but may put an empty one in
its place, and who goes through one finds entries in it that nobody waits for any more.
"""

from __future__ import annotations

import sys
import threading
import weakref
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import inf
from time import monotonic
from types import MappingProxyType
from typing import NamedTuple

import torch

from .._loops import Alarm, Loop, current, loop_in_this_thread
from ._blocker import Blocker
from ._events import Mark
from ._policy import History, policy

__all__ = ["Statistics", "Wait", "Watcher", "statistics", "watcher_of"]

# Streams come and go. What was learned of those at rest is kept for so many.
_LANES_AT_REST = 256


class Statistics(NamedTuple):
    """What the event watcher of a loop, or those of all, have done and are doing.

    Attributes:
        pending: How many waits for device work are pending now.
        polls: How often the watcher looked at pending events.
        queries: How many events it queried.
        hits: How many of these queries found the work done.
        intervals: The learned interval of each stream, in seconds: how long it was
            lately from one awaited piece of work to the next. By device and stream id.
    """

    pending: int = 0
    polls: int = 0
    queries: int = 0
    hits: int = 0
    intervals: Mapping[tuple[torch.device, int], float] = MappingProxyType({})


class Wait:
    """Somebody who waits for some marks.

    ``notify`` is called once, on the loop, when all are reached, with None, or when the
    device reports an error, with that.
    """

    __slots__ = ("entries", "error", "notify", "over")

    def __init__(self, notify: Callable[[Exception | None], object]) -> None:
        self.notify = notify
        self.error: Exception | None = None
        self.entries: list[_Entry] = []
        self.over = True  # while it is not pending


class _Entry:
    """A mark in a lane; ``wait`` is None while nobody waits for it, and no more."""

    __slots__ = ("lane", "mark", "wait")

    def __init__(self, mark: Mark, lane: _Lane) -> None:
        self.mark = mark
        self.lane = lane
        self.wait: Wait | None = None


class _Lane:
    """The pending marks of one stream, in the order in which they will be reached."""

    __slots__ = (
        "blocked",
        "blocker",
        "history",
        "look_at",
        "missed",
        "pause",
        "pending",
        "reached",
        "since",
        "waited",
    )

    def __init__(self, history: History) -> None:
        self.history = history
        self.pending: list[_Entry] = []
        self.waited = 0  # how many of these somebody waits for
        self.reached = -1  # all marks that ended before this tick are reached
        self.since = 0.0  # from when on the stream has done what it does, for all we know
        self.missed = 0.0  # for how long after that it was seen not to be done
        self.pause = 0.0
        self.look_at = inf
        self.blocker: Blocker | None = None
        self.blocked = False  # a thread waits for a mark of it, and will have it looked at

    def knows_pending(self, mark: Mark) -> bool:
        return self.waited > 0 and self.pending[0].mark.ended < mark.begun


class Watcher:
    """Watches marks for the tasks of one loop."""

    __slots__ = (
        "__weakref__",
        "_alarm",
        "_alarm_at",
        "_event_histories",
        "_event_lanes",
        "_lanes",
        "_loop",
        "_over",
        "_watched",
        "hits",
        "pending",
        "polls",
        "queries",
    )

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._alarm: Alarm | None = None
        self._alarm_at = inf
        self._lanes: dict[tuple[torch.device, int], _Lane] = {}
        # The streams of events that a program has recorded itself are unknown. These have a
        # lane each, by id, while they are waited for.
        self._event_lanes: dict[int, _Lane] = {}
        self._event_histories: dict[torch.device, History] = {}
        self._watched: dict[_Lane, None] = {}  # those in which somebody waits
        self._over: deque[Wait] = deque()  # still to be notified
        self.pending = self.polls = self.queries = self.hits = 0

    def statistics(self) -> Statistics:
        """Returns what this watcher has done."""
        intervals = {
            stream: (lane.history.low + lane.history.high) / 2
            for stream, lane in list(self._lanes.items())
            if lane.history.high
        }
        return Statistics(self.pending, self.polls, self.queries, self.hits, intervals)

    # --------------------------------------------------------------------- waiting

    def watch(self, marks: Iterable[Mark], wait: Wait) -> bool:
        """Has ``wait`` notified, on the loop, when all ``marks`` are reached.

        Returns:
            False if they are reached now: then it is not notified.

        Raises:
            RuntimeError: What the device says of a kernel that failed.
        """
        missing = [(mark, lane) for mark in marks if (lane := self._lane_if_pending(mark))]
        if not missing:
            return False
        self.pending += 1
        wait.over = False
        try:
            self._enter_each(missing, wait)
            self._set_alarm()
        except BaseException:  # Ctrl-C
            self.forget(wait)
            raise
        return True

    # A function of its own: from Python 3.12 on, an interrupt at the jump that closes a loop
    # may miss the ``except`` around it.
    def _enter_each(self, missing: Sequence[tuple[Mark, _Lane]], wait: Wait) -> None:
        now = monotonic()
        for mark, lane in missing:
            if lane.waited == 0:
                self._start(lane, mark, now)
            elif len(lane.pending) > 2 * lane.waited + 16:
                lane.pending = [entry for entry in lane.pending if entry.wait is not None]
            entry = _Entry(mark, lane)
            pending = lane.pending
            # Nearly always last: tasks mostly come in the order of the work.
            insort(pending, entry, key=_begun)
            # From here on it counts. Ctrl-C strikes at calls, and there is none.
            lane.waited += 1
            entry.wait = wait
            wait.entries = [*wait.entries, entry]
            if lane.pending is not pending:  # the last of the others has just left
                lane.pending = [entry]
            self._watched[lane] = None
            if mark.stream is None:
                self._event_lanes[id(mark.event)] = lane

    def tell(self, marks: Iterable[Mark], wait: Wait) -> None:
        """Has ``wait`` notified when all ``marks`` are reached, at once if they are."""
        try:
            if self.watch(marks, wait):
                return
        except Exception as error:
            wait.notify(error)
        else:
            wait.notify(None)

    def forget(self, wait: Wait) -> None:
        """Lets go of who waits no more; does nothing if the wait is over."""
        if not wait.over:
            self._end(wait)
            if self.pending == 0:
                self._close_alarm()

    def _end(self, wait: Wait) -> None:
        wait.over = True
        self.pending -= 1
        for entry in wait.entries:
            self._leave(entry)

    def _leave(self, entry: _Entry) -> None:
        if entry.wait is None:
            return
        entry.wait = None
        lane = entry.lane
        lane.waited -= 1
        if lane.waited == 0:
            lane.pending = []
            self._watched.pop(lane, None)
            self._event_lanes.pop(id(entry.mark.event), None)

    # ----------------------------------------------------------------------- lanes

    def _lane_if_pending(self, mark: Mark) -> _Lane | None:
        if mark.stream is not None:
            lane = self._lanes.get(mark.stream) or self._new_lane(mark.stream)
        else:
            history = self._event_histories.setdefault(mark.device, History())
            lane = self._event_lanes.get(id(mark.event)) or _Lane(history)
        if mark.ended < lane.reached:
            return None
        if not lane.knows_pending(mark) and self._query(mark):
            lane.reached = max(lane.reached, mark.begun)
            return None
        return lane

    def _new_lane(self, stream: tuple[torch.device, int]) -> _Lane:
        if len(self._lanes) >= _LANES_AT_REST:
            self._lanes = {s: lane for s, lane in self._lanes.items() if lane.waited}
        lane = self._lanes[stream] = _Lane(History())
        return lane

    def _query(self, mark: Mark) -> bool:
        self.queries += 1
        reached = mark.event.query()
        self.hits += reached
        return reached

    def _start(self, lane: _Lane, mark: Mark, now: float) -> None:
        lane.pending = []
        lane.since = max(lane.since, now if mark.stream is None else mark.made)
        lane.missed = now - lane.since
        self._decide_on(lane, mark, now)

    def _decide_on(self, lane: _Lane, oldest: Mark, now: float) -> None:
        """Decides when to look at ``lane`` next."""
        if policy().blocking and oldest.stream is not None:
            lane.look_at = inf
            if not lane.blocked:
                lane.blocker = lane.blocker or Blocker()
                look = partial(self._look_at_once, lane)
                # Whoever looks at the event will see the error, too.
                lane.blocker.block(oldest.event.synchronize, lambda _: self._loop.call_soon(look))
                lane.blocked = True  # now that the thread has started; the look comes later
        else:
            lane.pause = lane.history.pause(now - lane.since)
            lane.look_at = now + lane.pause

    # --------------------------------------------------------------------- looking

    def look(self) -> None:
        """Looks at the lanes that are due, and notifies those whose wait is over."""
        self.polls += 1
        self._alarm_at = inf
        try:
            self._look_at_due()
            self._notify_over()
        finally:
            self._set_alarm()
            if not self.pending:
                # Not at once: who has been woken may well be about to wait again.
                self._loop.call_soon(self._close_if_idle)

    # Functions of their own: from Python 3.12 on, an interrupt at the jump that closes a loop
    # may miss the ``finally`` around it.
    def _look_at_due(self) -> None:
        now = monotonic()
        early = 10 * policy().shortest
        for lane in list(self._watched):
            # One wake-up serves those, too, that are half-way to their own.
            if lane.look_at - min(lane.pause, early) / 2 <= now:
                self._look_at(lane, now)

    def _notify_over(self) -> None:
        while self._over:
            # Whom Ctrl-C keeps from being told is told at the next look.
            self._over[0].notify(self._over[0].error)
            self._over.popleft()

    def _close_if_idle(self) -> None:
        if not self.pending and not self._over:
            self._close_alarm()

    def _look_at_once(self, lane: _Lane) -> None:
        lane.blocked = False
        if lane in self._watched:
            lane.look_at = lane.pause = 0.0
            self.look()

    def _look_at(self, lane: _Lane, now: float) -> None:
        lane.history.note_wake_up(lane.pause, now - lane.look_at)
        pending = lane.pending
        count, failed, error = self._find_reached(pending)
        if count:
            newest = pending[count - 1].mark
            lane.reached = max(lane.reached, newest.begun)
            lane.history.learn(lane.missed, now - lane.since)
            lane.since, lane.missed = now, 0.0
            for entry in pending[:count]:
                if entry.mark is newest or entry.mark.ended < newest.begun:
                    self._settle(entry, None)
        else:
            lane.missed = now - lane.since
        for entry in pending[failed:]:
            if entry.mark is pending[failed].mark or entry.mark.begun > pending[failed].mark.ended:
                self._settle(entry, error)
        if count or error or len(pending) > 2 * lane.waited:
            lane.pending = [entry for entry in pending if entry.wait is not None]
        if lane.waited:
            self._decide_on(lane, lane.pending[0].mark, now)

    def _find_reached(self, pending: Sequence[_Entry]) -> tuple[int, int, Exception | None]:
        """Returns how many are reached, from where on they failed, and the error, if any."""
        reached, unknown = 0, len(pending)  # those in between are to be found out about
        failed, error = unknown, None
        at, step = 0, 1
        while reached < unknown:
            try:
                hit = self._query(pending[at].mark)
            except Exception as exception:
                hit, failed, error = False, at, exception
            if hit:
                reached = at + 1
                step *= 2
            else:
                unknown = at
            # As long as there was no miss, ever further; then halfway.
            galloping = unknown == len(pending)
            at = min(reached + step, unknown) - 1 if galloping else (reached + unknown) // 2
        return reached, failed, error

    def _settle(self, entry: _Entry, error: Exception | None) -> None:
        """Ends the wait of an entry, if it waits for no other; or at an error."""
        wait = entry.wait
        if wait is None:
            return
        if error is None and any(e.wait is not None for e in wait.entries if e is not entry):
            self._leave(entry)
            return
        # In this order: who is left out by Ctrl-C in between is told twice, not never.
        wait.error = error
        self._over.append(wait)
        self._end(wait)

    # ---------------------------------------------------------------------- alarm

    def _set_alarm(self) -> None:
        at = 0.0 if self._over else min([lane.look_at for lane in list(self._watched)], default=inf)
        if self._alarm is not None and at == inf:
            self._alarm.set(inf)
        elif at < self._alarm_at:
            self._alarm = self._alarm or self._loop.alarm(self.look)
            self._alarm.set(max(at - monotonic(), 0.0))
            self._alarm_at = at

    def _close_alarm(self) -> None:
        alarm, self._alarm = self._alarm, None
        self._alarm_at = inf
        if alarm is not None:
            alarm.close()

    # ------------------------------------------------------------------- the end

    def abandon(self) -> None:
        """Is told that the loop has gone, with the tasks that waited."""
        waits = [entry.wait for lane in self._watched for entry in lane.pending]
        for wait in waits:
            if wait is not None:
                self.forget(wait)
        self._close_alarm()

    def __del__(self) -> None:
        self.abandon()
        if not sys.is_finalizing():
            _ended.add(self.statistics())


def _begun(entry: _Entry) -> int:
    return entry.mark.begun


class _Ended:
    """What watchers have done whose loops have gone; kept short by whoever comes by."""

    def __init__(self) -> None:
        self._parts: list[Statistics] = []
        self._summing = threading.Lock()

    def add(self, part: Statistics) -> None:
        """Adds a part; a finaliser may, in the middle of anything."""
        self._parts.append(part)
        if len(self._parts) > 50 and self._summing.acquire(blocking=False):
            try:
                count = len(self._parts)
                self._parts[:count] = [_sum(self._parts[:count])]
            finally:
                self._summing.release()

    def parts(self) -> list[Statistics]:
        """Returns the parts, some of them summed up."""
        return list(self._parts)


_watchers: weakref.WeakValueDictionary[int, Watcher] = weakref.WeakValueDictionary()  # by id
_ended = _Ended()


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
    return _sum([w.statistics() for w in watchers if w is not None] + _ended.parts())


def _sum(parts: Iterable[Statistics]) -> Statistics:
    pending = polls = queries = hits = 0
    intervals: dict[tuple[torch.device, int], float] = {}
    for part in parts:
        pending += part.pending
        polls += part.polls
        queries += part.queries
        hits += part.hits
        intervals.update(part.intervals)
    return Statistics(pending, polls, queries, hits, intervals)

"""What was recorded, in the Trace Event Format of Chrome, which Perfetto opens.

A thread is a line, as in the traces of ``torch.profiler``; so is each task, below the threads.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .._loops import Waiter

# For lines of tasks: beyond the ids of threads, within the 32 bits of Perfetto.
_FIRST_TASK = 1 << 30
_CATEGORY = "torchfut_aio"


class Moment(NamedTuple):
    """When, on the clock of ``perf_counter``, and in which thread, by its native id."""

    time: float
    thread: int
    name: str


@dataclass(slots=True)
class Wait:
    """A wait of a task or a thread, for the future of that id."""

    future: int
    waiter: Waiter
    blocked: Moment | None = None  # the thread, if it is one that waits
    completed: Moment | None = None
    ended: float | None = None


class Step(NamedTuple):
    """A callback that ran."""

    future: int
    name: str
    start: Moment
    ended: float


class Trace(NamedTuple):
    """What was recorded until now; ``epoch`` and a time are nanoseconds of ``time.time_ns``."""

    events: list[Wait | Step]
    now: float
    epoch: int


def save(trace: Trace, path: Path, profile: Path | None) -> None:
    """Writes the trace to a file, together with what is in another, of ``torch.profiler``."""
    # Times count from a base that is near: as numbers of JSON, they are not exact otherwise.
    whole: dict[str, Any] = {"traceEvents": [], "baseTimeNanoseconds": trace.epoch}
    if profile is not None:
        whole = json.loads(profile.read_text())
    writer = _Writer(trace.now, trace.epoch - whole.get("baseTimeNanoseconds", 0))
    for event in sorted(trace.events, key=_start):
        if isinstance(event, Wait):
            writer.wait(event)
        else:
            line = writer.thread(event.start)
            writer.slice(line, event.name, event.start.time, event.ended, event.future)
    whole["traceEvents"] += writer.events
    path.write_text(json.dumps(whole))


def _start(event: Wait | Step) -> float:
    return event.start.time if isinstance(event, Step) else event.waiter.since or 0.0


class _Writer:
    """Makes the events of the format."""

    def __init__(self, now: float, offset: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._now = now
        self._offset = offset
        self._process = os.getpid()
        self._threads: set[int] = set()
        # The lines of the tasks of a name, and until when each is taken: tasks may share a name.
        self._tasks: dict[str, dict[int, float]] = {}
        self._count = itertools.count()

    def thread(self, moment: Moment) -> int:
        """Returns the line of a thread."""
        if moment.thread not in self._threads:
            self._threads.add(moment.thread)
            self._name(moment.thread, f"thread {moment.name}")
        return moment.thread

    def _task(self, name: str, start: float, end: float) -> int:
        lines = self._tasks.setdefault(name, {})
        line = next((line for line, until in lines.items() if until <= start), None)
        if line is None:
            line = _FIRST_TASK + next(self._count)
            self._name(line, name)
        lines[line] = end
        return line

    def wait(self, wait: Wait) -> None:
        """Shows a wait: until the future was completed, and until the task went on."""
        start = wait.waiter.since or 0.0
        end = self._now if wait.ended is None else wait.ended
        if wait.blocked is not None:
            line = self.thread(wait.blocked)
        else:
            line = self._task(f"{wait.waiter.kind} {wait.waiter.name}", start, end)
        done = wait.completed
        until = end if done is None else min(done.time, end)
        given_up = done is None and wait.ended is not None
        self.slice(line, "waits, and gives up" if given_up else "waits", start, until, wait.future)
        if done is None:
            return
        by = self.thread(done)
        self.slice(by, "completes", until, until, wait.future)
        if wait.blocked is None:
            self.slice(line, "has yet to go on", until, end, wait.future)
            arrow: dict[str, Any] = {"name": "completes", "cat": _CATEGORY, "id": next(self._count)}
            self._add("s", by, until, **arrow)
            self._add("f", line, until, bp="e", **arrow)

    def slice(self, line: int, name: str, start: float, end: float, future: int) -> None:
        """Shows something that takes time."""
        arguments = {"future": f"{future:#x}"}
        duration = (self._nanoseconds(end) - self._nanoseconds(start)) / 1e3
        self._add("X", line, start, name=name, cat=_CATEGORY, dur=duration, args=arguments)

    def _name(self, line: int, name: str) -> None:
        self._add("M", line, 0, name="thread_name", args={"name": name})

    def _add(self, phase: str, line: int, seconds: float, **more: Any) -> None:
        time = self._nanoseconds(seconds) / 1e3
        self.events.append({"ph": phase, "pid": self._process, "tid": line, "ts": time, **more})

    def _nanoseconds(self, seconds: float) -> int:
        return int(seconds * 1e9) + self._offset

"""The Trace Event Format of Chrome, which ``torch.profiler`` writes and Perfetto opens.

Each thread has a line, the same as in a trace of ``torch.profiler``, and each task has a line below
them. A library that writes this format would replace only `_add`. Perfetto's own format cannot
include a trace of ``torch.profiler``.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

# The first id of a task. Ids of threads are lower, and Perfetto takes 32 bits.
_FIRST_TASK = 1 << 30


class Thread(NamedTuple):
    native_id: int
    name: str


@dataclass(eq=False, slots=True)
class Span:
    """A wait, or a callback that ran. Times are those of ``perf_counter``.

    Attributes:
        future: The id of the future.
        thread: The thread that waits or ran the callback; None if a task waits.
        completed: When and in which thread the future was completed.
        ended: None while it has not ended.
    """

    name: str | None
    future: int
    start: float
    thread: Thread | None = None
    is_wait: bool = True
    completed: tuple[float, Thread] | None = None
    ended: float | None = None


class TraceEvents:
    """The events of the format that show some spans.

    Args:
        epoch: The number of nanoseconds to add to times of ``perf_counter``.
    """

    def __init__(self, spans: list[Span], epoch: int) -> None:
        self.all: list[dict[str, Any]] = []
        self._epoch = epoch
        self._now = perf_counter()
        self._threads: set[Thread] = set()
        # For each name of a task, its lines, and the time until which each is in use. Tasks may
        # share a name.
        self._tasks: dict[str, dict[int, float]] = {}
        self._count = itertools.count()
        for span in sorted(spans, key=lambda span: span.start):
            self._show(span)

    def _show(self, span: Span) -> None:
        end = self._now if span.ended is None else span.ended
        line = self._line_of_task(span, end) if span.thread is None else self._line(span.thread)
        if not span.is_wait:
            self._slice(str(span.name), line, span.start, end, span)
        elif span.completed is None:
            name = "waits" if span.ended is None else "waits, and gives up"
            self._slice(name, line, span.start, end, span)
        else:
            time, thread = span.completed
            until, by = min(time, end), self._line(thread)
            self._slice("waits", line, span.start, until, span)
            self._slice("completes", by, until, until, span)
            if span.thread is None:
                self._slice("has yet to go on", line, until, end, span)
                arrow = {"name": "completes", "cat": "torchfut_aio", "id": next(self._count)}
                self._add("s", by, until, **arrow)
                self._add("f", line, until, bp="e", **arrow)

    def _line(self, thread: Thread) -> int:
        if thread not in self._threads:
            self._threads.add(thread)
            self._name_line(thread.native_id, f"thread {thread.name}")
        return thread.native_id

    def _line_of_task(self, span: Span, end: float) -> int:
        name = f"task {span.name}"
        lines = self._tasks.setdefault(name, {})
        line = next((line for line, taken in lines.items() if taken <= span.start), None)
        if line is None:
            line = _FIRST_TASK + next(self._count)
            self._name_line(line, name)
        lines[line] = end
        return line

    def _name_line(self, line: int, name: str) -> None:
        self._add("M", line, 0, name="thread_name", args={"name": name})

    def _slice(self, name: str, line: int, start: float, end: float, span: Span) -> None:
        about = {"name": name, "cat": "torchfut_aio", "args": {"future": f"{span.future:#x}"}}
        self._add("X", line, start, dur=(end - start) * 1e6, **about)

    def _add(self, phase: str, line: int, seconds: float, **more: Any) -> None:
        time = (int(seconds * 1e9) + self._epoch) / 1e3  # microseconds
        self.all.append({"ph": phase, "pid": os.getpid(), "tid": line, "ts": time, **more})

"""Records waits and callbacks, from the moment that somebody follows a future until the end.

While a recording is on, it stands in three places: where a waiter is added, where a callback is
added, and in ``Future.__await__``, the only place that sees a task go on. What it stores with the
future wraps what would be there without it, and goes when that goes: so it keeps nothing alive,
and whoever followed a future while it was on is served by it afterwards, too.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from time import perf_counter, perf_counter_ns, time_ns
from types import TracebackType
from typing import Any

from .. import _core, _loops
from .._future import Future
from .._loops import Waiter, Waker
from ._trace import Moment, Step, Trace, Wait, save

_add_waiter = _core.add_waiter
_add_callback = _core.add_callback
_await = Future.__await__


class Recording:
    """Notes who waits for which future, and who completes it, while its ``with`` block runs.

    Meanwhile `pending_futures` knows since when each waits. One recording may be on at a time, for
    all threads and loops of the process. An await takes two to three times as long meanwhile.
    Waits for a `torchfut_aio.ValueStream` are not shown.

    Args:
        max_events: How many waits and callbacks it keeps at most: the last ones.

    Raises:
        RuntimeError: When the block is entered: another recording is on.

    Example:
        >>> import json, pathlib, tempfile
        >>> from torchfut_aio import Future, debug
        >>> path = pathlib.Path(tempfile.mkdtemp(), "trace.json")
        >>> with debug.Recording() as recording:
        ...     fut = Future()
        ...     fut.add_done_callback(lambda fut: None)
        ...     fut.set_result(5)
        >>> recording.save(path)  # open it in https://ui.perfetto.dev
        >>> len(json.loads(path.read_text())["traceEvents"]) > 0
        True
    """

    def __init__(self, *, max_events: int = 100_000) -> None:
        self._ended: deque[Wait | Step] = deque(maxlen=max_events)
        self._live: dict[int, Wait] = {}
        self._epoch = time_ns() - perf_counter_ns()

    def __enter__(self) -> Recording:
        global _on
        with _switching:
            if _on is not None:
                raise RuntimeError("another Recording is on; one may be at a time")
            try:
                _on = self
                _core.replace_add_functions(_recorded_waiter, _recorded_callback)
                Future.__await__ = _recorded_await  # type: ignore[assignment, method-assign]
            except BaseException:  # or the block would not be entered, and nothing would switch off
                _switch_off()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _switching:
            _switch_off()

    def save(
        self, path: str | os.PathLike[str], *, profile: str | os.PathLike[str] | None = None
    ) -> None:
        """Writes what was recorded as a trace in Chrome's format, which Perfetto opens.

        Each task has a line of its own that shows when it waited, and from when to when it had
        yet to go on after its future was completed; an arrow leads there from the thread that
        completed it. Threads show when they blocked, completed, and ran callbacks. What still
        waits now is shown until now.

        Args:
            path: Where to write it.
            profile: A trace that ``torch.profiler`` has exported, in this process: what it shows
                is written there, too, on the same time.
        """
        now = perf_counter()
        events = [*self._ended.copy(), *[*self._live.values()]]
        trace = Trace(events, now, self._epoch)
        save(trace, Path(path), None if profile is None else Path(profile))

    def _begin(self, wait: Wait) -> None:
        """Notes that a wait has begun."""
        self._live[id(wait)] = wait

    def _end(self, event: Wait | Step) -> None:
        """Notes that a wait has ended, or a callback."""
        self._live.pop(id(event), None)
        self._ended.append(event)

    def _forget(self, wait: Wait) -> None:
        """Notes that a wait did not take place, as the future was done."""
        self._live.pop(id(wait), None)


_on: Recording | None = None
_switching = threading.Lock()


def _switch_off() -> None:
    global _on
    Future.__await__ = _await  # type: ignore[method-assign]
    _core.replace_add_functions(_add_waiter, _add_callback)
    _on = None


class _ThisThread(threading.local):
    native_id: int  # to ask for it is a system call
    name: str | None = None
    starting: Wait | None = None  # of the task that is about to add a waiter


_this_thread = _ThisThread()


def _here() -> Moment:
    """Returns the time, and the thread."""
    name = _this_thread.name
    if name is None:
        # Not current_thread(), which would register a thread that is not Python's for ever.
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        _this_thread.native_id = threading.get_native_id()
        name = _this_thread.name = names.get(threading.get_ident(), "of C++")
    return Moment(perf_counter(), _this_thread.native_id, name)


def _recorded_await(future: Future[Any], _ready: bool = True) -> Generator[Any, Any, Any]:
    recording, wait = _on, None
    if recording is not None and not future.done():
        task = Waiter(kind="task", name=_loops.current().current_task_name(), since=perf_counter())
        wait = _this_thread.starting = Wait(id(future), task)
        recording._begin(wait)
    try:
        return (yield from _await(future, _ready))
    finally:
        if recording is not None and wait is not None:
            wait.ended = perf_counter()
            if wait.completed is None and future.done():
                recording._forget(wait)
            else:
                recording._end(wait)
        del future  # as in Outcome.read()


def _recorded_waiter(future: Future[Any], waiter: Any, waker: Waker) -> bool:
    recording, wait = _on, _this_thread.starting
    _this_thread.starting = None
    if recording is None:
        return _add_waiter(future, waiter, waker)
    if wait is None or wait.future != id(future):
        here, described = _here(), waker.describe(waiter)
        if described.kind == "thread":
            wait = Wait(id(future), Waiter(kind="thread", name=here.name, since=here.time), here)
            recording._begin(wait)
        else:  # a copy for asyncio
            wait = Wait(id(future), replace(described, since=here.time))
    return _add_waiter(future, waiter, _RecordedWaker(recording, wait, waker))


class _RecordedWaker:
    """Wakes one waiter, and notes when; goes when the wait has ended."""

    __slots__ = ("_recording", "_wait", "_waker")

    def __init__(self, recording: Recording, wait: Wait, waker: Waker) -> None:
        self._recording = recording
        self._wait = wait
        self._waker = waker

    @property
    def closed(self) -> bool:
        return self._waker.closed

    def wake(self, waiter: Any, /) -> None:
        self._note()
        self._waker.wake(waiter)

    def wake_all(self, waiters: list[Any], /) -> None:
        self._note()
        self._waker.wake_all(waiters)

    def describe(self, waiter: Any, /) -> Waiter:
        recorded, now = self._wait.waiter, self._waker.describe(waiter)
        return replace(recorded, name=now.name or recorded.name, where=now.where)

    def _note(self) -> None:
        if self._wait.completed is None:  # or it is done again, as the first time was interrupted
            self._wait.completed = _here()

    def __del__(self) -> None:
        wait = self._wait
        if wait.blocked is not None:  # tasks tell themselves
            wait.ended = perf_counter() if wait.completed is None else wait.completed.time
            self._recording._end(wait)


def _recorded_callback(future: Future[Any], callback: _core.DoneCallback) -> None:
    recording = _on
    _add_callback(future, callback if recording is None else _RecordedCallback(recording, callback))


class _RecordedCallback(_core.DoneCallback):
    """Runs a callback, and notes when; equal to that, so that whoever added it can remove it."""

    __slots__ = ("_callback", "_recording", "since", "uses_streams")

    def __init__(self, recording: Recording, callback: _core.DoneCallback) -> None:
        self._recording = recording
        self._callback = callback
        self.uses_streams = callback.uses_streams
        self.since = perf_counter()

    @property
    def name(self) -> str:
        return self._callback.name

    def is_for(self, function: object) -> bool:
        return self._callback.is_for(function)

    def run(self, future: Any) -> None:
        start, name = _here(), self._callback.name
        try:
            self._callback.run(future)
        finally:
            self._recording._end(Step(id(future), name, start, perf_counter()))

    def fail(self, future: Any, error: BaseException) -> None:
        self._callback.fail(future, error)

    def __hash__(self) -> int:
        return hash(self._callback)

    def __eq__(self, other: object) -> bool:
        return other is self or other is self._callback

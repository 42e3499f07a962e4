"""Recordings of waits and callbacks.

While a recording is on, it replaces four methods: `Future.__await__`, `Future._block`, and the
constructors of the two kinds of callbacks. Nothing else in the package knows of it, so it costs
nothing while it is off. It wraps the waiters and callbacks that futures store, and the wrappers
continue to work after it is off.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter, perf_counter_ns, time_ns
from types import TracebackType
from typing import Any

from .. import _core, _loops
from .._dependent import DependentFuture
from .._errors import WAIT_BLOCKS
from .._future import Future
from .._loops import Waiter, Waker
from .._repr import function_name
from ._trace import Span, Thread, TraceEvents


class Recording:
    """Record which task or thread waits for which future, and which thread completes it.

    It records while its ``with`` block runs. `pending_futures` then knows when each wait began.
    One recording may be on at a time, for all threads and loops of the process. An await takes two
    to three times as long while it is on. Waits for a `torchfut_aio.ValueStream` are not shown, nor
    are callbacks of this package itself, such as those of ``gather``.

    Args:
        max_events: How many waits and callbacks it keeps; older ones are dropped.

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
        self._ended: deque[Span] = deque(maxlen=max_events)
        self._waits: set[Span] = set()  # those that have not ended
        self._epoch = time_ns() - perf_counter_ns()

    def __enter__(self) -> Recording:
        global _on
        with _switching:
            if _on is not None:
                raise RuntimeError("another Recording is on; one may be at a time")
            try:
                _on = self
                _replace_methods(_RECORDED)
            except BaseException:  # the block is not entered, so its end would not switch it off
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
        """Write the recorded waits and callbacks as a trace in Chrome's format, for Perfetto.

        Each task has a line that shows when it waited, and the time from the completion of its
        future until it ran again. An arrow leads there from the thread that completed the future.
        The line of a thread shows when it blocked, completed futures, and ran callbacks. A wait
        that has not ended is shown until now.

        Args:
            path: The file to write.
            profile: A trace that ``torch.profiler`` has exported in this process. The file then
                also has the events of that trace, on the same time scale.
        """
        # Times count from a recent base: numbers of JSON are not exact for times since 1970.
        trace: dict[str, Any] = {"traceEvents": [], "baseTimeNanoseconds": self._epoch}
        if profile is not None:
            trace = json.loads(Path(profile).read_text())
        spans = [*self._ended.copy(), *self._waits.copy()]
        events = TraceEvents(spans, self._epoch - trace.get("baseTimeNanoseconds", 0))
        trace["traceEvents"] += events.all
        Path(path).write_text(json.dumps(trace))

    def _begin(self, wait: Span) -> None:
        self._waits.add(wait)

    def _end(self, span: Span, future: Future[Any]) -> None:
        span.ended = perf_counter()
        self._waits.discard(span)
        # If the future is done and woke nothing, it was done before the wait began.
        if span.completed is not None or not span.is_wait or not future.done():
            self._ended.append(span)


_on: Recording | None = None
_switching = threading.Lock()


def _switch_off() -> None:
    global _on
    _replace_methods(_ORIGINAL)
    _on = None


def _replace_methods(methods: dict[tuple[type[Any], str], Any]) -> None:
    for (kind, name), method in methods.items():
        setattr(kind, name, method)


class _ThisThread(threading.local):
    thread: Thread | None = None  # cached, as reading its native id is a system call


_this_thread = _ThisThread()


def _here() -> Thread:
    thread = _this_thread.thread
    if thread is None:
        # Not current_thread(), which would register a thread of C++ permanently.
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        name = names.get(threading.get_ident(), "of C++")
        thread = _this_thread.thread = Thread(threading.get_native_id(), name)
    return thread


# -------------------------------------------------------------------------------------- waits


@dataclass(eq=False, slots=True)
class _RecordedWaker:
    """Wake a waiter as ``waker`` does, and record the time."""

    wait: Span
    waker: Waker

    @property
    def closed(self) -> bool:
        return self.waker.closed

    def wake(self, waiter: Any, /) -> None:
        self._note()
        self.waker.wake(waiter)

    def wake_all(self, waiters: list[Any], /) -> None:
        self._note()
        self.waker.wake_all(waiters)

    def describe(self, waiter: Any, /) -> Waiter:
        now = self.waker.describe(waiter)
        return replace(now, name=now.name or self.wait.name, since=self.wait.start)

    def _note(self) -> None:
        if self.wait.completed is None:  # a completion that was interrupted wakes twice
            self.wait.completed = perf_counter(), _here()


def _recorded_await(future: Future[Any], _ready: bool = True) -> Generator[Any, Any, Any]:
    recording, wait = _on, None
    try:
        if recording is not None and not future.done():
            name = _loops.current().current_task_name()
            wait = Span(name, id(future), perf_counter())
            recording._begin(wait)
            yield from _recorded_wait(future, wait)  # after this, at most kernels are running
        return (yield from _await(future, _ready))
    finally:
        if recording is not None and wait is not None:
            recording._end(wait, future)
        del future  # as in Outcome.read()


def _recorded_wait(future: Future[Any], wait: Span) -> Generator[Any, Any, None]:
    if isinstance(future, DependentFuture):
        future.check()
    loop = _loops.current()
    waiter = loop.waiter()
    try:
        if _core.add_waiter(future, waiter, _RecordedWaker(wait, loop)):
            yield from waiter
    finally:
        _core.remove(future, waiter)
        del future


def _recorded_block(future: Future[Any], timeout: float | None, warning: str = WAIT_BLOCKS) -> Any:
    recording = _on
    if recording is None:
        return _block(future, timeout, warning)
    here = _here()
    wait = Span(here.name, id(future), perf_counter(), here)
    recording._begin(wait)
    try:
        return _block(future, timeout, warning, _RecordedWaker(wait, _loops.THREADS))
    finally:
        recording._end(wait, future)


# ---------------------------------------------------------------------------------- callbacks


class RecordedFunction(partial[Any]):
    """Call a function, and record the time.

    It equals the function, which can thus be removed. As it is a partial, logs and lists show the
    name of the function.

    Attributes:
        since: When it was added, on the clock of ``perf_counter``.
    """

    since: float
    recording: Recording
    function: Callable[[Any], object]

    def __call__(self, future: Any) -> Any:
        span = Span(function_name(self), id(future), perf_counter(), _here(), is_wait=False)
        try:
            return super().__call__(future)
        finally:
            self.recording._end(span, future)

    def __eq__(self, other: object) -> bool:
        return self.function == other

    __hash__ = None  # type: ignore[assignment]


def _recorded(function: Callable[[Any], object]) -> Callable[[Any], object]:
    recording = _on
    if recording is None:
        return function
    recorded = RecordedFunction(function)
    recorded.since, recorded.recording, recorded.function = perf_counter(), recording, function
    return recorded


def _init_function_callback(self: Any, function: Callable[[Any], object]) -> None:
    _function_callback(self, _recorded(function))


def _init_then_callback(self: Any, function: Callable[[Any], object], child: Any) -> None:
    _then_callback(self, _recorded(function), child)


# ------------------------------------------------------------------------ what it replaces

_RECORDED: dict[tuple[type[Any], str], Any] = {
    (Future, "__await__"): _recorded_await,
    (Future, "_block"): _recorded_block,
    (_core.FunctionCallback, "__init__"): _init_function_callback,
    (_core.ThenCallback, "__init__"): _init_then_callback,
}
_ORIGINAL = {(kind, name): getattr(kind, name) for kind, name in _RECORDED}
_await, _block, _function_callback, _then_callback = _ORIGINAL.values()

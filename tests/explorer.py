"""Interrupt code at each point where CPython could raise an exception, one point per run.

CPython checks for signals on entry to a Python function, after a call, and at a backward jump; a
KeyboardInterrupt can be raised there. MemoryError and RecursionError can replace any call. ::

    for interrupt in interrupts(torchfut_aio._timeouts):
        source = Future()
        with interrupt:
            child = with_timeout(source, 0.01)
        ...  # check the promise, which must hold whether interrupt.raised or not

The loop ends after the first run that ends before it reaches its point.
"""

from __future__ import annotations

import dis
import functools
import gc
import itertools
import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from torchfut_aio._extension import use_extension

__all__ = ["Interrupt", "freeze", "interrupts"]


def interrupts(
    *modules: ModuleType,
    every: int = 1,
    first: int = 0,
    error: type[BaseException] = KeyboardInterrupt,
    do: Callable[[], object] | None = None,
    at: str = "signals",
    thread: str | None = None,
    in_c: bool = False,
) -> Iterator[Interrupt]:
    """Yield one interrupt for each point in the code of ``modules``: context managers, one per run.

    Args:
        *modules: The modules to interrupt; a package includes all its modules.
        every: Use every n-th point only.
        first: The number of the first point.
        error: The exception to raise.
        do: A function to call at the point instead of raising: a possible step of another thread.
        at: "signals", where CPython checks for signals; "calls", in place of each call; or
            "instructions", before each of them: without a GIL, another thread may run there.
        thread: The name of a thread, started within the context, to interrupt; None for the thread
            that enters the context.
        in_c: Whether the hot paths run in C, if the extension was built. Only what they call in
            Python is interrupted then.
    """
    files = tuple(map(_files, modules))
    gc.collect()  # or the finalisers of earlier runs could be interrupted
    try:
        for number in itertools.count(first, every):
            use_extension(in_c)  # again each time, as an earlier generator may end late
            interrupt = Interrupt(number, files, error, do, at, thread)
            yield interrupt
            if interrupt.where is None:
                assert number > first, "nothing was interrupted"
                return
    finally:
        _watch(())
        use_extension(True)


def _files(module: ModuleType) -> str:
    assert module.__file__ is not None
    if hasattr(module, "__path__"):
        return os.path.dirname(module.__file__) + os.sep
    return module.__file__


class Interrupt:
    """One interrupt; suppresses its own error at the end of the context.

    Attributes:
        where: The point that was interrupted, as text; None if it was not reached.
        raised: Whether the error has propagated to the end of the context. From a finaliser it
            does not propagate.
    """

    def __init__(
        self,
        number: int,
        files: tuple[str, ...],
        error: type[BaseException],
        do: Callable[[], object] | None,
        at: str,
        thread: str | None,
    ) -> None:
        self.where: str | None = None
        self.raised = False
        self.error = error(f"interrupt {number}")
        self.thread = thread
        self._left = number
        self.files = files
        self._do = do
        self._points = {"signals": _signal_points, "calls": _calls, "instructions": _all}[at]
        self._tracer = (_Settrace if sys.version_info < (3, 12) else _Monitoring)(self)
        self._frames: dict[FrameType, _PointsOfFrame] = {}

    def __repr__(self) -> str:
        return f"<{self.error!r} at {self.where}>"

    def __enter__(self) -> Interrupt:
        self._entered_by = threading.get_ident()
        self._outside = {frame for frame, _ in traceback.walk_stack(sys._getframe())}
        self._collects = gc.isenabled()
        gc.disable()  # do not interrupt the finalisers of earlier runs
        self._tracer.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self._tracer.stop()
        if self._collects:
            gc.enable()
        self._frames.clear()
        self._outside.clear()
        self.raised = error is self.error
        return self.raised

    def points_of(self, frame: FrameType) -> _PointsOfFrame | None:
        """Return the points of a frame, or None if the frame must not be interrupted."""
        if self.where is not None or not frame.f_code.co_filename.startswith(self.files):
            return None
        if frame in self._outside or not self._is_chosen_thread():
            return None
        points = self._frames.get(frame)
        if points is None:
            points = self._frames[frame] = _PointsOfFrame(self, *self._points(frame.f_code))
        return points

    def _is_chosen_thread(self) -> bool:
        if self.thread is None:
            return threading.get_ident() == self._entered_by
        return threading.current_thread().name == self.thread

    def pass_point(self, frame: FrameType) -> None:
        """Count this point; interrupt if it is the chosen one."""
        self._left -= 1
        if self._left != -1:
            return
        code = frame.f_code
        name = getattr(code, "co_qualname", code.co_name)
        self.where = f"{name}, {os.path.basename(code.co_filename)}:{frame.f_lineno}"
        if self._do is None:
            raise self.error
        self._do()


class _PointsOfFrame:
    """The points of a frame, and the last instruction that it ran.

    It has no reference to the frame: that would be a cycle, which only the collector frees.
    """

    __slots__ = ("after", "at", "handlers", "interrupt", "last")

    def __init__(
        self,
        interrupt: Interrupt,
        at: frozenset[int],
        after: frozenset[int],
        handlers: frozenset[int],
    ) -> None:
        self.interrupt, self.at, self.after, self.handlers = interrupt, at, after, handlers
        self.last = -1

    def step(self, frame: FrameType) -> None:
        """Count this instruction if it is a point. A series spends most of its time here."""
        last = self.last
        self.last = now = frame.f_lasti
        if now in self.at or (last in self.after and now not in self.handlers):
            self.interrupt.pass_point(frame)

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode":
            self.step(frame)
        return self.trace


class _Settrace:
    """Traces instructions on CPython 3.11. From 3.12 on, settrace skips some, or crashes."""

    def __init__(self, interrupt: Interrupt) -> None:
        self._interrupt = interrupt

    def start(self) -> None:
        self._before = sys.gettrace(), threading.gettrace()
        threading.settrace(self._enter_frame)
        if self._interrupt.thread is None:
            sys.settrace(self._enter_frame)

    def stop(self) -> None:
        sys.settrace(self._before[0])
        threading.settrace(self._before[1])  # type: ignore[arg-type]

    def _enter_frame(self, frame: FrameType, event: str, arg: object) -> Any:
        points = self._interrupt.points_of(frame)
        if points is None:
            return None
        frame.f_trace_opcodes = True
        return points.trace


class _Monitoring:
    """Traces instructions from CPython 3.12 on, by events that stay enabled for a whole series."""

    def __init__(self, interrupt: Interrupt) -> None:
        self._interrupt = interrupt

    def start(self) -> None:
        _watch(self._interrupt.files)
        _monitoring.register_callback(TOOL, _monitoring.events.INSTRUCTION, self._step)

    def stop(self) -> None:
        _monitoring.register_callback(TOOL, _monitoring.events.INSTRUCTION, None)

    def _step(self, code: CodeType, offset: int) -> None:
        frame = sys._getframe(1)
        points = self._interrupt.points_of(frame)
        if points is not None:
            points.step(frame)


TOOL = 4
_monitoring: Any = getattr(sys, "monitoring", None)  # from CPython 3.12 on
_watched: tuple[str, ...] = ()


def _watch(files: tuple[str, ...]) -> None:
    """Enable the events of these files, and disable those of the previous files.

    For the whole package that takes milliseconds, and without a GIL tens of them: longer than most
    runs. So it is done once per series.
    """
    global _watched
    if files == _watched or _monitoring is None:
        return
    if _watched:
        for code in _codes(_watched):
            _monitoring.set_local_events(TOOL, code, 0)
        _monitoring.free_tool_id(TOOL)
    _watched = files
    if files:
        _monitoring.use_tool_id(TOOL, "explorer")
        for code in _codes(files):
            _monitoring.set_local_events(TOOL, code, _monitoring.events.INSTRUCTION)


_frozen: weakref.WeakSet[FunctionType] = weakref.WeakSet()


def freeze() -> None:
    """Exempt all present objects from garbage collection.

    PyTorch alone creates hundreds of thousands. Each collection during a test, and each series of
    interrupts, would take a tenth of a second longer.
    """
    gc.collect()
    _frozen.update(thing for thing in gc.get_objects() if type(thing) is FunctionType)
    gc.freeze()


@functools.cache
def _codes(files: tuple[str, ...]) -> list[CodeType]:
    """Return all code objects of these files. Finding them is slow, so the result is cached."""
    return [
        code
        for thing in itertools.chain(_frozen, gc.get_objects())
        if type(thing) is FunctionType and thing.__code__.co_filename.startswith(files)
        for code in _with_nested(thing.__code__)
    ]


def _with_nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_nested(constant)


# Three sets of offsets. A point is at an offset of the first set, or directly after one of the
# second set, unless it is in the third.
_Points = tuple[frozenset[int], frozenset[int], frozenset[int]]


@functools.cache
def _signal_points(code: CodeType) -> _Points:
    instructions = {i.offset: i for i in dis.get_instructions(code)}
    called = {offset for offset, i in instructions.items() if _is_call(i)}
    backward = {
        offset
        for offset, i in instructions.items()
        if "JUMP" in i.opname and isinstance(i.argval, int) and i.argval <= offset
    }
    # Tracing may begin after the RESUME at which a function begins or a generator resumes. A RESUME
    # within a yield from or an await is no point.
    offsets = list(instructions)
    entries = {
        now
        for last, now in itertools.pairwise(offsets)
        if instructions[last].opname == "RESUME" and (instructions[last].arg or 0) & 3 < 2
    }
    # A call that raises jumps to a handler, and CPython checks for no signals on the way.
    handlers = frozenset(entry.target for entry in dis._parse_exception_table(code))
    return frozenset(entries | backward) - handlers, frozenset(called), handlers


@functools.cache
def _calls(code: CodeType) -> _Points:
    instructions = [i for i in dis.get_instructions(code) if i.opname != "PRECALL"]
    called = frozenset(
        i.offset
        for n, i in enumerate(instructions)
        if _is_call(i) and not _ends_with(instructions[n - 3 : n])
    )
    return called, frozenset(), frozenset()


@functools.cache
def _all(code: CodeType) -> _Points:
    return frozenset(range(0, len(code.co_code), 2)), frozenset(), frozenset()


def _ends_with(before: list[dis.Instruction]) -> bool:
    """Return whether the call is __exit__() on leaving a ``with``: without it, tests would hang."""
    # LOAD_COMMON_CONSTANT: from CPython 3.15 on.
    loads = ("LOAD_CONST", "LOAD_COMMON_CONSTANT")
    return [i.opname in loads and i.argval is None for i in before] == [True] * 3


def _is_call(instruction: dis.Instruction) -> bool:
    name = instruction.opname
    return name.startswith("CALL") and not name.startswith("CALL_INTRINSIC")

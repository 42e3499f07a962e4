"""Raises an exception at each point, one a run, where CPython could: what must hold then, holds.

CPython looks for signals when it enters a Python function, after a call, and at a jump backwards;
a KeyboardInterrupt arises there. MemoryError and RecursionError may arise instead of any call. ::

    for strike in strikes(torchfut_aio._timeouts):
        source = Future()
        with strike:
            child = with_timeout(source, 0.01)
        ...  # check what must hold, whether strike.raised or not

The loop ends after the first run that gets to its end before its point.
"""

from __future__ import annotations

import dis
import functools
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, ModuleType
from typing import Any

__all__ = ["Strike", "strikes"]


def strikes(
    *modules: ModuleType,
    every: int = 1,
    first: int = 0,
    error: type[BaseException] = KeyboardInterrupt,
    do: Callable[[], object] | None = None,
    at: str = "signals",
    thread: str | None = None,
) -> Iterator[Strike]:
    """Gives a strike for each point in the code of ``modules``: context managers, for a run each.

    Args:
        *modules: Where to strike; a package stands for all that is in it.
        every: Strike at every so-many-th point only.
        first: The number of the first point.
        error: What to raise.
        do: A function to call at the point, instead of raising: what another thread might do.
        at: "signals", where CPython looks for signals; or "calls", instead of each call.
        thread: The name of a thread that is started meanwhile and to be struck; if None, the
            thread that enters the context is.
    """
    files = tuple(map(_files, modules))
    for number in itertools.count(first, every):
        strike = Strike(number, files, error, do, at, thread)
        yield strike
        if strike.where is None:
            assert number > first, "nothing was struck"
            return


def _files(module: ModuleType) -> str:
    assert module.__file__ is not None
    if hasattr(module, "__path__"):
        return os.path.dirname(module.__file__) + os.sep
    return module.__file__


class Strike:
    """One strike; suppresses its own error at the end of the context.

    Attributes:
        where: Where it has struck, as text; None if it has not.
        raised: Whether its error has arrived at the context's end. Where nobody is above, as in
            a finaliser, it does not.
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
        self.error = error(f"strike {number}")
        self._left = number
        self._files = files
        self._do = do
        self._points = {"signals": _signal_points, "calls": _calls}[at]
        self._thread = thread

    def __repr__(self) -> str:
        return f"<{self.error!r} at {self.where}>"

    def __enter__(self) -> Strike:
        self._before = sys.gettrace(), threading.gettrace()
        # CPython 3.12 traces no instruction unless some frame wants that when tracing starts.
        sys._getframe().f_trace_opcodes = True
        if self._thread is None:
            sys.settrace(self._enter_frame)
        else:
            threading.settrace(self._enter_frame)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        sys.settrace(self._before[0])
        threading.settrace(self._before[1])  # type: ignore[arg-type]
        self.raised = error is self.error
        return self.raised

    def _enter_frame(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if self.where is not None or not code.co_filename.startswith(self._files):
            return None
        if self._thread not in (None, threading.current_thread().name):
            return None
        frame.f_trace_opcodes = True
        is_point = self._points(code)
        before = -1

        def trace(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal before
            if event == "opcode" and self.where is None:
                last, before = before, frame.f_lasti
                if is_point(last, before):
                    self._arrive(frame)
            return trace

        return trace

    def _arrive(self, frame: FrameType) -> None:
        if self._left > 0:
            self._left -= 1
            return
        code = frame.f_code
        name = getattr(code, "co_qualname", code.co_name)
        self.where = f"{name}, {os.path.basename(code.co_filename)}:{frame.f_lineno}"
        sys.settrace(None)
        if self._do is None:
            raise self.error
        self._do()


_Points = Callable[[int, int], bool]


@functools.cache
def _signal_points(code: CodeType) -> _Points:
    instructions = {i.offset: i for i in dis.get_instructions(code)}
    called = {offset for offset, i in instructions.items() if _is_call(i)}
    backward = {
        offset
        for offset, i in instructions.items()
        if "JUMP" in i.opname and isinstance(i.argval, int) and i.argval <= offset
    }
    # Tracing may begin after the RESUME with which a function begins from CPython 3.11 on, or a
    # generator goes on. None is looked at that goes on in the midst of a yield from or await.
    offsets = list(instructions)
    entries = {
        now
        for last, now in zip(offsets, offsets[1:])
        if instructions[last].opname == "RESUME" and (instructions[last].arg or 0) & 3 < 2
    } or {offsets[0]}
    return lambda last, now: last in called or now in entries or now in backward


@functools.cache
def _calls(code: CodeType) -> _Points:
    called = {i.offset for i in dis.get_instructions(code) if _is_call(i)}
    return lambda _last, now: now in called


def _is_call(instruction: dis.Instruction) -> bool:
    name = instruction.opname
    return name.startswith("CALL") and not name.startswith("CALL_INTRINSIC")

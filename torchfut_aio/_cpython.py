"""What the package relies on that is private to CPython, or to its asyncio: all of it, here.

Each was checked on CPython 3.10.13, 3.11.7, 3.12.1, 3.13.0 and 3.14.10, and has a public way to
fall back on where it is not as expected: another interpreter, a loop with futures of its own, a
task that is not asyncio's.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import sys
from collections.abc import Callable
from types import BuiltinMethodType, FrameType
from typing import Any

__all__ = [
    "calling_module",
    "check_interpreter",
    "in_callback_of",
    "laid_out_by_c",
    "resume_callback",
    "running_loop",
    "still_waits",
    "thread_of",
]

_ResumeCallback = tuple[Callable[[asyncio.Future[Any]], Any], contextvars.Context]


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


# Exported for those who write event loops, and documented in its own docstring only. It saves
# the exception, which takes most of the time where no loop runs.
running_loop: Callable[[], asyncio.AbstractEventLoop | None] = getattr(
    asyncio, "_get_running_loop", _running_loop
)


def resume_callback(future: asyncio.Future[Any]) -> _ResumeCallback | None:
    """Returns what resumes the asyncio task that waits for a future, and the context to do it in.

    A pending future of asyncio's own, written in C, lists its callbacks in ``_callbacks``: pairs
    of a callback and a context. A task of asyncio's own, or of a subclass, adds a built-in
    method of itself, with which it takes its next step.

    Returns:
        None if the future or the task is not asyncio's own, if nobody waits, or if the list is
        not as expected: complete the future then, and its loop resumes who waits.
    """
    if type(future) is not _Future:
        return None
    try:
        callback, context = found = future._callbacks[0]  # TypeError if it is done
    except (AttributeError, TypeError, ValueError, IndexError):
        return None
    if type(callback) is not BuiltinMethodType or type(context) is not contextvars.Context:
        return None
    return found if isinstance(callback.__self__, _Task) else None


def still_waits(callback: Callable[..., Any], future: asyncio.Future[Any]) -> bool:
    """Tells whether the task that a `resume_callback` resumes is still to be resumed.

    Returns:
        False, too, where tasks do not tell what they wait for.
    """
    task = getattr(callback, "__self__", None)
    return getattr(task, "_fut_waiter", None) is future


_Future: type[Any] = asyncio.Future  # written in C
_Task: type[Any] = asyncio.Task


def thread_of(loop: asyncio.AbstractEventLoop) -> int | None:
    """Returns the identifier of the thread that runs ``loop``.

    Returns:
        None, too, where the loop does not tell, as uvloop's.
    """
    return getattr(loop, "_thread_id", None)


def in_callback_of(loop: asyncio.AbstractEventLoop) -> bool:
    """Tells whether ``loop``, which runs in this thread, is within a callback.

    asyncio's loop takes a turn in a method called ``_run_once``, whoever wrote that, and calls
    each callback in `asyncio.Handle._run`. uvloop calls them in C; it sees to signals there too,
    and looks again at what is scheduled before it sleeps, so within it the answer is always yes.

    Returns:
        False, too, where the interpreter or the loop does not tell.
    """
    frame = _get_frame()
    while frame is not None:
        code = frame.f_code
        if code is _RUN_CALLBACK:
            return True
        if code.co_name == "_run_once":
            return False
        frame = frame.f_back
    kind: Any = type(loop)
    return _is_uvloops(kind)


@functools.cache
def _is_uvloops(kind: type[Any]) -> bool:
    return any(base.__module__.partition(".")[0] == "uvloop" for base in kind.__mro__)


_get_frame: Callable[[], FrameType | None] = getattr(sys, "_getframe", lambda: None)
_RUN_CALLBACK: object = getattr(asyncio.Handle._run, "__code__", None)


def laid_out_by_c(kind: type[Any]) -> bool:
    """Tells whether instances of ``kind`` have a layout that C code gave them, as built-in types.

    CPython allocates other types on the heap, and tells so in the flags of the type.
    """
    flags = getattr(kind, "__flags__", None)
    if type(flags) is int:
        return not flags & _ALLOCATED_ON_THE_HEAP
    return kind.__module__ == "builtins"


_ALLOCATED_ON_THE_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def calling_module() -> str | None:
    """Returns the name of the module from which the function that asks was called.

    Returns:
        None if a C++ thread called it that runs no Python code; "" if the interpreter does not
        tell.
    """
    frame = _get_frame()
    if frame is None or frame.f_back is None:
        return ""
    caller = frame.f_back.f_back
    return None if caller is None else str(caller.f_globals.get("__name__", ""))


def check_interpreter() -> None:
    """Refuses an interpreter on which nobody knows that futures lose nothing.

    Without the GIL, before CPython 3.14.5, two threads may both delete the same slot of an object
    (CPython issue 146270). Futures rely on deleting keys of dicts, which is safe there; but all
    else that runs beneath them has not been shown to be.

    Raises:
        ImportError: This is such an interpreter, and its GIL is off.
    """
    has_gil: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)
    if not has_gil() and sys.version_info < (3, 14, 5):
        raise ImportError(
            f"torchfut_aio does not run on Python {sys.version.split()[0]} with the GIL off: "
            "before 3.14.5, two threads may both delete the same slot of an object (CPython issue "
            "146270), and nobody knows that no callback is lost. Set PYTHON_GIL=1, or use Python "
            "3.14.5 or newer"
        )


check_interpreter()  # when the package is imported

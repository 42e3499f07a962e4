"""Everything private to CPython or to its asyncio that the package relies on.

Each name was checked on CPython 3.11.7, 3.12.1, 3.13.0, 3.14.8 and 3.15.0. Where one is missing or
different, the package does without: on another interpreter or a newer one, on a loop with another
class of futures, in a task that is not asyncio's. So the package sets no upper bound on Python.
``_speedups.c`` uses three of the names in the same way: ``_callbacks`` of a future, ``_run`` of a
handle, and ``_get_running_loop``.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import operator
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import (
    AsyncGeneratorType,
    BuiltinMethodType,
    CoroutineType,
    FrameType,
    GeneratorType,
    SimpleNamespace,
)
from typing import Any

ResumeCallback = tuple[Callable[[asyncio.Future[Any]], Any], contextvars.Context]


class PublicEvents:
    """Finds the running loop by asyncio's public function."""

    @staticmethod
    def _get_running_loop() -> asyncio.AbstractEventLoop | None:
        try:
            return asyncio.get_running_loop()
        except RecursionError:
            raise
        except RuntimeError:
            return None


_events: Any = asyncio if hasattr(asyncio, "_get_running_loop") else PublicEvents

running_loop: Callable[[], asyncio.AbstractEventLoop | None]
running_loop = functools.partial(operator.methodcaller("_get_running_loop"), _events)
"""Return the event loop of asyncio's kind that runs in this thread, or None.

asyncio exports the function for authors of event loops. It saves the exception, which takes most of
the time where no loop runs. It is looked up at each call, as trio-asyncio replaces it.
"""


def resume_callback(future: asyncio.Future[Any]) -> ResumeCallback | None:
    """Return the callback that resumes the asyncio task waiting for a future, and its context.

    Return None if anything differs from CPython's own asyncio: complete the future then, and its
    loop resumes the task. Also return None if the program has replaced the method that runs
    asyncio's handles, to find slow ones. Each task then has a separate handle.
    """
    if type(future) is not _Future or _Handle._run is not _run:
        return None
    # A pending future of asyncio's, written in C, lists pairs of a callback and a context. A task
    # of asyncio's adds a built-in method of itself, which takes its next step.
    try:
        callback, context = found = future._callbacks[0]  # TypeError if it is done
    except (AttributeError, TypeError, ValueError, IndexError):
        return None
    if type(callback) is not BuiltinMethodType or type(context) is not contextvars.Context:
        return None
    return found if isinstance(callback.__self__, _Task) else None


def still_waits(callback: Callable[..., Any], future: asyncio.Future[Any]) -> bool:
    """Return True if the task of a `resume_callback` still waits for ``future``."""
    task = getattr(callback, "__self__", None)
    return getattr(task, "_fut_waiter", None) is future


def waiting_task(future: asyncio.Future[Any]) -> asyncio.Task[Any] | None:
    found = resume_callback(future)
    return None if found is None else getattr(found[0], "__self__", None)


def place_of(coroutine: object) -> str | None:
    """Return where a task's coroutine waits, such as ``handler, app.py:42``, from any thread.

    This is the innermost function on the chain of awaits that belongs to neither this package,
    asyncio, anyio, trio nor contextlib. Return None if there is none, for example because a
    coroutine is not Python's own, or if the task runs.
    """
    if not _has_gil():  # even the chain may change while we read it
        return None
    libraries = _folders_of_libraries()
    # The thread of the task may resume it at any moment. So we read only the code and the line of a
    # frame. To read `f_locals` would write to the frame, and crash a thread that runs it.
    for each in reversed([*_chain(coroutine)]):
        frame: FrameType | None = getattr(each, _FRAMES[type(each)], None)  # None if it has ended
        if frame is not None and not frame.f_code.co_filename.startswith(libraries):
            code = frame.f_code
            name = code.co_qualname.rpartition("<locals>.")[2]
            return f"{name}, {os.path.basename(code.co_filename)}:{frame.f_lineno}"
    return None


def _chain(awaited: Any) -> Iterator[Any]:
    """Yield a suspended coroutine, the one that it awaits, and so on."""
    while awaited is not None:
        kind = type(awaited)
        if kind in _FRAMES:
            yield awaited
        # CPython releases the GIL after calls, but not between two attributes. So a coroutine that
        # we find suspended stays suspended until we have read what it awaits.
        if kind is CoroutineType:
            awaited = None if awaited.cr_running else awaited.cr_await
        elif kind is GeneratorType:
            awaited = None if awaited.gi_running else awaited.gi_yieldfrom or _resumed_by(awaited)
        elif kind is AsyncGeneratorType:
            awaited = awaited.ag_await
        elif kind.__name__ in _WRAPPERS and kind.__module__ == "builtins":
            # As in trio: these have no attribute for the object that they wrap (CPython issue
            # 76991).
            inner = (each for each in gc.get_referents(awaited) if _is_awaited(each))
            awaited = next(inner, None)
        else:
            awaited = None


def _resumed_by(generator: GeneratorType[Any, Any, Any]) -> Any:
    """Return the coroutine that a generator of this package resumes by ``send()``."""
    if not generator.gi_code.co_filename.startswith(_folders_of_libraries()[0]):
        return None
    # For DDP hooks and `task_local_state`, only a local variable refers to the coroutine. The
    # garbage collector sees local variables without touching the frame.
    found = gc.get_referents(generator)
    return next((each for each in found if type(each) is CoroutineType), None)


def _is_awaited(thing: object) -> bool:
    return type(thing) in _FRAMES or type(thing).__name__ in _WRAPPERS


_FRAMES: dict[type[Any], str] = {
    CoroutineType: "cr_frame",
    GeneratorType: "gi_frame",
    AsyncGeneratorType: "ag_frame",
}
# The types of the results of __anext__, asend, athrow and aclose of an async generator, of
# __await__ of a coroutine, and of anext() with a default.
_WRAPPERS = {
    "anext_awaitable",
    "async_generator_asend",
    "async_generator_athrow",
    "coroutine_wrapper",
}


def _folders_of_libraries() -> tuple[str, ...]:
    modules = [sys.modules.get(name) for name in (__package__, "anyio", "trio")]
    files = [getattr(module, "__file__", None) for module in (*modules, asyncio)]
    folders = [os.path.join(os.path.dirname(file), "") for file in files if file]
    return (*folders, contextlib.__file__)


_Future: type[Any] = asyncio.Future  # written in C
# Empty if tasks do not show which future they wait for, as `still_waits` has to know that.
_Task: Any = asyncio.Task if hasattr(asyncio.Task, "_fut_waiter") else ()


def thread_of(loop: asyncio.AbstractEventLoop) -> int | None:
    """Return the identifier of the thread that runs ``loop``; None if unknown, as for uvloop's."""
    return getattr(loop, "_thread_id", None)


def in_callback_of(loop: asyncio.AbstractEventLoop) -> bool:
    """Return True if ``loop``, which runs in this thread, is known to be within a callback."""
    # asyncio's loop, also in subclasses, takes a turn in a method called `_run_once`, and calls
    # each callback in `Handle._run`.
    frame = _get_frame()
    while frame is not None:
        code = frame.f_code
        if code is _RUN_CALLBACK:
            return True
        if code.co_name == "_run_once":
            return False
        frame = frame.f_back
    # uvloop calls callbacks, and handles signals, in C. Before it sleeps, it checks again what is
    # scheduled. So any call in its thread counts as one within a callback.
    kind: Any = type(loop)
    return _is_uvloops(kind)


@functools.cache
def _is_uvloops(kind: type[Any]) -> bool:
    return any(base.__module__.partition(".")[0] == "uvloop" for base in kind.__mro__)


def _runs_handles() -> object:
    """Return the method of asyncio's handles that calls their callbacks, if there is one."""
    return getattr(asyncio.Handle, "_run", None)


_get_frame: Callable[[], FrameType | None] = getattr(sys, "_getframe", lambda: None)
_RUN_CALLBACK: object = getattr(_runs_handles(), "__code__", object())


# From Python 3.14 on, asyncio.shield leaves this callback with a future that nothing waits for any
# more. It only logs the error.
what_shield_leaves: object = getattr(asyncio.tasks, "_log_on_exception", asyncio)


def is_within(function: Callable[..., Any]) -> bool:
    """Return True if this thread is known to be in a call of ``function``, written in Python."""
    frame = _get_frame()
    return frame is not None and _is_below(frame, getattr(function, "__code__", None))


def threads_within(function: Callable[..., Any]) -> set[int]:
    """Return the identifiers of the threads that are known to be in a call of ``function``."""
    if not _has_gil():
        return set()  # to walk the frames of a thread that runs may crash the interpreter
    frames: dict[int, FrameType] = getattr(sys, "_current_frames", dict)()
    code = getattr(function, "__code__", None)
    try:
        return set(filter(lambda thread: _is_below(frames[thread], code), frames))
    finally:
        # The frame of this call is in the dict, so the two are a cycle. It would keep the frames of
        # all threads.
        frames.clear()


def _is_below(innermost: FrameType, code: object) -> bool:
    frame: FrameType | None = innermost
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def is_inner(coroutine: object, other: object) -> bool:
    """Return True if ``coroutine`` is known to run within ``other``, where both run here."""
    # An asyncio task may run a generator, for example that of an awaitable object.
    frames = [
        getattr(each, "cr_frame", None) or getattr(each, "gi_frame", None)
        for each in (coroutine, other)
    ]
    frame = _get_frame()
    while frame is not None and frame not in frames:
        frame = frame.f_back
    return frame is not None and frame is frames[0]


def _file_of(function: object) -> object:
    return getattr(getattr(function, "__code__", None), "co_filename", None)


# None if it was replaced before this package was imported.
_Handle: Any = asyncio.Handle if hasattr(asyncio.Handle, "_run") else SimpleNamespace(_run=None)
_run: object = _runs_handles()
if _file_of(_run) != _file_of(asyncio.Handle.cancel):
    _run = None


def calling_module(beyond: str = "") -> str | None:
    """Return the name of the module that called the caller, other than ``beyond``.

    Return None if a C++ thread that runs no Python code called it, or "" if it is unknown.
    """
    frame = _get_frame()
    if frame is None or frame.f_back is None:
        return ""
    caller = frame.f_back.f_back
    del frame  # it would refer to itself, and so keep the locals of all calling functions
    while caller is not None and caller.f_globals.get("__name__") == beyond:
        caller = caller.f_back
    return None if caller is None else str(caller.f_globals.get("__name__", ""))


def call_before_joining(function: Callable[[], object]) -> bool:
    """Call ``function`` when the interpreter begins to exit, before it waits for threads.

    Return False if this is not possible, or the exit has begun.
    """
    register = getattr(threading, "_register_atexit", None)
    if register is None:
        return False
    # Those that are registered last are called first. This module lets the pools of
    # concurrent.futures wait for their threads, which may wait for what ``function`` ends.
    import concurrent.futures.thread  # noqa: F401

    try:
        register(function)
    except RecursionError:
        raise
    except RuntimeError:
        return False
    return True


_has_gil: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)
if not _has_gil() and sys.version_info < (3, 14, 5):
    raise ImportError(
        f"torchfut_aio does not run on Python {sys.version.split()[0]} with the GIL off: before "
        "3.14.5, two threads may both delete the same slot of an object (CPython issue 146270), "
        "so a callback may be lost. Set PYTHON_GIL=1, or use Python 3.14.5 or newer"
    )

Queue: type[dict[Any, Any]] = OrderedDict if _has_gil() else dict
"""A dict that finds its first key in constant time, also after others were deleted in front of it.

Without the GIL it is a plain dict, which takes longer the more keys were deleted. If a thread
without the GIL iterates over an OrderedDict while another deletes from it, it may read freed memory
and crash the process (CPython issue 151627).
"""


def move_to_front(queue: dict[Any, Any], key: object) -> None:
    """Make a key of a `Queue` the first; the others keep their order."""
    if isinstance(queue, OrderedDict):
        queue.move_to_end(key, last=False)
        return
    moved = {key}
    while others := [other for other in [*queue] if other not in moved]:
        for other in others:
            moved.add(other)
            _move_to_end(queue, other)
        # The next turn finds keys that other threads have inserted since: they belong at the end.


def _move_to_end(queue: dict[Any, Any], key: object) -> None:
    # CPython checks for no signal from the deletion to the last line, so no key is lost.
    try:
        value = queue[key]
        del queue[key]
    except KeyError:  # another thread has deleted it
        return
    queue[key] = value

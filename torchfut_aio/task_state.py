"""State of torch that is per thread, made local to a task: modes, autocast, device and streams.

All tasks of an event loop share a thread. A coroutine that awaits within ``with torch.no_grad():``
or ``with stream:`` thus changes the mode or the stream of the task that runs next.

`task_local_state` needs no help of the loop: a generator drives the coroutine, and makes each step,
a ``send`` or a ``throw``, in an `OwnState`.

No interrupt leaves a state half restored. Torch's guards restore the modes, and one call into C
restores the rest. CPython checks for signals between instructions, never within such a call.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable
from functools import partial
from typing import Any, ParamSpec, TypeVar, overload

import torch

from ._arguments import async_checked
from ._cpython import is_within
from ._devices import devices_in_use
from ._errors import TaskStateWarning, warn_at_users_line
from ._loops import Loop
from ._pytorch import device_exchange, set_stream, thread_state_functions
from ._repr import described
from ._tasks import drive

T = TypeVar("T")
P = ParamSpec("P")
_AsyncFunction = Callable[P, Coroutine[Any, Any, T]]

# It raises if torch lacks one of the functions, so it is called only where they are needed.
_functions = functools.cache(thread_state_functions)
_call: Any = operator.methodcaller("__call__")
_DEEP = 50  # no nesting of autocast is deeper


@overload
def task_local_state(func: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]: ...
@overload
def task_local_state(func: _AsyncFunction[P, T]) -> _AsyncFunction[P, T]: ...


def task_local_state(func: Any) -> Any:
    """Decorate an async function so that it has a torch state of its own.

    The state is: grad mode, inference mode, forward-mode AD, autocast, the current device, and the
    current stream of each device. It begins as a copy of the state of the thread when the function
    starts. Each step of the function, from one ``await`` that suspends it to the next, runs in it,
    including the coroutines that it awaits. It changes neither other tasks nor, after the function
    has ended, the caller. So a ``with torch.no_grad():``, ``with torch.autocast(...):`` or ``with
    stream:`` may have an ``await`` in it. It works on every event loop, and costs other functions
    nothing. The streams of the function order nothing for the caller: if kernels on another stream
    fill the result, let the stream that was current at the call wait for that one first.

    Not covered: modes that are stacks of objects, such as ``with torch.device(...):`` and those of
    ``torch.overrides`` and ``torch.utils._python_dispatch``; hooks for saved tensors; the profiler;
    and state of the whole process, such as the default dtype and random generators. Tasks and
    threads that the function starts do not inherit the state: decorate their functions.

    Args:
        func: An async function; or a coroutine that has not started, for
            ``await task_local_state(coroutine)``.

    Returns:
        An async function with the same signature; or a coroutine.

    Raises:
        TypeError: ``func`` is neither, such as an async generator.
        RuntimeError: When the function is called: this torch lacks functions that it needs.

    Example:
        >>> import asyncio, torch
        >>> @torchfut_aio.task_local_state
        ... async def predict(model, batch):
        ...     with torch.inference_mode():
        ...         await asyncio.sleep(0.01)  # others train, with gradients
        ...         return model(batch)
        >>> asyncio.run(predict(torch.nn.Linear(2, 1), torch.ones(2))).is_inference()
        True
    """
    if inspect.iscoroutine(func):
        return _in_own_state(func)
    async_checked(func)
    if not inspect.iscoroutinefunction(func):
        raise TypeError(
            f"task_local_state() takes an async function or a coroutine, not {described(func)}; "
            "between two values of an async generator, the code that iterates runs"
        )

    @functools.wraps(func)
    async def with_own_state(*args: Any, **kwargs: Any) -> Any:
        return await _in_own_state(func(*args, **kwargs))

    return with_own_state


async def _in_own_state(coroutine: Coroutine[Any, Any, T]) -> T:
    return await _steps(coroutine)


@types.coroutine
def _steps(coroutine: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    try:
        own = OwnState()
    except BaseException:
        coroutine.close()
        raise
    try:
        result: T = yield from drive(coroutine, own.call)
        return result
    except BaseException:
        # Ctrl-C may have come between two steps. If the coroutine has ended, this does nothing.
        own.call(coroutine.close)
        raise


class OwnState:
    """A state for calls that are made one by one; it begins as a copy of the thread's state."""

    def __init__(self) -> None:
        _functions()
        self._state: _ThreadState | None = None

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Return ``function(*args)``, called in this state; the thread's state stays as it is."""
        outside = _ThreadState()
        own = self._state or outside
        # This `leave` is for an interrupt that comes before the state after the call is known. It
        # restores from any state, which takes longer.
        enter, leave = own.restore(outside), outside.restore(None)
        c = _functions()
        with c.InferenceMode(own.inference), c.ForceDispatchKeyGuard(*own.keys):
            try:
                try:
                    enter()
                    return function(*args)
                finally:
                    self._state = own = _ThreadState()
                    leave = outside.restore(own)
            finally:
                leave()


class _ThreadState:
    """The present state of the thread that makes this object."""

    def __init__(self) -> None:
        c = _functions()
        self.inference = torch.is_inference_mode_enabled()
        # Dispatch keys, including those of autocast.
        self.keys = c.dispatch_tls_local_include_set(), c.dispatch_tls_local_exclude_set()
        accelerator = torch.accelerator.current_accelerator()
        settings = _settings(accelerator and accelerator.type)
        self.values = [(name, setter, getter()) for name, (getter, setter) in settings.items()]
        # No function returns autocast's nesting alone. These change it by one, and return the new
        # value. Both run in one instruction, so that no interrupt can come between them.
        both = c.autocast_increment_nesting, c.autocast_decrement_nesting
        _, self.nesting = map(_call, both)
        self.streams = {
            device: torch.accelerator.current_stream(device.index) for device in devices_in_use()
        }
        # A new thread has device 0 current.
        self.device = torch.accelerator.current_device_index() if self.streams else 0

    def restore(self, seen: _ThreadState | None) -> Callable[[], object]:
        """Return a function that restores this state, except for the guards of `OwnState`.

        It runs no Python code. ``seen`` is the state that it replaces, or None if that is unknown.
        """
        c = _functions()
        calls: list[Any] = [partial(setter, value) for _, setter, value in self.values]
        if seen is None:  # the nesting may even be negative: raise it above ours, then lower it
            calls += [c.autocast_increment_nesting] * (self.nesting + _DEEP)
            lower = iter(c.autocast_decrement_nesting, self.nesting)
            calls.append(_exhausting(itertools.islice(lower, 10 * _DEEP)))
        else:
            calls += [c.autocast_increment_nesting] * (self.nesting - seen.nesting)
            calls += [c.autocast_decrement_nesting] * (seen.nesting - self.nesting)
        # A copy that was cast in one state, perhaps without gradients, must not be used in another.
        calls.append(c.clear_autocast_cache)
        devices = dict.fromkeys([*self.streams, *(seen.streams if seen else ())])
        calls += [partial(set_stream, self._stream(device)) for device in devices]
        if devices:  # last, as setting a stream makes its device current
            calls.append(partial(device_exchange(next(iter(devices)).type), self.device))
        return _exhausting(map(_call, calls))

    def _stream(self, device: torch.device) -> torch.Stream:
        # Without a context, a device had the stream with which a thread begins.
        return self.streams.get(device) or _first_stream(device)

    def differences(self, other: _ThreadState) -> list[str]:
        """Return the names of the settings that differ from those in ``other``."""
        if self.inference != other.inference:
            names = ["inference mode"]  # it sets most of the others
        else:
            pairs = zip(self.values, other.values, strict=False)
            names = [name for (name, _, mine), (_, _, theirs) in pairs if mine != theirs]
        names += ["current device"] * (self.device != other.device)
        for device, stream in self.streams.items():
            if stream != other._stream(device):
                names.append(f"current stream of {device}")
        return names


def _exhausting(results: Iterable[object]) -> Callable[[], object]:
    return partial(deque[object](maxlen=0).extend, results)


@functools.cache
def _settings(kind: str | None) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Return the getter and setter of each setting, by name; ``kind`` is the accelerator's."""
    c = _functions()
    settings: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "grad mode": (torch.is_grad_enabled, c.set_grad_enabled),
        "forward-mode AD": (c.is_fwd_grad_enabled, c.set_fwd_grad_enabled),
        "multithreaded backward": (c.is_multithreading_enabled, c.set_multithreading_enabled),
        "cache of autocast": (c.is_autocast_cache_enabled, c.set_autocast_cache_enabled),
    }
    for each in ("cpu", kind):
        if each is not None:
            settings[f"autocast on {each}"] = (
                partial(c.is_autocast_enabled, each),
                partial(c.set_autocast_enabled, each),
            )
            settings[f"dtype of autocast on {each}"] = (
                partial(c.get_autocast_dtype, each),
                partial(c.set_autocast_dtype, each),
            )
    return settings


@functools.cache
def _first_stream(device: torch.device) -> torch.Stream:
    """Return the stream of ``device`` that is current in a thread that has chosen none."""
    streams: list[torch.Stream] = []
    thread = threading.Thread(
        target=lambda: streams.append(torch.accelerator.current_stream(device.index))
    )
    thread.start()
    thread.join()
    return streams[0]


# The states that tasks should have when they await, by thread.
_expected: weakref.WeakKeyDictionary[threading.Thread, _ThreadState] = weakref.WeakKeyDictionary()


def set_task_state_checks(enabled: bool = True) -> None:
    """Switch on a warning for tasks that await with a changed state of torch.

    From now on, whenever an await of this package suspends a task of the calling thread, the
    present grad mode, inference mode, autocast, device and streams are compared with those at this
    call. If one differs, a `torchfut_aio.TaskStateWarning` says which, at the line of the await:
    all other tasks of the thread run with it until this one continues. Functions with
    `torchfut_aio.task_local_state` have a separate state, and are not checked.

    Call it before the event loop starts, or as the first thing that runs on it. It is for
    debugging, and costs some microseconds for each await.

    Args:
        enabled: False to end the checks in this thread.

    Raises:
        RuntimeError: This torch lacks functions that it needs.

    Example:
        >>> import asyncio, torch, warnings
        >>> from torchfut_aio import debug
        >>> async def main(fut):
        ...     debug.set_task_state_checks()
        ...     asyncio.get_running_loop().call_later(0.01, fut.set_result, 5)
        ...     with torch.no_grad():
        ...         return await fut
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     asyncio.run(main(torchfut_aio.Future()))
        5
        >>> print(caught[0].message)
        this task awaits with another grad mode ... or decorate its function with task_local_state
        >>> debug.set_task_state_checks(False)
    """
    if enabled:
        _expected[threading.current_thread()] = _ThreadState()
    else:
        _expected.pop(threading.current_thread(), None)
    Loop.before_wait = _check if _expected else None


def _check(_loop: Loop) -> None:
    expected = _expected.get(threading.current_thread())
    if expected is None or is_within(OwnState.call):
        return
    names = _ThreadState().differences(expected)
    if names:
        warn_at_users_line(
            f"this task awaits with another {', '.join(names)} than when set_task_state_checks() "
            "was called, and all tasks of the thread run with it until this task resumes: "
            "leave the `with` block first, or decorate its function with task_local_state",
            TaskStateWarning,
        )

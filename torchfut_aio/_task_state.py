"""`task_local_state`: an async function whose steps run in a state of their own.

Torch keeps its modes, the current device and the current streams for each thread, and all tasks of
an event loop share a thread. A coroutine that awaits within ``with torch.no_grad():`` or ``with
stream:`` thus changes them for whoever runs next, and finds them changed by others.

No loop has to know of this: the function's coroutine is driven by a generator that its task runs in
its place. The generator makes each step, a ``send`` or a ``throw``, in an `OwnState`, and passes on
what the step yields to the loop.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from ._arguments import async_checked
from ._errors import TaskStateWarning, warn_at_users_line
from ._loops import Loop
from ._repr import described

if TYPE_CHECKING:
    from ._thread_state import OwnState, ThreadState

T = TypeVar("T")
P = ParamSpec("P")
_AsyncFunction = Callable[P, Coroutine[Any, Any, T]]


@overload
def task_local_state(func: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]: ...
@overload
def task_local_state(func: _AsyncFunction[P, T]) -> _AsyncFunction[P, T]: ...


def task_local_state(func: Any) -> Any:
    """Gives an async function a state of torch of its own, whatever other tasks do; a decorator.

    The state is: grad mode, inference mode, forward-mode AD, autocast, the current device, and the
    current stream of each device. It begins as that of the thread when the function starts.
    Each step of the function, from one ``await`` that suspends it to the next, runs in it, with
    what it awaits. Other tasks see nothing of it, and neither does the caller after the function
    has ended. So a ``with torch.no_grad():``, ``with torch.autocast(...):`` or ``with stream:``
    may have an ``await`` in it. It works on every event loop, and costs those who do not use it
    nothing. The streams of the function order nothing for the caller: if kernels on another stream
    fill what it returns, let the stream that was current at the call wait for that one first.

    Not covered: modes that are stacks of objects, such as ``with torch.device(...):`` and those of
    ``torch.overrides`` and ``torch.utils._python_dispatch``; hooks for saved tensors; the profiler;
    and what torch keeps for the whole process, such as the default dtype and random generators. Nor
    does the state go with tasks and threads that the function starts: decorate theirs.

    Args:
        func: An async function; or a coroutine that has not started, for
            ``await task_local_state(coroutine)``.

    Returns:
        An async function with the same signature; or a coroutine.

    Raises:
        TypeError: ``func`` is neither, such as an async generator.
        RuntimeError: When the function is called: this torch lacks what it takes.

    Example:
        >>> import asyncio, torch
        >>> @torchfut_aio.task_local_state
        ... async def predict(model, batch):
        ...     with torch.inference_mode():
        ...         await asyncio.sleep(0.01)  # others train meanwhile, with gradients
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
            "what an async generator does between two values belongs to whoever iterates"
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
        # Where torch lacks what this needs, only the calls that need it fail.
        from ._thread_state import OwnState
    except BaseException:
        coroutine.close()
        raise
    own = OwnState()
    try:
        result: T = yield from _each_step(own, coroutine)
        return result
    except BaseException:
        # Ctrl-C may have come between two steps. If the coroutine has ended, this does nothing.
        own.call(coroutine.close)
        raise


# A function of its own: see tests/test_backward_jumps.py.
def _each_step(own: OwnState, coroutine: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    resume: Callable[..., Any] = coroutine.send
    sent: Any = None
    while True:
        try:
            yielded = own.call(resume, sent)
        except StopIteration as stop:
            result: T = stop.value
            return result
        try:
            sent, resume = (yield yielded), coroutine.send
        except BaseException as error:  # a cancellation, or the end of the task
            sent, resume = error, coroutine.throw


# The states that tasks are to have when they await, by their threads.
_expected: weakref.WeakKeyDictionary[threading.Thread, ThreadState] = weakref.WeakKeyDictionary()


def set_task_state_checks(enabled: bool = True) -> None:
    """Switch on a warning for tasks that await with a changed state of torch.

    From now on, whenever an await of this package suspends a task of the calling thread, grad
    mode, inference mode, autocast, the current device and the current streams are compared with
    what they are now. If one differs, a `torchfut_aio.TaskStateWarning` says which, at the line of
    the await: all other tasks of the thread have it, too, until this one continues. Functions with
    `torchfut_aio.task_local_state` have a state of their own, and are not checked.

    Call it before the event loop starts, or first of all in it. It is for debugging, and costs
    some microseconds for each await.

    Args:
        enabled: False to end the checks in this thread.

    Raises:
        RuntimeError: This torch lacks what it takes.

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
        from ._thread_state import ThreadState

        _expected[threading.current_thread()] = ThreadState()
    else:
        _expected.pop(threading.current_thread(), None)
    Loop.before_wait = _check if _expected else None


def _check(_loop: Loop) -> None:
    from ._thread_state import ThreadState, in_own_state

    expected = _expected.get(threading.current_thread())
    if expected is None or in_own_state():
        return
    names = ThreadState().differences(expected)
    if names:
        warn_at_users_line(
            f"this task awaits with another {', '.join(names)} than was there when "
            "set_task_state_checks() was called, and until it goes on, all tasks of the thread "
            "have it: leave the `with` block first, or decorate its function with task_local_state",
            TaskStateWarning,
        )

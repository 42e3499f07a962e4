"""Async functions that run in a task group, or on another thread's loop, as futures.

A task refers to its future only through a `Promise`. A task that is cancelled before its first
step, or dropped with a closed loop, runs no code. Then the promise is garbage-collected with the
task, and fails the future.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from . import _loops
from ._core import Promise
from ._errors import consists_of, drop_catching_frame, ends_a_task
from ._future import Future
from ._repr import described, function_name, short
from ._threads import BlockingThread

if TYPE_CHECKING:
    import anyio.abc
    import anyio.from_thread
    import trio

    _TaskGroup = anyio.abc.TaskGroup | asyncio.TaskGroup | trio.Nursery

T = TypeVar("T")
Args = TypeVarTuple("Args")


def start_soon(
    task_group_or_portal: _TaskGroup | anyio.from_thread.BlockingPortal,
    func: Callable[[*Args], Awaitable[T]],
    *args: *Args,
    name: object = None,
) -> Future[T]:
    """Run ``func(*args)`` as a task of a task group, or of another thread's loop.

    If the function raises, the future fails, not the group; an error that is never retrieved is
    logged. KeyboardInterrupt, SystemExit, GeneratorExit and cancellation also act on the group,
    as from any of its tasks. A task that is cancelled, or that ends with its loop, fails the future
    with `CancelledError`. So when a group has exited, its futures are done.

    If you cancel or complete the future yourself, the task continues, and its result is dropped.
    (With ``asyncio.Task`` and the futures of anyio's portals, it is cancelled.) To end a task,
    cancel its group, or a cancel scope that it has entered.

    The task runs in a copy of the caller's context (``contextvars``), made at the call.

    A portal takes tasks from any thread. A thread without an event loop blocks until the portal's
    loop has made the task. A thread that runs a loop does not block: a helper thread for each
    portal makes the calls in order.

    Kernels may still fill the result, on the streams that are current when the function has
    returned. A ``with stream:`` around ``return``, and `task_local_state`, have ended by then. So
    order the stream outside after that one: ``torch.cuda.current_stream().wait_stream(stream)``.

    Args:
        task_group_or_portal: A task group of anyio, an ``asyncio.TaskGroup`` or a
            ``trio.Nursery``, of the loop that runs in this thread; or an
            ``anyio.from_thread.BlockingPortal``.
        func: An async function.
        *args: Its positional arguments.
        name: The name of the task; by default, that of the function.

    Returns:
        A future of what the function returns.

    Raises:
        TypeError: ``task_group_or_portal`` or ``func`` is something else.
        RuntimeError: The group is not active, or no event loop runs in this thread; or the portal
            is not running. In a thread that runs a loop, a portal that is not running fails the
            future instead.

    Example:
        >>> import anyio, anyio.from_thread
        >>> async def double(x):
        ...     await anyio.sleep(0.001)
        ...     return 2 * x
        >>> async def main():
        ...     async with anyio.create_task_group() as group:
        ...         futures = [torchfut_aio.start_soon(group, double, n) for n in range(3)]
        ...         return await torchfut_aio.gather(futures)
        >>> anyio.run(main)
        [0, 2, 4]
        >>> with anyio.from_thread.start_blocking_portal() as portal:
        ...     torchfut_aio.start_soon(portal, double, 21).wait()
        42
    """
    where: Any = task_group_or_portal
    # Not create_task alone: an event loop has that as well, and does not wait for its tasks.
    is_asyncios = hasattr(where, "create_task") and hasattr(where, "__aexit__")
    is_portal = hasattr(where, "start_task_soon")
    if not (is_portal or is_asyncios or hasattr(where, "start_soon")):
        raise TypeError(
            "start_soon() takes a task group of anyio, an asyncio.TaskGroup, a trio.Nursery or a "
            f"BlockingPortal of anyio.from_thread, not {described(where)}"
        )
    _function_checked(func)
    future: Future[T] = Future()
    promise = Promise(future, task_name(func, name))
    if is_portal:
        _start_from_thread(where, promise, func, args)
        return future
    if not _loops.loop_in_this_thread():
        raise RuntimeError(
            "start_soon() has to be called in the thread of the task group's event loop; from "
            "another thread, pass a BlockingPortal of anyio.from_thread"
        )
    if hasattr(where, "start_soon"):
        where.start_soon(_run, promise, func, args, name=promise.name)
        return future
    coroutine = _run(promise, func, args)
    try:
        task = where.create_task(coroutine, name=promise.name)
    except BaseException:
        coroutine.close()
        raise
    # A task that was cancelled before its first step keeps the promise alive, so end it.
    task.add_done_callback(promise.end)
    return future


def _start_from_thread(portal: Any, promise: Promise, func: Any, args: Any) -> None:
    start = functools.partial(portal.start_task_soon, _run, promise, func, args, name=promise.name)
    # Also in the thread of the portal's loop: there the portal refuses a call that waits for it.
    if _loops.loop_in_this_thread():
        thread = _submitters.get(portal)
        if thread is None:
            thread = _submitters.setdefault(portal, BlockingThread("torchfut_aio start_soon"))
        start_in_context = functools.partial(contextvars.copy_context().run, start)
        thread.submit(functools.partial(_fail_if_refused, promise), start_in_context)
    else:
        start()


def _fail_if_refused(promise: Promise, error: Exception | None) -> None:
    if error is not None:
        promise.fail(error)


# By portal. Its thread waits for the portal's loop, so that a thread that runs a loop need not.
_submitters: weakref.WeakKeyDictionary[Any, BlockingThread] = weakref.WeakKeyDictionary()


def _function_checked(func: object) -> None:
    if inspect.iscoroutine(func):
        func.close()
        raise TypeError(
            f"pass the async function and its arguments, not the coroutine of {func.__qualname__}()"
        )
    if not callable(func):
        raise TypeError(f"func must be an async function, not {described(func)}")


def task_name(func: Any, name: object = None) -> str:
    """Return ``name``, or the name that anyio gives a task of ``func``."""
    if name is not None:
        return name if isinstance(name, str) else short(name)
    return function_name(func)


async def run_contained(
    promise: Promise, func: Callable[..., Awaitable[Any]], args: tuple[Any, ...]
) -> None:
    """Complete the promise with the outcome of ``func(*args)``; for a task without a group."""
    cancelled = _loops.current().cancelled
    try:
        await _run(promise, func, args)
    except BaseException as error:
        if consists_of(error, (cancelled,)):
            raise  # any other exception would end trio's run


async def _run(
    promise: Promise, func: Callable[..., Awaitable[Any]], args: tuple[Any, ...]
) -> None:
    try:
        awaitable = func(*args)
        if not inspect.isawaitable(awaitable):
            raise TypeError(
                f"{function_name(func)} is not an async function: "
                f"it returned {described(awaitable)}"
            )
        result = await awaitable
    except BaseException as error:
        drop_catching_frame(error)
        if isinstance(error, asyncio.CancelledError):
            promise.cancel(*error.args[:1])  # the argument of asyncio's cancel()
        elif ends_a_task(error):
            promise.cancel()
        else:
            promise.fail(error)
        if not isinstance(error, Exception):
            raise
    else:
        promise.keep(result)


_Resume = Callable[[Any], Any]  # a coroutine's send() or throw()


def drive(
    coroutine: Coroutine[Any, Any, Any],
    call: Callable[[_Resume, Any], Any],
    how: tuple[_Resume, Any] | None = None,
) -> Generator[Any, Any, Any]:
    """Run a coroutine in a task; make each step by ``call(resume, value)``, the first with ``how``.

    If this raises, the coroutine may still be suspended: close it.
    """
    resume, value = how or (coroutine.send, None)
    del how
    while True:
        try:
            yielded = call(resume, value)
        except StopIteration as stop:
            return stop.value
        finally:
            del value  # if it is an error, its traceback has this frame: they would be a cycle
        resume, value = yield from resumption(coroutine, yielded)
        del yielded  # it is a future, and may hold an error: the same


def resumption(
    coroutine: Coroutine[Any, Any, Any], yielded: Any
) -> Generator[Any, Any, tuple[_Resume, Any]]:
    """Suspend the task; return how to resume the coroutine."""
    try:
        return coroutine.send, (yield yielded)
    except GeneratorExit:  # the task is dropped with its loop
        raise
    except BaseException as error:  # a cancellation, or the error of an awaited future
        return coroutine.throw, drop_catching_frame(error)

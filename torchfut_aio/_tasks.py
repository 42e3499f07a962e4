"""Async functions that run in a task group, or on another thread's loop, as futures.

A task refers to its future through a `Promise` only. A task may end without running any code:
cancelled before its first step, or dropped with a loop that has closed. Then the promise dies
with it, and fails the future.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
import weakref
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from . import _loops
from ._core import Promise
from ._errors import drop_catching_frame
from ._future import Future
from ._repr import described, function_name, short
from ._worker import Worker, WorkerThread, call_contained

if TYPE_CHECKING:
    import anyio.abc
    import anyio.from_thread
    import trio

    _TaskGroup = anyio.abc.TaskGroup | asyncio.TaskGroup | trio.Nursery

T = TypeVar("T")
Args = TypeVarTuple("Args")

# A thread that has nothing to do waits for so long, in seconds, for more to come.
_LINGER = 0.1


def start_soon(
    task_group: _TaskGroup,
    func: Callable[[*Args], Awaitable[T]],
    *args: *Args,
    name: object = None,
) -> Future[T]:
    """Runs ``func(*args)`` as a task of a task group; returns a future of its result.

    What the function raises goes to the future and leaves the group alone; if nobody retrieves
    it, it is logged when the future goes. KeyboardInterrupt, SystemExit and cancellation also
    act on the group, as from any of its tasks. A task that is cancelled, or that ends with its
    loop, fails the future with ``concurrent.futures.CancelledError``; so a future of a group
    that has exited is done.

    If you cancel or complete the future yourself, the task goes on, and its result is dropped:
    others may still want what it does. ``asyncio.Task`` and the futures of anyio's portals are not
    like that. To end a task, cancel its group, or a cancel scope that it has entered.

    The task runs in a copy of the caller's context (``contextvars``), made at the call.

    Kernels may still fill what it returns, on the streams that are current when it has returned.
    A ``with stream:`` around ``return`` has ended by then, with `task_local_state`, too. So let
    the stream outside wait for that one: ``torch.cuda.current_stream().wait_stream(stream)``.

    Args:
        task_group: A task group of anyio, an ``asyncio.TaskGroup`` or a ``trio.Nursery``,
            of the loop that runs in this thread.
        func: An async function.
        *args: Its positional arguments.
        name: The name of the task; by default, that of the function.

    Raises:
        TypeError: ``task_group`` or ``func`` is not one.
        RuntimeError: The group is not active, or no event loop runs in this thread.

    Example:
        >>> import anyio
        >>> async def double(x):
        ...     await anyio.sleep(0.001)
        ...     return 2 * x
        >>> async def main():
        ...     async with anyio.create_task_group() as group:
        ...         futures = [torchfut_aio.start_soon(group, double, n) for n in range(3)]
        ...         return await torchfut_aio.gather(futures)
        >>> anyio.run(main)
        [0, 2, 4]
    """
    group: Any = task_group
    # An event loop has create_task, too, but does not wait for its tasks.
    is_asyncios = hasattr(group, "create_task") and hasattr(group, "__aexit__")
    if not hasattr(group, "start_soon") and not is_asyncios:
        raise TypeError(
            "start_soon() takes a task group of anyio, an asyncio.TaskGroup or a trio.Nursery, "
            f"not {described(group)}; from another thread, use submit()"
        )
    _function_checked(func)
    if not _loops.loop_in_this_thread():
        raise RuntimeError(
            "start_soon() has to be called in the thread of the task group's event loop; from "
            "another thread, use submit()"
        )
    future: Future[T] = Future()
    promise = Promise(future, task_name(func, name))
    if hasattr(group, "start_soon"):
        group.start_soon(_run, promise, func, args, name=promise.name)
        return future
    coroutine = _run(promise, func, args)
    try:
        task = group.create_task(coroutine, name=promise.name)
    except BaseException:
        coroutine.close()
        raise
    # A task that was cancelled before its first step keeps the promise as long as it lives.
    task.add_done_callback(promise.end)
    return future


def submit(
    portal: anyio.from_thread.BlockingPortal,
    func: Callable[[*Args], Awaitable[T]],
    *args: *Args,
    name: object = None,
) -> Future[T]:
    """Runs ``func(*args)`` on a portal's loop, from another thread; else as `start_soon`.

    A thread without an event loop blocks until the portal's loop has made the task. One that
    runs a loop does not: a thread beside it hands the call over, in order for each portal. Either
    way, the function runs in a copy of the caller's context (``contextvars``). What `start_soon`
    says of streams holds here, too.

    Args:
        portal: An ``anyio.from_thread.BlockingPortal``.
        func: An async function.
        *args: Its positional arguments.
        name: The name of the task; by default, that of the function.

    Raises:
        TypeError: ``portal`` or ``func`` is not one.
        RuntimeError: The portal is not running. In a thread that runs a loop, the future fails
            with it instead.

    Example:
        >>> import anyio.from_thread
        >>> async def double(x):
        ...     return 2 * x
        >>> with anyio.from_thread.start_blocking_portal() as portal:
        ...     torchfut_aio.submit(portal, double, 21).wait()
        42
    """
    if not hasattr(portal, "start_task_soon"):
        raise TypeError(
            "submit(portal, func) takes a BlockingPortal of anyio.from_thread, "
            f"not {described(portal)}"
        )
    _function_checked(func)
    future: Future[T] = Future()
    promise = Promise(future, task_name(func, name))
    # The loop's own thread, too: a portal refuses that, as it would wait for itself.
    if _loops.loop_in_this_thread():
        hand_over = _hand_overs.get(portal) or _hand_overs.setdefault(portal, _HandOver())
        hand_over.submit(promise, (contextvars.copy_context(), portal, func, args))
    else:
        portal.start_task_soon(_run, promise, func, args, name=promise.name)
    return future


class _HandOver(Worker):
    """Hands calls to one portal, for threads that must not wait for its loop."""

    def __init__(self) -> None:
        super().__init__("torchfut_aio submit")

    def serve(self, thread: WorkerThread) -> None:
        while not thread.is_to_end:
            for promise in self.take():
                call = self.work.pop(promise, None)
                if call is not None:
                    call_contained(self._hand_over, promise, *call)
            if not self.rest(_LINGER):
                return

    def _hand_over(
        self, promise: Promise, context: contextvars.Context, portal: Any, func: Any, args: Any
    ) -> None:
        start = functools.partial(portal.start_task_soon, _run, promise, func, args)
        try:
            context.run(start, name=promise.name)
        except Exception as error:
            promise.fail(drop_catching_frame(error))


_hand_overs: weakref.WeakKeyDictionary[Any, _HandOver] = weakref.WeakKeyDictionary()


def _function_checked(func: object) -> None:
    if inspect.iscoroutine(func):
        func.close()
        raise TypeError(
            f"pass the async function and its arguments, not the coroutine of {func.__qualname__}()"
        )
    if not callable(func):
        raise TypeError(f"func must be an async function, not {described(func)}")


def task_name(func: Any, name: object = None) -> str:
    """Returns ``name``, or the name that anyio gives a task of ``func``."""
    if name is not None:
        return name if isinstance(name, str) else short(name)
    return function_name(func)


async def run_contained(
    promise: Promise, func: Callable[..., Awaitable[Any]], args: tuple[Any, ...]
) -> None:
    """Keep the promise with the outcome of ``func(*args)``; raise only a cancellation of the loop.

    The loop runs this as a task of its own. Anything else would end trio's run, or asyncio logs it.
    """
    cancelled = _loops.current().cancelled
    try:
        await _run(promise, func, args)
    except BaseException as error:
        if _consists_of(error, (cancelled,)):
            raise


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
        kind = type(error)
        if issubclass(kind, asyncio.CancelledError):
            promise.cancel(*error.args[:1])  # what was given to cancel()
        elif _consists_of(error, _cancellations()):
            promise.cancel()
        else:
            promise.fail(error)
        if not issubclass(kind, Exception):
            raise
    else:
        promise.keep(result)


def _consists_of(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    """Return whether ``error`` is of these kinds, or a group of such, as a nursery raises."""
    if issubclass(type(error), BaseExceptionGroup):
        return all(_consists_of(each, kinds) for each in error.exceptions)  # type: ignore[attr-defined]
    return issubclass(type(error), kinds)


def _cancellations() -> tuple[type[BaseException], ...]:
    trios = getattr(sys.modules.get("trio"), "Cancelled", GeneratorExit)
    return asyncio.CancelledError, GeneratorExit, trios  # GeneratorExit: nothing will resume it

"""Async functions that run in a task group, or on another thread's loop, as futures.

The task keeps a `Promise`, the only thing that knows the future from the task's side. A
task may end in many ways without a chance to say so: cancelled before its first step,
or dropped by a loop that has closed. Then its promise dies with it, and fails the future.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from . import _loops
from ._errors import InvalidStateError, drop_catching_frame
from ._future import Future

if TYPE_CHECKING:
    import anyio.abc
    import anyio.from_thread
    import trio
    from typing_extensions import TypeVarTuple, Unpack

    Args = TypeVarTuple("Args")
    if sys.version_info >= (3, 11):
        _TaskGroup = anyio.abc.TaskGroup | asyncio.TaskGroup | trio.Nursery
    else:
        _TaskGroup = anyio.abc.TaskGroup | trio.Nursery

T = TypeVar("T")


def start_soon(
    task_group: _TaskGroup,
    func: Callable[[Unpack[Args]], Awaitable[T]],
    *args: Unpack[Args],
    name: object = None,
) -> Future[T]:
    """Runs ``func(*args)`` as a task of a task group; returns a future of its result.

    What the function raises goes to the future, and does not end the group: it is up to
    those who hold the future. A task that is cancelled fails it with
    ``concurrent.futures.CancelledError``, as does one that the end of its loop takes away;
    so a future of a group that has exited is done. KeyboardInterrupt, SystemExit and
    cancellation also act on the group, as from any task of it. An error that nobody reads is
    lost with the future. To complete the future yourself does not stop the task; then its
    result is dropped.

    Args:
        task_group: A task group of anyio, an ``asyncio.TaskGroup`` or a ``trio.Nursery``,
            of the loop that runs in this thread.
        func: An async function.
        *args: Its positional arguments.
        name: The name of the task; that of the function, if None.

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
    _function_checked(func)
    group: Any = task_group
    # An event loop can create tasks, too; but it does not wait for them.
    is_asyncios = hasattr(group, "create_task") and hasattr(group, "__aexit__")
    if not hasattr(group, "start_soon") and not is_asyncios:
        raise TypeError(
            "start_soon() takes a task group of anyio, an asyncio.TaskGroup or a trio.Nursery, "
            f"not {group!r}; from another thread, use submit()"
        )
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
    # Whoever holds a task that was cancelled before its first step holds the promise.
    task.add_done_callback(promise.end)
    return future


def submit(
    portal: anyio.from_thread.BlockingPortal,
    func: Callable[[Unpack[Args]], Awaitable[T]],
    *args: Unpack[Args],
    name: object = None,
) -> Future[T]:
    """Runs ``func(*args)`` on the loop of a portal, from another thread; see `start_soon`.

    It returns when the loop has got round to making the task.

    Args:
        portal: An ``anyio.from_thread.BlockingPortal``.
        func: An async function.
        *args: Its positional arguments.
        name: The name of the task; that of the function, if None.

    Raises:
        TypeError: ``portal`` or ``func`` is not one.
        RuntimeError: The portal is not running, or this is the thread of its loop: there,
            use `start_soon`.

    Example:
        >>> import anyio.from_thread
        >>> async def double(x):
        ...     await anyio.sleep(0.001)
        ...     return 2 * x
        >>> with anyio.from_thread.start_blocking_portal() as portal:
        ...     torchfut_aio.submit(portal, double, 21).wait()
        42
    """
    _function_checked(func)
    if not hasattr(portal, "start_task_soon"):
        raise TypeError(f"submit() takes a BlockingPortal of anyio.from_thread, not {portal!r}")
    future: Future[T] = Future()
    promise = Promise(future, task_name(func, name))
    try:
        portal.start_task_soon(_run, promise, func, args, name=promise.name)
    except RuntimeError as error:
        if is_portals_own_thread(error):
            raise RuntimeError(
                "on the portal's own loop, use start_soon(), not submit()"
            ) from error
        raise
    return future


def is_portals_own_thread(error: RuntimeError) -> bool:
    """Tells whether a portal has refused a call because it came from its own loop's thread."""
    return "event loop thread" in str(error)


def _function_checked(func: object) -> None:
    if inspect.iscoroutine(func):
        func.close()
        raise TypeError(
            f"pass the async function and its arguments, not the coroutine {func!r} of a call"
        )
    if not callable(func):
        raise TypeError(f"func must be an async function, not {func!r}")


def task_name(func: Any, name: object = None) -> str:
    """Returns ``name``, or what ``func`` is called, as anyio does."""
    if name is not None:
        return str(name)
    called = getattr(func, "__qualname__", None)
    return repr(func) if called is None else f"{func.__module__}.{called}"


class Promise:
    """The only reference from a task to the future of its result.

    It goes as soon as the future is done: the frames in an error's traceback lead to the
    promise, so an error that went to the future would otherwise be in a cycle with it.
    """

    __slots__ = ("_future", "name")

    def __init__(self, future: Future[Any], name: str) -> None:
        self._future: Future[Any] | None = future
        self.name = name

    def keep(self, result: object) -> None:
        """Completes the future, unless that has been done."""
        if self._future is not None:
            with suppress(InvalidStateError):  # somebody has completed it instead
                self._future.set_result(result)
            self._future = None

    def fail(self, error: BaseException) -> None:
        """Fails the future, unless that is done."""
        if self._future is not None:
            with suppress(InvalidStateError):
                self._future.set_exception(error)
            self._future = None

    def cancel(self, *why: object) -> None:
        """Fails the future as that of a task that was cancelled."""
        text = ": ".join((f"{self.name} was cancelled", *map(str, why)))
        self.fail(concurrent.futures.CancelledError(text))

    def end(self, _task: object = None) -> None:
        """Is told that the task has ended, with or without a word."""
        if self._future is not None and not self._future.done():
            self.cancel("before its first step, or because its event loop ended")

    __del__ = end


async def run_contained(
    promise: Promise, func: Callable[..., Awaitable[Any]], args: tuple[Any, ...]
) -> None:
    """Keeps the promise, for a loop on which nobody is above to take what would end it."""
    with suppress(KeyboardInterrupt, SystemExit):
        await _run(promise, func, args)


async def _run(
    promise: Promise, func: Callable[..., Awaitable[Any]], args: tuple[Any, ...]
) -> None:
    try:
        awaitable = func(*args)
        if not inspect.isawaitable(awaitable):
            raise TypeError(f"{func!r} is not an async function: it returned {awaitable!r}")
        result = await awaitable
    except BaseException as error:
        drop_catching_frame(error)
        kind = type(error)
        if issubclass(kind, asyncio.CancelledError):
            promise.cancel(*error.args[:1])  # what was given to cancel()
        elif issubclass(kind, (GeneratorExit, *_trios_cancellation())):
            promise.cancel()  # a coroutine that nobody will resume is closed by GeneratorExit
        else:
            promise.fail(error)
        if not issubclass(kind, Exception):
            raise
    else:
        promise.keep(result)


def _trios_cancellation() -> tuple[type[BaseException], ...]:
    cancelled = getattr(sys.modules.get("trio"), "Cancelled", None)
    return () if cancelled is None else (cancelled,)

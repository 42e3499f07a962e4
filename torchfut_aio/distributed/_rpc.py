"""Async functions as RPC handlers: `async_rpc`, where they run, and how RPC is shut down."""

from __future__ import annotations

import atexit
import contextvars
import functools
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import anyio
from torch.distributed.rpc import functions

from .. import _loops
from .._arguments import async_function_checked, timeout_checked
from .._devices import devices_in_use
from .._errors import warn_that_wait_blocks_a_loop
from .._future import Future
from .._rpc_errors import this_worker
from .._tasks import Promise, is_portals_own_thread, run_contained, task_name
from . import _background_loop

if TYPE_CHECKING:
    import anyio.from_thread

P = ParamSpec("P")
T = TypeVar("T")


def async_rpc(func: Callable[P, Awaitable[T]]) -> Callable[P, Future[T]]:
    """Makes an async function one that ``torch.distributed.rpc`` calls, in any number at once.

    In the place of ``rpc.functions.async_execution``: pass the function to ``rpc_async``,
    ``rpc_sync`` or ``remote`` as any other. At the callee it runs on one event loop: that of
    the portal given to `serve_on`, or else a background loop of this package, on uvloop if that is
    installed, which starts with the first call. There, nothing it calls may block.

    Tensors in the arguments that reside on an accelerator may be used at once: the streams
    that are current on the loop are ordered after the kernels that fill them. Distributed
    autograd does not follow the call to the loop.

    A caller that has timed out does not stop the function. An error reaches the caller as
    that of any RPC does. What `shutdown` cancels fails with
    ``concurrent.futures.CancelledError`` there.

    Below ``@staticmethod`` or ``@classmethod``, where there is one. Called directly, it runs in
    this process, on the same loop, and returns its future.

    Args:
        func: An ``async def`` function, importable under its name at caller and callee.

    Raises:
        TypeError: ``func`` is not an async function.

    Example:
        >>> import asyncio
        >>> @torchfut_aio.distributed.async_rpc
        ... async def double(x):
        ...     await asyncio.sleep(0.01)
        ...     return 2 * x
        >>> # at a caller: await as_future(rpc.rpc_async("worker1", double, args=(21,)))
        >>> double(21).wait()
        42
        >>> torchfut_aio.distributed.shutdown()
    """
    async_function_checked(func, "async_rpc")
    name = task_name(func)

    @functools.wraps(func)
    def call(*args: P.args, **kwargs: P.kwargs) -> Future[T]:
        # These travel in a future, so that the loop's streams can be ordered after them.
        arguments: Future[Any] = Future()
        arguments.set_result((args, kwargs))
        future: Future[T] = Future(devices=devices_in_use())
        for home in _homes[-1:]:
            home.start_soon(Promise(future, name), _handle, (func, arguments))
            return future
        _background_loop.start_soon(future, _handle, func, arguments, name=name)
        return future

    remote: Callable[P, Future[T]] = functions.async_execution(call)  # type: ignore[no-untyped-call]
    return remote


async def _handle(func: Callable[..., Awaitable[T]], arguments: Future[Any]) -> T:
    args, kwargs = await arguments.stream_ordered()
    return await func(*args, **kwargs)


class _Home:
    """A loop that the application has handed over, and what runs on it."""

    def __init__(self, loop: _loops.Loop) -> None:
        self._loop = loop
        self._open = True
        # These also keep the tasks, which asyncio does not.
        self._scopes: set[anyio.CancelScope] = set()

    def start_soon(self, promise: Promise, func: Callable[..., Any], args: Any) -> None:
        """Has the loop run ``func(*args)``, from any thread, which does not wait for it."""
        # In a context of its own: that of the calling thread is none of its business.
        spawn = functools.partial(self._loop.spawn, promise.end, self._run, promise, func, args)
        self._loop.call_soon(functools.partial(contextvars.Context().run, spawn))

    async def _run(self, promise: Promise, func: Callable[..., Any], args: Any) -> None:
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            if not self._open:
                scope.cancel()
            try:
                await run_contained(promise, func, args)
            finally:
                self._scopes.discard(scope)

    def close(self) -> None:
        """Cancels what runs, and what is still to come."""
        if self in _homes:
            _homes.remove(self)
        self._open = False
        self._loop.call_soon(self._cancel)

    def _cancel(self) -> None:
        for scope in list(self._scopes):
            scope.cancel()


_homes: list[_Home] = []  # the latest last


def serve_on(portal: anyio.from_thread.BlockingPortal) -> AbstractContextManager[object]:
    """Has the functions of `async_rpc` run on the loop of ``portal``, in this process.

    For an application that has a loop, of asyncio, uvloop or trio, whose state the functions
    share. From when this is called until the ``with`` block that it is used for ends; then
    those that still run are cancelled. Calls that come before or after run on the background
    loop: so call it before ``rpc.init_rpc``, and end the block after `shutdown`. Do not block
    that loop: call these two by ``anyio.to_thread.run_sync``.

    Args:
        portal: A portal that is running; this may be called on its loop, or elsewhere.

    Returns:
        A context manager.

    Raises:
        TypeError: ``portal`` is not one.
        RuntimeError: The portal is not running.

    Example:
        >>> import anyio.from_thread
        >>> @torchfut_aio.distributed.async_rpc
        ... async def double(x):
        ...     return 2 * x
        >>> with anyio.from_thread.start_blocking_portal() as portal:
        ...     with torchfut_aio.distributed.serve_on(portal):
        ...         double(21).wait()
        42
    """
    if not hasattr(portal, "start_task_soon"):
        raise TypeError(f"serve_on() takes a BlockingPortal of anyio.from_thread, not {portal!r}")
    # RPC's threads hand calls over to the loop, and do not wait until it has taken them.
    try:
        loop = portal.call(_loops.current)
    except RuntimeError as error:
        if not is_portals_own_thread(error):
            raise
        loop = _loops.current()
    home = _Home(loop)
    _homes.append(home)
    until_the_end = ExitStack()
    until_the_end.callback(home.close)
    return until_the_end


def shutdown(graceful: bool = True, timeout: float | None = None) -> None:
    """Shuts RPC down as ``rpc.shutdown`` does, and ends the background loop.

    Gracefully, RPCs in flight in any process complete first. Otherwise the functions of
    `async_rpc` that run are cancelled; their callers are told, or lose the connection. What
    nobody waits for is cancelled in either case if it runs on the background loop: a call
    that has timed out at its caller, or one that was made directly. It blocks, so an
    async application calls it by ``anyio.to_thread.run_sync``.

    ``rpc.shutdown()`` does all but end that loop. A process that exits with the loop still
    there is shut down, not gracefully.

    Args:
        graceful: Whether to wait for all processes of the group, and for what is in flight.
        timeout: How many seconds to wait for them. None is the default of ``rpc.shutdown``,
            which waits for ever: give one where a process may have died.

    Raises:
        RuntimeError: Others did not get there in time.

    Warns:
        BlockingWaitWarning: This thread runs an event loop, which stands still meanwhile.

    Example:
        >>> torchfut_aio.distributed.shutdown()  # no RPC here, but perhaps DDP hooks
    """
    if timeout is not None:
        timeout = timeout_checked(timeout)
    if _loops.loop_in_this_thread():
        warn_that_wait_blocks_a_loop(
            "shutdown() blocks the event loop that this thread runs, and RPCs that it serves; "
            "await anyio.to_thread.run_sync(shutdown) instead"
        )
    try:
        if not graceful:
            for home in _homes[:]:
                home.close()
            _background_loop.close()
        if this_worker() is not None:
            from torch.distributed import rpc

            given = {} if timeout is None else {"timeout": timeout}
            rpc.shutdown(graceful, **given)
    finally:
        _background_loop.close()


@atexit.register
def _shut_down_at_exit() -> None:
    # Else RPC's threads, told of what is cancelled, come for an interpreter that has gone.
    if _background_loop.is_running():
        shutdown(graceful=False)

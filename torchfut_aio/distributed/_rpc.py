"""Async functions as RPC handlers, the loop that they run on, and how both are shut down."""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import functools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .. import _core, _loops
from .._arguments import async_function_checked, timeout_checked
from .._core import Promise
from .._cpython import calling_module
from .._devices import devices_in_use
from .._errors import warn_that_wait_blocks_a_loop
from .._future import Future, InternalFuture
from .._pytorch import CALLS_ASYNC_FOR_RPC, CALLS_FOR_RPC, rpc_checked, this_worker
from .._repr import described
from .._tasks import run_contained, task_name
from .._threads import call_contained
from . import _background_loop

if TYPE_CHECKING:
    import anyio
    import anyio.from_thread

P = ParamSpec("P")
T = TypeVar("T")


def async_rpc(func: Callable[P, Awaitable[T]]) -> Callable[P, Future[T]]:
    """Let ``torch.distributed.rpc`` call an async function, with any number of calls at once.

    It replaces ``rpc.functions.async_execution``: pass the function to ``rpc_async``, ``rpc_sync``
    or ``remote`` like any other function. The callee runs all calls on one event loop: the loop of
    the portal given to `serve_on`, or else a background loop of this package, which starts with
    the first call and uses uvloop if that is installed. The function must not block it.

    The function may use tensors on an accelerator among its arguments without waiting: the current
    streams of the loop are ordered after the kernels that fill them. Distributed autograd does not
    follow the call to the loop.

    An error reaches the caller as with any RPC, and `torchfut_aio.as_future` makes a
    `torchfut_aio.RpcError` of it, whatever its type. A call that `shutdown` cancels fails with
    `torchfut_aio.CancelledError`. If a caller times out, the function continues.

    For hooks of DDP, use `async_comm_hook` instead.

    Put it below ``@staticmethod`` or ``@classmethod``. Called directly, the function runs in this
    process, on the same loop, and its future is returned.

    Args:
        func: An ``async def`` function, importable under its name at caller and callee.

    Raises:
        TypeError: ``func`` is not an async function.

    Example:
        >>> @torchfut_aio.distributed.async_rpc
        ... async def double(x):
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
        # In a future, so that the streams of the loop can be ordered after kernels that fill the
        # arguments.
        arguments: Future[Any] = Future()
        arguments.set_result((args, kwargs))
        future: Future[T] = Future(devices=devices_in_use())
        if calling_module(CALLS_ASYNC_FOR_RPC) == CALLS_FOR_RPC:
            # The caller raises the error; here it may never be retrieved.
            _core.ignore_error(future)
        _hosts[-1].start_soon(Promise(future, name), _handle, func, arguments)
        return future

    try:
        from torch.distributed.rpc.functions import async_execution
    except ImportError:  # torch has no RPC: only direct calls remain
        return call
    remote: Callable[P, Future[T]] = async_execution(call)  # type: ignore[no-untyped-call]
    return remote


async def _handle(func: Callable[..., Awaitable[T]], arguments: Future[Any]) -> T:
    args, kwargs = await arguments.stream_ordered()
    return await func(*args, **kwargs)


class _Host:
    """The loop that the application has given to `serve_on`, and our tasks on it."""

    def __init__(self, loop: _loops.Loop) -> None:
        self._loop = loop
        # One for each task. They keep the tasks alive; asyncio does not.
        self._scopes: set[anyio.CancelScope] = set()
        self._closed: InternalFuture[None] = InternalFuture()
        # Not `call_soon`: Ctrl-C in the loop can lose a call, but not the wake-up of a task. So a
        # task waits to cancel the others.
        loop.spawn(lambda: None, self._cancel_when_closed)

    def start_soon(self, promise: Promise, func: Callable[..., Any], *args: object) -> None:
        """Run ``func(*args)`` on the loop to complete ``promise``; do not wait for the loop."""
        # Not in the context of the calling thread, which is RPC's.
        spawn = functools.partial(contextvars.Context().run, self._spawn, promise, func, args)
        self._loop.call_soon(spawn)

    def _spawn(self, promise: Promise, func: Callable[..., Any], args: Any) -> None:
        ended = functools.partial(call_contained, promise.end)
        try:
            self._loop.spawn(ended, self._run, promise, func, args)
        except RecursionError:
            raise
        except RuntimeError:  # trio's run is ending. The promise is dropped, which fails the future
            pass

    async def _run(self, promise: Promise, func: Callable[..., Any], args: Any) -> None:
        from anyio import CancelScope  # here, as only this needs it, and not DDP hooks

        with CancelScope() as scope:
            # Add *before* the check. `_cancel_when_closed` cancels the scopes that it finds after
            # the close, so a scope is cancelled there or here.
            self._scopes.add(scope)
            if self._closed.done():
                scope.cancel()
            try:
                await run_contained(promise, func, args)
            finally:
                self._scopes.discard(scope)

    async def _cancel_when_closed(self) -> None:
        await self._closed
        for scope in [*self._scopes]:
            scope.cancel()

    def close(self) -> None:
        """Cancel the tasks, also those that start later."""
        if self in _hosts:
            _hosts.remove(self)  # *first*, so that new calls run elsewhere
        self._closed.try_set_result(None)


_hosts: list[Any] = [_background_loop]  # the last one runs the calls


def serve_on(portal: anyio.from_thread.BlockingPortal) -> contextlib.AbstractContextManager[object]:
    """Run the functions of `async_rpc` on the loop of ``portal``, in this process.

    For an application whose functions share state with its own loop, on asyncio, uvloop or trio.
    It is in force until the end of the ``with`` block, which cancels functions that still run.
    Calls before or after the block run on the background loop. So begin the block before
    ``rpc.init_rpc``, and end it after `shutdown`. Both of these functions block: on the loop, call
    them by ``anyio.to_thread.run_sync``.

    Args:
        portal: A portal that is running; this may be called on its loop, or elsewhere.

    Returns:
        A context manager.

    Raises:
        TypeError: ``portal`` is not one.
        RuntimeError: The portal is not running, or this build of PyTorch has no RPC.

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
        raise TypeError(
            f"serve_on() takes a BlockingPortal of anyio.from_thread, not {described(portal)}"
        )
    rpc_checked("serve_on")
    # RPC's threads call the loop directly: the portal would make them wait for it.
    try:
        host = portal.call(_host_here)
    except RuntimeError as error:
        if "event loop thread" not in str(error):  # this is the thread of the portal's loop
            raise
        host = _host_here()
    _hosts.append(host)
    return contextlib.closing(host)


def _host_here() -> _Host:
    return _Host(_loops.current())


def shutdown(graceful: bool = True, timeout: float | None = None) -> None:
    """Shut RPC down as ``rpc.shutdown`` does, and end the background loop.

    A graceful shutdown first waits for RPCs that are in flight in any process. Otherwise the
    running functions of `async_rpc` are cancelled; their callers get an error, or lose the
    connection. Either way, it cancels the tasks of the background loop for which no process waits:
    calls that timed out at their callers, and direct calls. It blocks: in async code, call it by
    ``anyio.to_thread.run_sync``.

    ``rpc.shutdown()`` alone does not end the background loop. A process that exits while the loop
    runs calls ``shutdown(graceful=False)``.

    Args:
        graceful: Whether to wait for all processes of the group, and for RPCs in flight.
        timeout: The longest time to wait for them, in seconds. None waits without limit, as
            ``rpc.shutdown`` does: pass a timeout if a process may have died.

    Raises:
        RuntimeError: Others did not shut down in time.

    Warns:
        BlockingWaitWarning: This thread runs an event loop, which it blocks.

    Example:
        >>> torchfut_aio.distributed.shutdown()  # no RPC here, but perhaps DDP hooks
    """
    timeout = timeout_checked(timeout)
    if _loops.loop_in_this_thread():
        warn_that_wait_blocks_a_loop(
            "shutdown() blocks the event loop that this thread runs, and its RPC handlers; "
            "await anyio.to_thread.run_sync(shutdown) instead"
        )
    try:
        if not graceful:
            for host in reversed(_hosts[:]):
                host.close()
        if this_worker() is not None:
            from torch.distributed import rpc

            given = {} if timeout is None else {"timeout": timeout}
            rpc.shutdown(graceful, **given)
    finally:
        _background_loop.close()


@atexit.register
def _shut_down_at_exit() -> None:
    # Otherwise RPC's threads would call into Python after the interpreter has ended.
    if _background_loop.is_running():
        shutdown(graceful=False)

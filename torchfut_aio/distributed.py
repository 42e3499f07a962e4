"""Bridges to torch.distributed: RPC handlers and DDP hooks that are async functions.

What they run on is in ``_background_loop.py``. To await collectives and RPCs needs none of
this: ``await as_future(dist.all_reduce(tensor, async_op=True))``, ``await
as_future(rpc.rpc_async(...))``. What that raises is a `torchfut_aio.RpcError`.

Names are what RPC pickles functions by, so `async_rpc` is used where a function is defined.
"""

from __future__ import annotations

import atexit
import contextvars
import functools
import inspect
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

import anyio
import torch
from torch._C._distributed_c10d import GradBucket
from torch.distributed.rpc import functions

from . import _background_loop, _loops
from ._arguments import timeout_checked
from ._devices import devices_in_use
from ._errors import warn_that_wait_blocks_a_loop
from ._future import Future
from ._rpc_errors import this_worker
from ._tasks import Promise, is_portals_own_thread, run_contained, task_name

if TYPE_CHECKING:
    import anyio.from_thread

__all__ = ["async_comm_hook", "async_rpc", "serve_on", "shutdown"]

P = ParamSpec("P")
T = TypeVar("T")
_Hook = Callable[[Any, GradBucket], Coroutine[Any, Any, torch.Tensor]]
_TorchHook = Callable[[Any, GradBucket], Future[torch.Tensor]]


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
    _async_checked(func, "async_rpc")
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


@overload
def async_comm_hook(hook: _Hook) -> _TorchHook: ...
@overload
def async_comm_hook(*, overlap: bool) -> Callable[[_Hook], _TorchHook]: ...
def async_comm_hook(hook: Any = None, *, overlap: bool = False) -> Any:
    """Makes ``async def hook(state, bucket)`` a communication hook of DDP.

    For ``ddp.register_comm_hook(state, hook)``. It runs on the background loop, while the
    backward pass goes on, and returns the tensor that takes the place of ``bucket.buffer()``.
    The streams that are current there are ordered after the kernels that fill the bucket, and
    the optimiser's after those that fill the result. What it raises, ``backward()`` raises.

    Collectives have to be started in the same order on every rank. So the hook runs for one
    bucket after the other, in their order, which is the same everywhere, and not after it has
    raised, until the next backward pass. After a hook has raised on all ranks, training may
    go on. If it did on some only, the others may wait for it, or take its next collective for
    another: let such a process end. If the backward passes of several models overlap,
    decorate once for each: ``register_comm_hook(None, async_comm_hook(hook))``.

    Args:
        hook: An async function.
        overlap: Start the hook for each bucket at once. Right only for a hook that awaits
            nothing before its only collective.

    Raises:
        TypeError: ``hook`` is not an async function.

    Example:
        >>> import torch.distributed as dist
        >>> @torchfut_aio.distributed.async_comm_hook
        ... async def mean(group, bucket):
        ...     tensor = bucket.buffer().div_(dist.get_world_size(group))
        ...     await torchfut_aio.as_future(dist.all_reduce(tensor, group=group, async_op=True))
        ...     return tensor
        >>> # ddp.register_comm_hook(None, mean)
    """
    if hook is None:
        return functools.partial(async_comm_hook, overlap=overlap)
    _async_checked(hook, "async_comm_hook")
    reduction = _Reduction(hook, overlap)

    def call(state: Any, bucket: GradBucket) -> Future[torch.Tensor]:
        return reduction.start(state, bucket)

    # DDP checks annotations, and these are those of an async function.
    functools.update_wrapper(call, hook)
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("state", either), inspect.Parameter("bucket", either)]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


class _Reduction:
    """Runs a hook on the background loop."""

    def __init__(self, hook: _Hook, overlap: bool) -> None:
        self._hook = hook
        self._overlap = overlap
        # The future of the bucket before, as long as somebody completes it.
        self._last: weakref.ref[Future[torch.Tensor]] | None = None
        # DDP keeps the C++ side of a future, to which an error is a text.
        self._failed: deque[Future[torch.Tensor]] = deque(maxlen=1000)

    def start(self, state: object, bucket: GradBucket) -> Future[torch.Tensor]:
        if bucket.index() == 0:
            self._failed.clear()
        # It travels in a future, so that the loop's streams can be ordered after it.
        ready: Future[torch.Tensor] = Future()
        ready.set_result(bucket.buffer())
        future: Future[torch.Tensor] = Future(devices=devices_in_use())
        future.add_done_callback(self._keep_if_failed)
        before = None
        if not self._overlap:
            before = self._last and self._last()
            self._last = weakref.ref(future)
        name = task_name(self._hook)
        _background_loop.start_soon(future, self._reduce, state, bucket, ready, before, name=name)
        return future

    async def _reduce(
        self,
        state: object,
        bucket: GradBucket,
        ready: Future[torch.Tensor],
        before: Future[torch.Tensor] | None,
    ) -> torch.Tensor:
        try:
            if before is not None and bucket.index() == 0:
                await before.then(lambda _: None)  # of another backward pass, however it ended
            elif before is not None:
                # If that has failed, so does this: the other ranks may not even get this
                # far, and would take the next collective for one that they do wait for.
                await before.stream_ordered()
        finally:
            del before  # or the traceback of its error would refer to it
        await ready.stream_ordered()
        tensor = await self._hook(state, bucket)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"a communication hook returns a tensor, and {task_name(self._hook)} "
                f"returned {tensor!r}"
            )
        if tensor.numel() != ready.value().numel():
            raise ValueError(
                f"a communication hook returns as many numbers as bucket.buffer() has, "
                f"{ready.value().numel()}, and {task_name(self._hook)} returned {tensor.numel()}"
            )
        return tensor

    def _keep_if_failed(self, future: Future[torch.Tensor]) -> None:
        if future.exception() is not None:
            self._failed.append(future)


def _async_checked(func: object, by: str) -> None:
    if isinstance(func, (staticmethod, classmethod)):
        kind = type(func).__name__
        raise TypeError(f"put @{kind} above @{by}, which takes the function itself")
    if hasattr(func, "_wrapped_async_rpc_function"):
        raise TypeError(f"{func!r} has been made a function for RPC already")
    if not inspect.iscoroutinefunction(func):
        raise TypeError(f"{by} takes an async def function, not {func!r}")

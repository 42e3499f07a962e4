"""Bridges to torch.distributed: RPC handlers and DDP hooks that are async functions.

What they run on is in ``_background_loop.py``. To await collectives and RPCs needs none of
this: ``await as_future(dist.all_reduce(tensor, async_op=True))``, ``await
as_future(rpc.rpc_async(...))``. There the error of an RPC is the one that the callee raised,
of its own type, with the remote traceback in its text; of one that timed out, TimeoutError.

Names are what RPC pickles functions by, so `async_rpc` is used where a function is defined.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import functools
import inspect
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

import torch
from torch._C._distributed_c10d import GradBucket
from torch.distributed.rpc import functions

from . import _background_loop, _loops
from ._devices import devices_in_use
from ._future import Future
from ._rpc_errors import this_worker
from ._tasks import Promise, run_contained, task_name

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
            promise = Promise(future, name)
            home.call_soon(functools.partial(_spawn, home, promise, func, arguments))
            return future
        _background_loop.start_soon(future, _handle, func, arguments, name=name)
        return future

    remote: Callable[P, Future[T]] = functions.async_execution(call)  # type: ignore[no-untyped-call]
    return remote


async def _handle(func: Callable[..., Awaitable[T]], arguments: Future[Any]) -> T:
    args, kwargs = await arguments.stream_ordered()
    return await func(*args, **kwargs)


# The loops that were handed over, the latest last.
_homes: list[_loops.Loop] = []
_in_flight: set[asyncio.Task[Any] | None] = set()


def _spawn(
    loop: _loops.Loop, promise: Promise, func: Callable[..., Any], arguments: Future[Any]
) -> None:
    # In a context of its own: that of the calling thread is none of its business.
    contextvars.Context().run(loop.spawn, _kept, promise, func, arguments)


async def _kept(promise: Promise, func: Callable[..., Any], arguments: Future[Any]) -> None:
    # asyncio does not keep its tasks; trio does.
    task = asyncio.current_task() if asyncio._get_running_loop() else None
    _in_flight.add(task)
    try:
        await run_contained(promise, _handle, (func, arguments))
    finally:
        _in_flight.discard(task)


@contextmanager
def serve_on(portal: anyio.from_thread.BlockingPortal) -> Iterator[None]:
    """Has the functions of `async_rpc` run on the loop of ``portal``, in this process.

    For an application that has a loop, of asyncio, uvloop or trio, whose state the functions
    share. Calls that are running when the block ends go on, and are cancelled when the loop
    ends. Do not block that loop, with ``rpc.shutdown()`` for instance: call that by
    ``anyio.to_thread.run_sync``.

    Args:
        portal: A portal that is running; this may be called on its loop, or elsewhere.

    Raises:
        TypeError: ``portal`` is none.
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
        if "event loop thread" not in str(error):
            raise
        loop = _loops.current()  # as this is its thread
    _homes.append(loop)
    try:
        yield
    finally:
        _homes.remove(loop)


def shutdown(graceful: bool = True, timeout: float | None = None) -> None:
    """Shuts RPC down as ``rpc.shutdown`` does, and ends the background loop.

    Gracefully, RPCs in flight in any process complete first. Otherwise the functions of
    `async_rpc` that run on the background loop are cancelled, and their callers told. What
    else runs on that loop then, such as what was called directly, is cancelled in either
    case. It blocks, so an async application calls it by ``anyio.to_thread.run_sync``.

    ``rpc.shutdown()`` does all but the last. A process that exits with the loop still there
    is shut down, not gracefully.

    Args:
        graceful: Whether to wait for all processes of the group, and for what is in flight.
        timeout: How many seconds to wait for them; None for the default of ``rpc.shutdown``.

    Raises:
        RuntimeError: Others did not get there in time.

    Example:
        >>> torchfut_aio.distributed.shutdown()  # no RPC here, but perhaps DDP hooks
    """
    try:
        if not graceful:
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
    raised, until the next backward pass. If the backward passes of several models overlap,
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
        return tensor

    def _keep_if_failed(self, future: Future[torch.Tensor]) -> None:
        if future.exception() is not None:
            self._failed.append(future)


def _async_checked(func: object, by: str) -> None:
    if isinstance(func, (staticmethod, classmethod)):
        kind = type(func).__name__
        raise TypeError(f"put @{kind} above @{by}, which takes the function itself")
    if not inspect.iscoroutinefunction(func):
        raise TypeError(f"{by} takes an async def function, not {func!r}")

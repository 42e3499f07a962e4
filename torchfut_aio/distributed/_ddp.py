"""Async functions as communication hooks of DDP."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, overload

import torch
from torch._C._distributed_c10d import GradBucket

from .._arguments import async_function_checked
from .._devices import devices_in_use
from .._future import Future
from .._tasks import task_name
from . import _background_loop

_Hook = Callable[[Any, GradBucket], Coroutine[Any, Any, torch.Tensor]]
_TorchHook = Callable[[Any, GradBucket], Future[torch.Tensor]]


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
    async_function_checked(hook, "async_comm_hook")
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

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
from .._core import Promise
from .._devices import devices_in_use
from .._future import Future
from .._repr import described
from .._tasks import task_name
from . import _background_loop

_Hook = Callable[[Any, GradBucket], Coroutine[Any, Any, torch.Tensor]]
_TorchHook = Callable[[Any, GradBucket], Future[torch.Tensor]]
_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD


@overload
def async_comm_hook(hook: _Hook) -> _TorchHook: ...
@overload
def async_comm_hook(*, overlap: bool) -> Callable[[_Hook], _TorchHook]: ...
def async_comm_hook(hook: Any = None, *, overlap: bool = False) -> Any:
    """Makes ``async def hook(state, bucket)`` a communication hook of DDP.

    For ``ddp.register_comm_hook(state, hook)``. The hook runs on the background loop while the
    backward pass goes on, and returns the tensor that replaces ``bucket.buffer()``. The loop's
    current streams are ordered after the kernels that fill the bucket, and the optimiser's after
    those that fill the result. What the hook raises, ``backward()`` raises.

    Every rank has to start its collectives in the same order. So the hook runs for one bucket
    after the other, in their order, which is the same everywhere; after it has raised, it does
    not run until the next backward pass. If it raised on all ranks, training may go on. If it
    raised on some, the others may wait for these, or mistake their next collective for another:
    let such a process end. If the backward passes of several models overlap, decorate the hook
    once for each: ``register_comm_hook(None, async_comm_hook(hook))``.

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

    @functools.wraps(hook)
    def call(state: Any, bucket: GradBucket) -> Future[torch.Tensor]:
        return reduction.start(state, bucket)

    # DDP checks annotations, and the hook's are those of an async function.
    parameters = [inspect.Parameter(name, _EITHER) for name in ("state", "bucket")]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


class _Reduction:
    """Runs a hook on the background loop."""

    def __init__(self, hook: _Hook, overlap: bool) -> None:
        self._hook = hook
        self._overlap = overlap
        # The future of the bucket before, as long as anything will complete it.
        self._last: weakref.ref[Future[torch.Tensor]] | None = None
        # DDP keeps only the C++ side of a future, which does not keep an error.
        self._failed: deque[Future[torch.Tensor]] = deque(maxlen=1000)

    def start(self, state: object, bucket: GradBucket) -> Future[torch.Tensor]:
        if bucket.index() == 0:
            self._failed.clear()
        # The bucket travels in a future, so that the loop's streams can be ordered after it.
        ready: Future[torch.Tensor] = Future()
        ready.set_result(bucket.buffer())
        future: Future[torch.Tensor] = Future(devices=devices_in_use())
        future.add_done_callback(self._keep_if_failed)
        before = None
        if not self._overlap:
            before = self._last and self._last()
            self._last = weakref.ref(future)
        promise = Promise(future, task_name(self._hook))
        _background_loop.start_soon(promise, self._reduce, state, bucket, ready, before)
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
                await before.then(lambda _: None)  # of an earlier backward pass: ignore its error
            elif before is not None:
                # If it failed, so does this one: the other ranks may not get this far, and would
                # mistake the next collective for the one that they wait for.
                await before.stream_ordered()
        finally:
            del before  # its error's traceback has this frame: the two would be a cycle
        await ready.stream_ordered()
        tensor = await self._hook(state, bucket)
        name = task_name(self._hook)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"a communication hook returns a tensor, and {name} returned {described(tensor)}"
            )
        if tensor.numel() != ready.value().numel():
            raise ValueError(
                f"a communication hook returns as many numbers as bucket.buffer() has, "
                f"{ready.value().numel()}, and {name} returned {tensor.numel()}"
            )
        return tensor

    def _keep_if_failed(self, future: Future[torch.Tensor]) -> None:
        if future.exception() is not None:
            self._failed.append(future)

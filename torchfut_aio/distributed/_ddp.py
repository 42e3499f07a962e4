"""Async functions as communication hooks of DDP.

Every rank has to start the collectives of a process group in the same order. DDP and the model
start theirs in the thread of the backward pass, between two calls of the hook. So a collective of
the hook has a place among them only if it starts before the call returns, as in PyTorch's hooks.

A hook runs on the background loop. The call returns when the hook's coroutine has taken its first
step: when it first suspends, or ends.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch

from .. import _loops
from .._arguments import async_function_checked
from .._core import Promise
from .._devices import devices_in_use
from .._errors import drop_catching_frame
from .._future import Future
from .._pytorch import CppFuture
from .._repr import described
from .._tasks import drive, resumption, task_name
from . import _background_loop

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

    _Hook: TypeAlias = Callable[[Any, GradBucket], Coroutine[Any, Any, torch.Tensor]]
    _TorchHook: TypeAlias = Callable[[Any, GradBucket], Future[torch.Tensor]]

_CHECK = 5.0  # seconds after which to check whether the loop can run the hook at all


@overload
def async_comm_hook(hook: _Hook) -> _TorchHook: ...
@overload
def async_comm_hook(*, overlap: bool) -> Callable[[_Hook], _TorchHook]: ...
def async_comm_hook(hook: Any = None, *, overlap: bool = False) -> Any:
    """Make ``async def hook(state, bucket)`` a communication hook of DDP.

    For ``ddp.register_comm_hook(state, hook)``. The hook returns the tensor that replaces
    ``bucket.buffer()``. It runs on the background loop while the backward pass continues, in a
    copy of the context of the thread that called it. ``backward()`` raises the hook's error.

    In the hook, the current streams are ordered after the kernels that fill the bucket. The
    optimiser's streams are ordered after the kernels that fill the result.

    Every rank has to start the collectives of a process group in the same order. DDP calls the
    hook for each bucket in turn, and each call returns when the hook has first suspended.
    Collectives that the hook starts before that are ordered among those of DDP and of the model,
    as in PyTorch's hooks. The first await of a future of this package suspends even if the future
    is done.

    Collectives that the hook starts later need a separate process group: make one with
    ``dist.new_group()``. They start in the order of the buckets, as the hook resumes for one bucket
    after the other. NCCL needs one order over all groups: with NCCL, start every collective before
    the first await.

    After an error the hook is not called for later buckets of this backward pass. Calls that had
    already suspended are not resumed, and fail with the same error. If the hook raised on all
    ranks, training may continue. If it raised on some, let these processes end: the others may
    wait for them, or match their next collective with the wrong one. If the backward passes of
    several models overlap, decorate the hook once for each:
    ``register_comm_hook(None, async_comm_hook(hook))``.

    Args:
        hook: An async function.
        overlap: Resume the hook after its first suspension for any number of buckets at once.
            Set it only if the hook starts no collective then.

    Raises:
        TypeError: ``hook`` is not an async function.
        RuntimeError: From ``backward()``: it was called in the thread of the background loop.

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
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, either) for name in ("state", "bucket")]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


class _Reduction:
    """Calls a hook for one bucket after the other."""

    def __init__(self, hook: _Hook, overlap: bool) -> None:
        self._hook = hook
        self._overlap = overlap
        # The future of the last bucket whose hook has suspended.
        self._last: weakref.ref[Future[Any]] | None = None
        # In this backward pass, the future of the bucket whose hook has raised in its first step.
        self._raised_at_once: Future[torch.Tensor] | None = None
        # In this backward pass. DDP keeps only the C++ side of a future, which keeps no error.
        self._failed: deque[Future[torch.Tensor]] = deque(maxlen=1000)

    def start(self, state: object, bucket: GradBucket) -> Future[torch.Tensor]:
        _background_loop.check_that_it_may_be_waited_for()
        if bucket.index() == 0:
            self._begin_backward_pass()
        if self._raised_at_once is not None:
            return self._raised_at_once
        before = self._last
        call = _Call(self._hook, state, bucket, None if before is None else before())
        future: Future[torch.Tensor] = Future(devices=devices_in_use())
        future.add_done_callback(functools.partial(_keep_if_failed, self._failed))
        if not self._overlap:
            self._last = weakref.ref(future)
        call.start(future)
        # Not `if future.done()`: the hook may have suspended on some ranks only, and all ranks have
        # to continue alike.
        if not call.has_suspended:
            self._last = before  # the hook of the next bucket waits for it as well
            if future.exception() is not None:
                self._raised_at_once = future
        return future

    def _begin_backward_pass(self) -> None:
        self._failed = deque(maxlen=1000)  # not clear(): calls of the last pass may still fail
        self._raised_at_once = None
        last = None if self._last is None else self._last()
        if last is not None:  # wait for it nevertheless, but ignore its error
            self._last = weakref.ref(last.then(lambda _: None))


def _keep_if_failed(kept: deque[Future[torch.Tensor]], future: Future[torch.Tensor]) -> None:
    if future.exception() is not None:
        kept.append(future)


class _Call:
    """One call of a hook: `start` in the thread of the backward pass, `_run` on the loop."""

    # It does not refer to the future of the result. The traceback of an error leads here, so the
    # two would be a cycle.

    def __init__(
        self, hook: _Hook, state: object, bucket: GradBucket, before: Future[Any] | None
    ) -> None:
        self.has_suspended = False
        self._hook = hook
        self._state = state
        self._bucket = bucket
        self._before = before  # to wait for before the second step; its error is ours
        # A future, so that the loop's streams can be ordered after the kernels that fill it.
        self._ready: Future[torch.Tensor] = Future()
        self._ready.set_result(bucket.buffer())
        self._context = _context_for_the_loop()
        self._starter = _loops.ThreadWaiter()

    def start(self, future: Future[torch.Tensor]) -> None:
        """Run the hook on the background loop; return when it has suspended or ended."""
        starter = self._starter
        # The future is also done if the hook cannot run: see Promise.
        future.add_done_callback(lambda _: starter.unblock())
        _background_loop.start_soon(Promise(future, task_name(self._hook)), self._run)
        # No deadlock: the loop does not wait for this thread. (A hook that blocks in its first step
        # until this thread continues would also hang in PyTorch, which calls hooks here.) Only
        # backward() waits for this thread. It must not be called on the loop.
        starter.block(_CHECK)
        while not (self.has_suspended or future.done()):
            _background_loop.check_that_no_backward_blocks_it()
            starter.block(_CHECK)

    async def _run(self) -> torch.Tensor:
        self._ready.wait()  # orders streams; it is done, and does not block
        tensor = await self._drive(self._hook(self._state, self._bucket))
        name = task_name(self._hook)
        if not isinstance(tensor, torch.Tensor):
            # A future of torch, or the Work of a collective.
            is_future = isinstance(tensor, CppFuture) or hasattr(tensor, "get_future")
            raise TypeError(
                f"a communication hook returns a tensor, and {name} returned {described(tensor)}"
                + (": await as_future() of it, and return the tensor" if is_future else "")
            )
        if tensor.numel() != self._ready.value().numel():
            raise ValueError(
                f"a communication hook returns as many numbers as bucket.buffer() has, "
                f"{self._ready.value().numel()}, and {name} returned {tensor.numel()}"
            )
        return tensor

    @types.coroutine
    def _drive(self, coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        try:
            yielded = self._first_step(coroutine)
            how = yield from resumption(coroutine, yielded)
            cancellation = yield from self._wait_for_the_bucket_before()
            if cancellation is not None:
                how = coroutine.throw, cancellation
            rest = drive(coroutine, self._context.run, how)
            del yielded, how, cancellation  # one may be an error, whose traceback leads here
            return (yield from rest)
        except StopIteration as stop:  # of the first step
            return stop.value
        except BaseException:
            # The hook of the bucket before has failed, or the task is dropped between two steps. If
            # the coroutine has ended, this does nothing.
            self._context.run(coroutine.close)
            raise

    def _first_step(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        loop = _loops.current()
        # Always suspend. Otherwise, if the future that the hook awaits first is done on some ranks
        # only, the ranks would start the next collective at different places.
        loop.checkpoints_suspend = True
        try:
            yielded = self._context.run(coroutine.send, None)
        finally:
            loop.checkpoints_suspend = False
        self.has_suspended = True
        self._starter.unblock()
        return yielded

    @types.coroutine
    def _wait_for_the_bucket_before(self) -> Generator[Any, Any, BaseException | None]:
        before, self._before = self._before, None
        try:
            if before is None:
                return None
            cancellation: BaseException | None = yield from _done(before)
            before.value()
            return cancellation
        finally:
            del before


async def _done(future: Future[Any]) -> BaseException | None:
    """Wait until ``future`` is done; return the cancellation that came during the wait, if any."""
    done = future.then(lambda _: None)
    del future
    cancellation: BaseException | None = None
    while not done.done():
        try:
            await done
        except asyncio.CancelledError as error:
            cancellation = drop_catching_frame(error)
    return cancellation


def _context_for_the_loop() -> contextvars.Context:
    context = contextvars.copy_context()
    sniffio = sys.modules.get("sniffio")
    if sniffio is not None:  # in a context of a trio task, anyio would take the loop for trio
        context.run(sniffio.current_async_library_cvar.set, None)
    return context

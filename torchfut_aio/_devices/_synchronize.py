"""Awaiting devices themselves: the async counterparts of ``synchronize()`` and ``.cpu()``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from .. import _loops
from ._blocker import Blocker
from ._events import Mark, current_stream, mark_of, mark_stream, on_stream
from ._tensors import replaced, tensors
from ._watcher import Wait, watcher_of

__all__ = ["reached", "synchronize", "to_host"]

T = TypeVar("T")


def reached(marks: Sequence[Mark]) -> Generator[Any, Any, None]:
    """Suspends the current task until all ``marks`` are reached; for ``yield from``.

    Raises:
        RuntimeError: What the device says of a kernel that failed.
    """
    loop = _loops.current()
    watcher = watcher_of(loop)
    waiter = loop.waiter()
    wait = Wait(lambda _: waiter.wake())
    if not watcher.watch(marks, wait):
        return
    try:
        yield from waiter
    finally:
        watcher.forget(wait)
    if wait.error is not None:
        try:
            # Others may raise the same one: each starts from an empty traceback.
            raise wait.error.with_traceback(None)
        finally:
            del wait


class _Reached:
    """Makes an awaitable of `reached`."""

    __slots__ = ("_marks",)

    def __init__(self, marks: Sequence[Mark]) -> None:
        self._marks = marks

    def __await__(self) -> Generator[Any, Any, None]:
        yield from _loops.current().checkpoint()
        yield from reached(self._marks)


async def _synchronize(marks: Sequence[Mark]) -> None:
    await _Reached(marks)


# One for each device, so that any number of tasks cost one thread.
_blockers: dict[torch.device, Blocker] = {}


@functools.cache
def _blocking(device: torch.device) -> Callable[[], None]:
    return partial(torch.accelerator.synchronize, device)


async def _synchronize_device(device: torch.device) -> None:
    await _Reached([])  # a checkpoint, also if it is idle
    loop = _loops.current()
    waiter = loop.waiter()
    errors: list[Exception | None] = []

    def notify(error: Exception | None) -> None:
        errors.append(error)
        waiter.wake()

    blocker = _blockers.get(device) or _blockers.setdefault(device, Blocker())
    try:
        blocker.block(_blocking(device), notify)
        await _Woken(waiter)
    finally:
        blocker.forget(notify)
    if errors[0] is not None:
        raise errors[0].with_traceback(None)


class _Woken:
    """Makes an awaitable of a waiter."""

    __slots__ = ("_waiter",)

    def __init__(self, waiter: Iterable[Any]) -> None:
        self._waiter = waiter

    def __await__(self) -> Generator[Any, Any, None]:
        yield from self._waiter


def synchronize(
    target: torch.Event | torch.Stream | torch.device | str | int | None = None,
) -> Coroutine[Any, Any, None]:
    """Waits until a device has done its work, while the event loop runs; for ``await``.

    The async counterpart of ``torch.accelerator.synchronize``, of ``stream.synchronize()``
    and of ``event.synchronize()``. Only work that is enqueued when this is called is waited
    for (on a whole device: when it is awaited). If the task is cancelled, the work goes on.

    Args:
        target: An event that has been recorded (one that has not been is done, and one that
            is recorded again meanwhile is waited for as it is then); a stream;
            a device, as ``torch.device``, string or index, for all of its streams; or
            None, for the current stream of the current device. Devices have no event: one
            helper thread a device blocks for all tasks, until the device is idle even if
            these are cancelled, and an interpreter that exits waits for it.

    Raises:
        TypeError: ``target`` is none of these.
        RuntimeError: A kernel failed: the device's own error.

    Example:
        >>> import asyncio, torch
        >>> async def main():
        ...     tensor = torch.ones(3)  # on a GPU, if you have one
        ...     tensor *= 2
        ...     await torchfut_aio.synchronize()
        ...     return tensor.sum().item()
        >>> asyncio.run(main())
        6.0
    """
    if isinstance(target, torch.Event):
        return _synchronize([mark_of(target)])
    if isinstance(target, torch.Stream):
        return _synchronize([] if target.device.type == "cpu" else [mark_stream(target)])
    if target is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        current = [] if accelerator is None else [torch.accelerator.current_stream()]
        return _synchronize([mark_stream(stream) for stream in current])
    if isinstance(target, (torch.device, str, int)) and not isinstance(target, bool):
        device = torch.device(target)
        if device.type == "cpu":  # which has nothing pending
            return _synchronize([])
        if device.index is None:
            device = torch.device(device.type, torch.accelerator.current_device_index())
        return _synchronize_device(device)
    raise TypeError(
        "synchronize() waits for a torch.Event, a torch.Stream, a device or None, for "
        f"the current stream; not for {target!r} of type {type(target).__qualname__}"
    )


def to_host(value: T) -> Coroutine[Any, Any, T]:
    """Copies tensors of the accelerator to the host, while the event loop runs; for ``await``.

    The async counterpart of ``tensor.cpu()``. The tensors may be anywhere in ``value``: in
    containers, dataclasses and objects, however nested. They are copied to pinned memory on
    a side stream, once the kernels are done that are enqueued on the current streams when
    this is called; later kernels on these do not wait for the copies. (The allocator of
    pinned memory keeps what it has got; the first calls, which get it, may take milliseconds.)

    Args:
        value: Any object. Leave its tensors as they are until the copy has been awaited.

    Returns:
        ``value`` with host tensors in the place of those of the accelerator. What holds one
        of them is copied, shallowly; all else is the very same object. A value without any
        is returned as it is.

    Raises:
        RuntimeError: A kernel or a copy failed: the device's own error.
        TypeError: An object that holds a tensor cannot be copied with ``copy.copy``, or
            its attribute cannot be set.

    Example:
        >>> import asyncio, torch
        >>> accelerator = torch.accelerator.current_accelerator() or "cpu"
        >>> async def main():
        ...     batch = {"name": "first", "scores": [torch.ones(2, device=accelerator)]}
        ...     return await torchfut_aio.to_host(batch)
        >>> asyncio.run(main())
        {'name': 'first', 'scores': [tensor([1., 1.])]}
    """
    accelerator = torch.accelerator.current_accelerator()
    found = [t for t in tensors(value) if accelerator and t.device.type == accelerator.type]
    starts = [mark_stream(current_stream(device)) for device in {t.device for t in found}]
    return _to_host(value, found, starts)


async def _to_host(value: T, found: list[torch.Tensor], starts: list[Mark]) -> T:
    # The copies could wait on the side stream instead. But then those of one slow stream
    # would hold up all others, even when nobody wants them any more.
    await _Reached(starts)
    copies: dict[int, torch.Tensor] = {}
    for tensor in found:
        if (host := _pinned_like(tensor)) is not None:
            with on_stream(_side_stream(tensor.device)):
                copies[id(tensor)] = host.copy_(tensor, non_blocking=True)
        else:
            copies[id(tensor)] = await _in_thread(tensor.cpu)
    sides = [_side_stream(device) for device in {tensor.device for tensor in found}]
    await _Reached([mark_stream(side) for side in sides])
    copied: T = replaced(value, copies)
    return copied


def _pinned_like(tensor: torch.Tensor) -> torch.Tensor | None:
    """Returns pinned memory for a copy; None if the copy has to block, and needs a thread."""
    # Sparse tensors and subclasses take several steps, of which some block.
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return None
    try:
        return torch.empty_like(tensor, device="cpu", pin_memory=True)
    except RuntimeError:  # the accelerator, or the memory of the host, has none
        return None


@functools.cache
def _side_stream(device: torch.device) -> torch.Stream:
    return torch.Stream(device)


async def _in_thread(function: Any) -> Any:
    # Imported here, as only this needs it.
    from anyio.to_thread import run_sync

    return await run_sync(function, abandon_on_cancel=True)

"""What a program awaits of a device: the async ``synchronize()`` and ``.cpu()``."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

import torch

from .._loops import current
from .._repr import described
from .._threads import BlockingThread
from ._events import RecordedEvent, record_event
from ._streams import call_beside_captures, current_stream, finish_device, on_streams, side_stream
from ._tensors import PLAIN, device_of, devices_of, replaced, tensors
from ._watcher import BLOCKER, reached

T = TypeVar("T")


def synchronize(
    target: torch.Event | torch.Stream | torch.device | str | int | None = None,
) -> Coroutine[Any, Any, None]:
    """Waits until a device has done its work, while the event loop runs; for ``await``.

    The async counterpart of ``torch.accelerator.synchronize``, ``stream.synchronize()`` and
    ``event.synchronize()``. Waits for the work that is enqueued when this is called (on a whole
    device: when it is awaited). If the task is cancelled, the work goes on.

    Args:
        target: An event that has been recorded (one that has not been is done; one that
            is recorded again meanwhile is waited for as it is then); a stream;
            a device, as ``torch.device``, string or index, for all of its streams; or
            None, for the current stream of the current device. For a device, one helper
            thread blocks for all tasks, until the device is idle even if these are
            cancelled, and an interpreter that exits waits for it.

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
        return _synchronize([RecordedEvent(target)])
    if isinstance(target, torch.Stream):
        return _synchronize([] if target.device.type == "cpu" else [record_event(target)])
    if target is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        streams = [] if accelerator is None else [torch.accelerator.current_stream()]
        return _synchronize([record_event(stream) for stream in streams])
    if isinstance(target, (torch.device, str, int)) and not isinstance(target, bool):
        device = torch.device(target)
        if device.type == "cpu":  # which has nothing pending
            return _synchronize([])
        if device.index is None:
            device = torch.device(device.type, torch.accelerator.current_device_index())
        return _synchronize_device(device)
    raise TypeError(
        "synchronize() waits for a torch.Event, a torch.Stream, a device or None, for "
        f"the current stream; not for {described(target)}"
    )


async def _synchronize(events: list[RecordedEvent]) -> None:
    await reached(events)


# One for each device, so that any number of tasks cost one thread; and what that calls.
_blockers: dict[torch.device, tuple[BlockingThread, Callable[[], None]]] = {}


async def _synchronize_device(device: torch.device) -> None:
    await reached([])  # a checkpoint, also if it is idle
    call = _blockers.get(device)
    if call is None:
        thread = BlockingThread(BLOCKER, daemon=False)
        call = _blockers.setdefault(device, (thread, functools.partial(finish_device, device)))
    await _called(*call)


@types.coroutine
def _called(blocker: BlockingThread, function: Callable[[], object]) -> Generator[Any, Any, None]:
    """Waits until the thread of ``blocker`` has called ``function``; raises what that raised."""
    loop = current()
    waiter = loop.waiter()
    errors: list[Exception | None] = []

    def notify(error: Exception | None) -> None:
        errors.append(error)
        loop.wake(waiter)

    try:
        blocker.submit(notify, function)
        yield from waiter
    finally:
        blocker.work.pop(notify, None)
    error = errors.pop()
    if error is not None:
        try:
            raise error.with_traceback(None)
        finally:
            del error  # it has this frame


def to_host(value: T) -> Coroutine[Any, Any, T]:
    """Copies tensors of the accelerator to the host, while the event loop runs; for ``await``.

    The async counterpart of ``tensor.cpu()``. The tensors may be in containers that torch's pytree
    knows, in dataclasses, and in the attributes of plain objects, but not of a module, however
    nested. They are copied to pinned memory on
    a side stream, once the kernels are done that are enqueued on the current streams when
    this is called; later kernels on these do not wait for the copies. (The first calls, which
    allocate the pinned memory, may take milliseconds.)

    Args:
        value: Any object. Leave its tensors as they are until the copy has been awaited.

    Returns:
        ``value`` with host tensors in the place of those of the accelerator. What holds one
        of them is copied, shallowly; all else is the very same object.

    Raises:
        RuntimeError: A kernel or a copy failed: the device's own error.
        TypeError: An object that holds a tensor cannot be copied with ``copy.copy``, or
            its attribute cannot be set.

    Example:
        >>> import asyncio, torch
        >>> device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        >>> async def main():
        ...     batch = {"name": "first", "scores": [torch.ones(2, device=device)]}
        ...     return await torchfut_aio.to_host(batch)
        >>> asyncio.run(main())
        {'name': 'first', 'scores': [tensor([1., 1.])]}
    """
    accelerator = torch.accelerator.current_accelerator()
    found = [t for t in tensors(value) if accelerator and device_of(t).type == accelerator.type]
    starts = [record_event(current_stream(device)) for device in devices_of(found)]
    return _to_host(value, found, starts)


async def _to_host(value: T, found: list[torch.Tensor], starts: list[RecordedEvent]) -> T:
    # The copies could wait on the side stream instead. But then those of one slow stream
    # would hold up all others, even when nobody wants them any more.
    await reached(starts)
    copies: dict[int, torch.Tensor] = {}
    for tensor in found:
        if (host := _pinned_like(tensor)) is not None:
            with on_streams([side_stream(tensor.device)]):
                copies[id(tensor)] = host.copy_(tensor, non_blocking=True)
        else:
            from anyio.to_thread import run_sync  # as only this needs it

            copy = functools.partial(call_beside_captures, device_of(tensor), tensor.cpu)
            copies[id(tensor)] = await run_sync(copy, abandon_on_cancel=True)
    sides = [side_stream(device) for device in devices_of(found)]
    await reached([record_event(side) for side in sides])
    copied: T = replaced(value, copies)
    return copied


def _pinned_like(tensor: torch.Tensor) -> torch.Tensor | None:
    """Returns pinned memory for a copy; None if the copy has to block, and needs a thread."""
    # Sparse tensors and subclasses take several steps, of which some block.
    if type(tensor) not in PLAIN or tensor.layout != torch.strided:
        return None
    allocate = functools.partial(torch.empty_like, tensor, device="cpu", pin_memory=True)
    try:
        return call_beside_captures(tensor.device, allocate)
    except RecursionError:
        raise
    except RuntimeError:  # the accelerator, or the memory of the host, has none
        return None

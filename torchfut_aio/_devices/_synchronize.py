"""The async counterparts of ``synchronize()`` and ``tensor.cpu()``."""

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
from ._tensors import PLAIN, device_of, devices_of, map_tensors, search
from ._watcher import BLOCKER, reached

T = TypeVar("T")


def synchronize(
    target: torch.Event | torch.Stream | torch.device | str | int | None = None,
) -> Coroutine[Any, Any, None]:
    """Wait until a device has done its work, while the event loop runs; for ``await``.

    The async counterpart of ``torch.accelerator.synchronize``, ``stream.synchronize()`` and
    ``event.synchronize()``. It waits for the work that is enqueued when it is called or, for a
    whole device, when it is awaited. If the task is cancelled, the work continues.

    Args:
        target: A recorded event, a stream, a device or None. An event that was never recorded
            counts as reached; if it is recorded again, the latest recording is awaited. A device
            is a ``torch.device``, string or index, and means all of its streams: one helper thread
            blocks for all tasks until the device is idle, even if they are cancelled, and an
            interpreter that exits waits for it. None is the current stream of the current device.

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
        if device.type == "cpu":  # nothing is pending on it
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


# The thread for each device, and the function that it calls. Tasks share them.
_blockers: dict[torch.device, tuple[BlockingThread, Callable[[], None]]] = {}


async def _synchronize_device(device: torch.device) -> None:
    await reached([])  # a checkpoint, even if the device is idle
    call = _blockers.get(device)
    if call is None:
        thread = BlockingThread(BLOCKER, daemon=False)
        call = _blockers.setdefault(device, (thread, functools.partial(finish_device, device)))
    await _called(*call)


@types.coroutine
def _called(blocker: BlockingThread, function: Callable[[], object]) -> Generator[Any, Any, None]:
    """Wait until the thread of ``blocker`` has called ``function``; raise its error."""
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
            del error  # its traceback refers to this frame


def to_host(value: T) -> Coroutine[Any, Any, T]:
    """Copy tensors of the accelerator to the host, while the event loop runs; for ``await``.

    The async counterpart of ``tensor.cpu()``. The tensors may be nested in containers that torch's
    pytree knows, such as lists, tuples and dicts, and in dataclasses. They are copied to pinned
    memory on a side stream, after the kernels that are enqueued on the current streams when this is
    called; later kernels on these streams do not wait for the copies. (The first calls, which
    allocate the pinned memory, may take milliseconds.)

    Args:
        value: A tensor, a container, a dataclass, or any other object. Do not change its tensors
            until the copy has been awaited.

    Returns:
        ``value`` with host tensors in place of those of the accelerator. Containers and dataclasses
        with such a tensor are copied. Other objects stay as they are.

    Raises:
        RuntimeError: A kernel or a copy failed: the device's own error.
        TypeError: Another object in ``value``, such as a set, holds a tensor of the accelerator.
            (Modules are not searched, so they may hold some.)

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
    found: list[torch.Tensor] = []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        if accelerator is not None and device_of(tensor).type == accelerator.type:
            found.append(tensor)
        return tensor

    map_tensors(collect, value)
    if accelerator is not None and len(found) < len(search(value, accelerator.type)[0]):
        raise TypeError(
            f"to_host() copies tensors, and those in containers that torch's pytree knows and in "
            f"dataclasses; another object in {described(value)} holds a tensor of "
            f"{accelerator.type}: pass its tensors"
        )
    starts = [record_event(current_stream(device)) for device in devices_of(found)]
    return _to_host(value, found, starts)


async def _to_host(value: T, found: list[torch.Tensor], starts: list[RecordedEvent]) -> T:
    # Wait here. If the side stream were ordered after the kernels instead, copies that wait for one
    # slow stream would delay all others, even after they were cancelled.
    await reached(starts)
    copies: dict[int, torch.Tensor] = {}
    for tensor in found:
        if (host := _pinned_like(tensor)) is not None:
            with on_streams([side_stream(tensor.device)]):
                copies[id(tensor)] = host.copy_(tensor, non_blocking=True)
        else:
            from anyio.to_thread import run_sync  # only such copies need it

            copy = functools.partial(call_beside_captures, device_of(tensor), tensor.cpu)
            copies[id(tensor)] = await run_sync(copy, abandon_on_cancel=True)
    sides = [side_stream(device) for device in devices_of(found)]
    await reached([record_event(side) for side in sides])
    copied: T = map_tensors(lambda tensor: copies.get(id(tensor), tensor), value)
    return copied


def _pinned_like(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return pinned memory for a copy; None if the copy blocks, and so needs a thread."""
    # The copy of a sparse tensor, or of a subclass, takes several steps. Some of them block.
    if type(tensor) not in PLAIN or tensor.layout != torch.strided:
        return None
    allocate = functools.partial(torch.empty_like, tensor, device="cpu", pin_memory=True)
    try:
        return call_beside_captures(tensor.device, allocate)
    except RecursionError:
        raise
    except RuntimeError:  # the accelerator, or the memory of the host, has none
        return None

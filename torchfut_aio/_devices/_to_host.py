"""Awaiting the copies of tensors to the host: the async counterpart of ``.cpu()``."""

from __future__ import annotations

import functools
from collections.abc import Coroutine
from typing import Any, TypeVar

import torch

from ._events import RecordedEvent, record_event
from ._reached import Reached
from ._streams import current_stream, on_stream
from ._tensors import device_of, replaced, tensors

__all__ = ["side_stream", "to_host"]

T = TypeVar("T")


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
    found = [t for t in tensors(value) if accelerator and device_of(t).type == accelerator.type]
    starts = [record_event(current_stream(device)) for device in set(map(device_of, found))]
    return _to_host(value, found, starts)


async def _to_host(value: T, found: list[torch.Tensor], starts: list[RecordedEvent]) -> T:
    # The copies could wait on the side stream instead. But then those of one slow stream
    # would hold up all others, even when nobody wants them any more.
    await Reached(starts)
    copies: dict[int, torch.Tensor] = {}
    for tensor in found:
        if (host := _pinned_like(tensor)) is not None:
            with on_stream(side_stream(tensor.device)):
                copies[id(tensor)] = host.copy_(tensor, non_blocking=True)
        else:
            copies[id(tensor)] = await _in_thread(tensor.cpu)
    sides = [side_stream(device) for device in set(map(device_of, found))]
    await Reached([record_event(side) for side in sides])
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
def side_stream(device: torch.device) -> torch.Stream:
    return torch.Stream(device)


async def _in_thread(function: Any) -> Any:
    # Imported here, as only this needs it.
    from anyio.to_thread import run_sync

    return await run_sync(function, abandon_on_cancel=True)

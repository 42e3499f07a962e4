"""Awaiting devices themselves: the async counterparts of ``synchronize()``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from .. import _loops
from .._repr import described
from ._blocker import Blocker
from ._events import RecordedEvent, already_recorded, record_event
from ._reached import Reached

__all__ = ["synchronize"]


async def _synchronize(events: Sequence[RecordedEvent]) -> None:
    await Reached(events)


# One for each device, so that any number of tasks cost one thread.
_blockers: dict[torch.device, Blocker] = {}


@functools.cache
def _blocking(device: torch.device) -> Callable[[], None]:
    return partial(torch.accelerator.synchronize, device)


async def _synchronize_device(device: torch.device) -> None:
    await Reached([])  # a checkpoint, also if it is idle
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
    if not errors:  # somebody else has woken the task
        await _synchronize_device(device)
    elif errors[0] is not None:
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
        return _synchronize([already_recorded(target)])
    if isinstance(target, torch.Stream):
        return _synchronize([] if target.device.type == "cpu" else [record_event(target)])
    if target is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        current = [] if accelerator is None else [torch.accelerator.current_stream()]
        return _synchronize([record_event(stream) for stream in current])
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

"""What a future knows of the kernels that still fill its value.

A future hands out tensors of an accelerator while kernels still write to them. What makes
that safe is its *order*, made when it is completed, while the streams are current on which
the kernels were enqueued, and before anybody can see that it is complete. It has two parts:

- A C++ future with the devices of these tensors, completed then, so that it has events of
  its own on these streams. Waiting for it orders the current streams after the kernels; a
  callback of it runs on dedicated streams.
- Marks on these streams, for those who await that the kernels are done: what C++ records,
  Python cannot query.

For devices that were declared, torch tells which tensors count, by pickling. A
``torch.futures.Future`` made without ``devices`` hands them out with no synchronisation
at all; for ours, `found_order` looks for them. A process that uses no accelerator pays a
glance at the type of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from ._events import Mark, accelerator_in_use, current_stream, mark_stream, on_stream
from ._synchronize import reached
from ._tensors import tensors

__all__ = ["Order", "declared_order", "found_order", "joint_order"]


class Order:
    """The place of a value in the work of its devices' streams."""

    __slots__ = ("_cpp", "marks")

    def __init__(
        self,
        devices: Iterable[torch.device],
        found: list[torch.Tensor],
        marks: Sequence[Mark] | None = None,
    ) -> None:
        self._cpp: torch._C.Future[list[torch.Tensor]] = torch._C.Future(list(devices))
        self._cpp.set_result(found)
        if marks is None:
            used = {tensor.device for tensor in found if not tensor.is_cpu}
            marks = [mark_stream(current_stream(device)) for device in used]
        self.marks = marks

    def ready(self) -> Generator[Any, Any, None]:
        """Suspends the current task until the kernels have finished; for ``yield from``.

        Raises:
            RuntimeError: What the device says of a kernel that failed.
        """
        if self.marks:
            yield from reached(self.marks)
            self.marks = ()  # so that their events go back to the pool

    def wait(self) -> None:
        """Orders the current streams after the kernels."""
        self._cpp.wait()

    def run(self, callback: Callable[[], object]) -> None:
        """Calls ``callback`` now, on dedicated streams that are ordered after the kernels."""
        self._cpp.add_done_callback(lambda _: callback())

    def tensors(self) -> list[torch.Tensor]:
        """Returns the tensors; raises if one is on a device that was not declared."""
        return self._cpp.value()


def declared_order(
    devices: Sequence[torch.device], value: object
) -> tuple[Order | None, Exception | None]:
    """Returns the order of a value on ``devices``, and the error it is to fail with, if any."""
    order, found, error = None, [], None
    try:
        # C++ would call the same, and keep what it finds to itself.
        found = torch._jit_internal._extract_tensors(value)  # type: ignore[no-untyped-call]
    except Exception as exception:  # what cannot be pickled
        error = exception.with_traceback(None)
    try:
        order = Order(devices, found)
        order.tensors()
    except Exception as exception:  # on other devices; or the devices take no more events
        error = error or exception.with_traceback(None)
    return order, error


def found_order(value: object) -> tuple[Order | None, Exception | None]:
    """Returns the order of a value that holds something on an accelerator; or the error.

    There is one if the accelerator, because a kernel has failed, takes no more events.
    """
    if isinstance(value, torch.Tensor) and value.is_cpu:
        return None, None
    accelerator = accelerator_in_use()
    if accelerator is None:
        return None, None
    found = [tensor for tensor in tensors(value) if tensor.device.type == accelerator.type]
    if not found:
        return None, None
    try:
        return Order({tensor.device for tensor in found}, found), None
    except Exception as error:
        return None, error.with_traceback(None)


def joint_order(orders: Iterable[Order | None]) -> tuple[Order | None, Exception | None]:
    """Returns the order of several values together, if one of them has one; or the error."""
    parts = [order for order in dict.fromkeys(orders) if order is not None]
    if len(parts) < 2:
        return (parts[0] if parts else None), None
    try:
        return _joint_order(parts), None
    except Exception as error:
        return None, error.with_traceback(None)


def _joint_order(parts: Sequence[Order]) -> Order:
    found = [tensor for part in parts for tensor in part.tensors()]
    devices = {tensor.device for tensor in found if not tensor.is_cpu}
    with ExitStack() as streams:
        # On streams of its own, so as not to hold up those of whoever completes the last.
        for device in devices:
            streams.enter_context(on_stream(torch.Stream(device)))
        for part in parts:
            part.wait()
        return Order(devices, found, [mark for part in parts for mark in part.marks])

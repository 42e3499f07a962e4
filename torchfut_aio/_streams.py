"""Ordering streams after the kernels that fill a value.

A future hands out tensors of an accelerator while kernels still write to them. What makes
that safe is its *stream order*: a C++ future with the devices of these tensors, completed
while the streams are current on which the kernels were enqueued, so that it records
events there. Waiting for it orders the current streams after the kernels; a callback of
it runs on dedicated streams. It is complete before anybody can see that the future is.

For devices that were declared it holds the value, and C++ looks for the tensors. A
``torch.futures.Future`` made without ``devices`` hands them out with no synchronisation
at all; for ours, `found_order` looks for them. A process that uses no accelerator pays a
glance at the type of the result.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

__all__ = ["HOST_ONLY", "declared_order", "found_order"]

# Types whose instances hold no tensor: most results, told by a glance.
HOST_ONLY = frozenset({type(None), bool, int, float, complex, str, bytes})


def declared_order(
    devices: Iterable[torch.device], value: object
) -> tuple[torch._C.Future[Any], Exception | None]:
    """Returns the stream order of a value on ``devices``; and the error, if it is on others."""
    order: torch._C.Future[Any] = torch._C.Future(list(devices))
    order.set_result(value)
    try:
        order.value()
    except Exception as error:
        return order, error.with_traceback(None)
    return order, None


def found_order(value: object) -> torch._C.Future[Any] | None:
    """Returns the stream order of a value, or None if it holds nothing on an accelerator."""
    if isinstance(value, torch.Tensor) and value.is_cpu:
        return None
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not _initialised(accelerator):
        return None
    tensors = [t for t in _tensors(value) if t.device.type == accelerator.type]
    if not tensors:
        return None
    order, error = declared_order({tensor.device for tensor in tensors}, tensors)
    if error is not None:
        raise error
    return order


def _initialised(accelerator: torch.device) -> bool:
    # Asking must not initialise it; where it cannot be asked, it counts as in use.
    module = torch.get_device_module(accelerator)
    return bool(getattr(module, "is_initialized", lambda: True)())


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Yields the tensors in containers, dataclasses and objects, however nested, once each."""
    seen: dict[int, object] = {}  # kept, so that no id is used again meanwhile
    found = [value]
    while found:
        thing = found.pop()
        if type(thing) in HOST_ONLY or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, torch.Tensor):
            yield thing
        else:
            found.extend(_parts(thing))


# What offers a way to tensors, and does not contain them; and what only code refers to.
_OPAQUE = (
    torch._C.Future,
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
)


def _parts(thing: object) -> Iterator[object]:
    if isinstance(thing, _OPAQUE):
        return
    if isinstance(thing, Mapping):
        yield from list(thing.values())
    elif isinstance(thing, (list, tuple, set, frozenset, deque)):
        yield from list(thing)
    yield from list(getattr(thing, "__dict__", {}).values())
    for kind in type(thing).__mro__:
        for slot in vars(kind).values():
            if isinstance(slot, types.MemberDescriptorType):
                with suppress(AttributeError):  # not set
                    yield slot.__get__(thing)

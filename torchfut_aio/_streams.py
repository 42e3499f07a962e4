"""Ordering streams after the kernels that fill a value, when nobody declared its devices.

A ``torch.futures.Future`` that was made without ``devices`` hands out tensors of an
accelerator with no synchronisation at all. Ours looks for such tensors when it is
completed, and if there are any keeps a *stream order*: a C++ future of these tensors
alone, with their devices, whose events are recorded there and then. Waiting for it
orders the current streams after the kernels; a callback of it runs on dedicated streams.

A process that uses no accelerator pays a look at the type of the result.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

__all__ = ["HOST_ONLY", "stream_order"]

# Types whose instances hold no tensor: most results, told by a glance.
HOST_ONLY = frozenset({type(None), bool, int, float, complex, str, bytes})


def stream_order(value: object) -> torch._C.Future[Any] | None:
    """Returns what orders streams after the kernels that fill ``value``, enqueued so far.

    The streams that are current now are those on which they are expected, as
    documented for ``set_result``. None if ``value`` holds no tensor on an accelerator.
    """
    if isinstance(value, torch.Tensor) and value.is_cpu:
        return None
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not _initialised(accelerator):
        return None
    tensors = [t for t in _tensors(value) if t.device.type == accelerator.type]
    if not tensors:
        return None
    order: torch._C.Future[Any] = torch._C.Future(list({tensor.device for tensor in tensors}))
    order.set_result(tensors)
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

"""Tensors in values: in containers, in dataclasses, and in the attributes of plain objects.

Containers are those of Python that can be read twice, and those that torch's pytree knows. Tensors
in a module do not count. A search does not read iterators, such as a ``zip``, because that would
exhaust them.

A value may be any object, and its own code may raise: the ``__class__`` of a proxy, the
``__getattribute__`` of an object, the ``__torch_function__`` of a tensor. So a search uses the true
type if that is enough. If the value's code has to run and raises, nothing is found.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from operator import is_not
from typing import Any

import torch

from .._pytorch import CppFuture, has_record_stream, no_torch_function, pytree_node
from ._events import says_no_events
from ._streams import call_with_current, current_stream, kind_of

# Types whose instances hold no tensor. Most results are of these, so it is checked first.
HOST_ONLY = frozenset({type(None), bool, int, float, complex, str, bytes})

# Their tensors are not part of a value that refers to them.
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_OPAQUE = (CppFuture, type, types.ModuleType, torch.nn.Module, *_FUNCTIONS)

# Instances of exactly these types have no attributes.
_BARE = frozenset({list, tuple, dict, set, frozenset, deque})

# Tensors that have only their memory, unlike those of other subclasses.
PLAIN = (torch.Tensor, torch.nn.Parameter)


def search(
    value: object, kind: str | None = None, most: int = sys.maxsize
) -> tuple[list[torch.Tensor], bool]:
    """Return the tensors in ``value``, on devices of this kind or, by default, on all.

    Only the first ``most`` parts are searched, breadth first. Also return whether these were all.
    """
    if type(value) is torch.Tensor:
        return [value] if kind in (None, kind_of(value.device)) else [], True
    found: list[torch.Tensor] = []
    seen: dict[int, object] = {}  # keeps the objects, so that no id is used again
    left: deque[Any] = deque([value])
    while left:
        thing = left.popleft()
        if type(thing) in HOST_ONLY or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if not _is(thing, torch.Tensor):
            parts = _parts(thing, most)
            most -= len(parts)
            left.extend(parts)
        elif kind in (None, kind_of(device_of(thing))):
            found.append(thing)
    return found, most > 0


def device_of(tensor: torch.Tensor) -> torch.device:
    """Return the device of ``tensor``; the host if the tensor's own code raises."""
    if type(tensor) is torch.Tensor:
        return tensor.device
    try:
        with no_torch_function():
            return tensor.device
    except Exception:
        return torch.device("cpu")


def devices_of(found: Iterable[torch.Tensor]) -> set[torch.device]:
    """Return the devices of tensors, without the host."""
    return {device for tensor in found if kind_of(device := device_of(tensor)) != "cpu"}


def _is(thing: object, kind: type | tuple[type, ...]) -> bool:
    """Do what ``isinstance`` does, without ``__class__``, which may be a proxy's."""
    return issubclass(type(thing), kind)


def keep_memory(found: Iterable[torch.Tensor], streams: dict[torch.device, torch.Stream]) -> None:
    """Keep the memory of tensors that are freed until the current streams are done with it.

    ``streams`` is a cache of the current streams.
    """
    rest = []
    for tensor in found:
        plain = type(tensor) in PLAIN and tensor.layout == torch.strided
        if plain and has_record_stream(kind_of(device := tensor.device)):
            stream = streams.get(device) or streams.setdefault(device, current_stream(device))
            tensor.record_stream(stream)
        else:
            rest.append(tensor)
    devices = devices_of(rest)
    if devices:
        # C++ knows the memory of all kinds of tensors, on every device.
        future: CppFuture[list[torch.Tensor]] = CppFuture(list(devices))
        try:
            call_with_current(next(iter(devices)), future.set_result, rest)
        except RuntimeError as error:
            if not says_no_events(error):
                raise
        else:
            call_with_current(next(iter(devices)), future.wait)


def _parts(thing: Any, most: int) -> list[Any]:
    """Return what ``thing`` holds directly: the first ``most`` of its items and attributes."""
    parts: list[Any] = []
    if not most:
        return parts
    # A thing that cannot be read, such as a mapping whose file is closed, counts as empty.
    with suppress(Exception):
        parts += islice(_items(thing), most)
    with suppress(Exception):
        parts += islice(_attributes(thing), most - len(parts))
    return parts


def _items(thing: Any) -> Iterator[Any]:
    if _is(thing, Mapping):
        return iter(thing.values())
    if _is(thing, (list, tuple, set, frozenset, deque)):
        return iter(thing)
    node = pytree_node(type(thing))
    return iter(() if node is None else node.flatten_fn(thing)[0])


def _attributes(thing: object) -> Iterator[object]:
    if type(thing) in _BARE or _is(thing, _OPAQUE):
        return
    with suppress(AttributeError):
        yield from list(object.__getattribute__(thing, "__dict__").values())
    for kind in type(thing).__mro__:
        for name, slot in list(vars(kind).items()):
            if type(slot) is types.MemberDescriptorType and name != "__dict__":
                with suppress(AttributeError):  # not set
                    yield slot.__get__(thing)


def map_tensors(
    function: Callable[[torch.Tensor], torch.Tensor],
    value: Any,
    done: dict[int, tuple[Any, Any]] | None = None,
) -> Any:
    """Return ``value`` with ``function(tensor)`` in place of each tensor in it.

    Containers and dataclasses are copied if something in them is replaced. All other objects stay
    the same, also if they hold tensors.
    """
    if type(value) in HOST_ONLY:
        return value
    # By id. It keeps the originals, so that no id is used again.
    done = {} if done is None else done
    if id(value) not in done:
        new = value
        if _is(value, torch.Tensor):
            new = function(value)
        elif (taken := _taken_apart(value)) is not None:
            parts, make = taken
            fresh = [map_tensors(function, part, done) for part in parts]
            if any(map(is_not, fresh, parts)):
                new = make(fresh)
        done[id(value)] = value, new
    return done[id(value)][1]


def _taken_apart(thing: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """Return the parts of a container or dataclass, and a function that rebuilds it of others."""
    kind = type(thing)
    if kind is list:
        return thing, list
    if kind is dict:
        return [*thing.values()], lambda parts: dict(zip(thing, parts, strict=True))
    if (node := pytree_node(kind)) is not None:
        parts, context = node.flatten_fn(thing)
        return [*parts], lambda parts: node.unflatten_fn(parts, context)
    if issubclass(kind, tuple):
        return [*thing], getattr(kind, "_make", kind)
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind) if hasattr(thing, field.name)]
        return [getattr(thing, name) for name in names], partial(_with_fields, thing, names)
    return None


def _with_fields(thing: Any, names: list[str], values: list[Any]) -> Any:
    copied = copy.copy(thing)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(copied, name, value)  # as the dataclass may be frozen
    return copied

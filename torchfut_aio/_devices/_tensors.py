"""Tensors in values: in containers, in dataclasses, and in the attributes of plain objects.

Containers are those of Python that can be read twice, and those that torch's pytree knows. A
module is none of these: what it holds is not the value's. Nor is what only iterates, such as a
``zip``, as a search would use it up.

A value may be any object, and what it says of itself may raise: a proxy has a ``__class__`` of
its own, an object a ``__getattribute__``, a tensor a ``__torch_function__``. So its true type
decides where that will do; where the value's own code has to run and raises, nothing is found.
"""

from __future__ import annotations

import copy
import types
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import torch

from .._pytorch import CppFuture, has_record_stream, no_torch_function, pytree_node
from .._repr import described
from ._events import says_no_events
from ._streams import call_with_current, current_stream, kind_of

# Types whose instances hold no tensor: most results, told by a glance.
HOST_ONLY = frozenset({type(None), bool, int, float, complex, str, bytes})

# What leads to tensors that are no part of the value.
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_OPAQUE = (CppFuture, type, types.ModuleType, torch.nn.Module, *_FUNCTIONS)

# Those of these very types have no attributes.
_BARE = frozenset({list, tuple, dict, set, frozenset, deque})

# Tensors that are nothing but their memory.
PLAIN = (torch.Tensor, torch.nn.Parameter)

_FILLED = (Mapping, list, set, deque)


def tensors(value: object) -> Iterator[torch.Tensor]:
    """Yields the tensors in ``value``, once each."""
    return (thing for thing, _ in _walk(value) if _is(thing, torch.Tensor))


def search(value: object, kind: str, most: int) -> tuple[list[torch.Tensor], bool]:
    """Returns the tensors on devices of this kind among the first ``most`` parts of ``value``.

    And whether these were all parts.
    """
    if type(value) is torch.Tensor:
        return [value] if kind_of(value.device) == kind else [], True
    found: list[torch.Tensor] = []
    for thing, parts in _walk(value, most):
        if _is(thing, torch.Tensor) and kind_of(device_of(thing)) == kind:
            found.append(thing)
        most -= len(parts)
    return found, most > 0


def device_of(tensor: torch.Tensor) -> torch.device:
    """Returns the device of ``tensor``; the host if the tensor does not tell."""
    if type(tensor) is torch.Tensor:
        return tensor.device
    try:
        with no_torch_function():
            return tensor.device
    except Exception:
        return torch.device("cpu")


def devices_of(found: Iterable[torch.Tensor]) -> set[torch.device]:
    """Returns the devices of tensors, but for the host."""
    return {device for tensor in found if kind_of(device := device_of(tensor)) != "cpu"}


def _is(thing: object, kind: type | tuple[type, ...]) -> bool:
    """As ``isinstance``, but does not ask the thing itself, which may be a proxy."""
    return issubclass(type(thing), kind)


def keep_memory(found: Iterable[torch.Tensor], streams: dict[torch.device, torch.Stream]) -> None:
    """Keep the memory of tensors, should these go, until the current streams are done with it.

    ``streams`` has those of the current streams that are known.
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


def _walk(value: object, most: int | None = None) -> Iterator[tuple[Any, list[Any]]]:
    """Yields all that ``value`` leads to, once each, and what each directly holds.

    What is nested least comes first, and it ends with the first ``most`` parts.
    """
    seen: dict[int, object] = {}  # kept, so that no id is used again meanwhile
    found = deque([value])
    while found:
        thing = found.popleft()
        if type(thing) in HOST_ONLY or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        parts = [] if _is(thing, torch.Tensor) else _parts(thing, most)
        if most is not None:
            most -= len(parts)
        yield thing, parts
        found.extend(parts)


def _parts(thing: Any, most: int | None) -> list[Any]:
    parts: list[Any] = []
    if most == 0:
        return parts
    # What cannot be read, such as a mapping whose file is closed, holds nothing.
    with suppress(Exception):
        parts += islice(_items(thing), most)
    with suppress(Exception):
        left = None if most is None else most - len(parts)
        parts += islice((part for _, part in _attributes(thing)), left)
    return parts


def _items(thing: Any) -> Iterator[Any]:
    if _is(thing, Mapping):
        return iter(thing.values())
    if _is(thing, (list, tuple, set, frozenset, deque)):
        return iter(thing)
    node = pytree_node(type(thing))
    return iter(() if node is None else node.flatten_fn(thing)[0])


def _attributes(thing: object) -> Iterator[tuple[str, object]]:
    if type(thing) in _BARE or _is(thing, _OPAQUE):
        return
    with suppress(AttributeError):
        yield from list(object.__getattribute__(thing, "__dict__").items())
    for kind in type(thing).__mro__:
        for name, slot in list(vars(kind).items()):
            if type(slot) is types.MemberDescriptorType and name != "__dict__":
                with suppress(AttributeError):  # not set
                    yield name, slot.__get__(thing)


def replaced(value: Any, substitutes: Mapping[int, torch.Tensor]) -> Any:
    """Returns ``value`` with tensors replaced, by id.

    What holds none of these tensors is kept as it is; what does is copied, shallowly, once
    each, so that what was shared still is.
    """
    return _Copies(_holders(value, substitutes), substitutes).of(value)


class _Copies:
    """Copies of what holds tensors, by id, and of the tensors themselves."""

    def __init__(self, holders: dict[int, Any], substitutes: Mapping[int, torch.Tensor]) -> None:
        self._holders = holders
        self._copies: dict[int, Any] = dict(substitutes)
        # All are there before they are filled, as what they hold may lead back; but for those
        # that are made of what they hold.
        for key, thing in holders.items():
            if _maker(thing) is None:
                self._copies[key] = copy.copy(thing)
                if self._copies[key] is thing:
                    name = described(thing)
                    raise TypeError(f"{name} holds a tensor, and copies of it are itself")
        for thing in holders.values():
            _fill(self.of(thing), thing, self.of)

    def of(self, thing: Any) -> Any:
        """Return the copy of ``thing``, or itself if it holds none of the tensors."""
        if id(thing) in self._holders and id(thing) not in self._copies:
            make = _maker(thing)
            assert make is not None
            self._copies.setdefault(id(thing), make([self.of(part) for part in _items(thing)]))
        return self._copies.get(id(thing), thing)


def _maker(thing: Any) -> Callable[[list[Any]], Any] | None:
    """Return what makes a thing like this of the parts of it, or None if a copy is to be filled."""
    if _is(thing, (tuple, frozenset)):
        make: Callable[[list[Any]], Any] = getattr(type(thing), "_make", type(thing))
        return make
    node = None if _is(thing, _FILLED) else pytree_node(type(thing))
    if node is None:
        return None
    unflatten, context = node.unflatten_fn, node.flatten_fn(thing)[1]
    return lambda parts: unflatten(parts, context)


def _holders(value: object, tensor_ids: Mapping[int, object]) -> dict[int, Any]:
    """Returns all things that lead to one of the tensors, by id."""
    seen: dict[int, object] = {}
    parents: defaultdict[int, list[int]] = defaultdict(list)
    for thing, parts in _walk(value):
        seen[id(thing)] = thing
        for part in parts:
            parents[id(part)].append(id(thing))
    holders: dict[int, Any] = {}
    upward = list(tensor_ids)
    while upward:
        for parent in parents[upward.pop()]:
            if parent not in holders:
                holders[parent] = seen[parent]
                upward.append(parent)
    return holders


def _fill(copy_of: Any, thing: Any, new: Callable[[Any], Any]) -> None:
    """Puts ``new(part)`` in the place of each part of ``thing``, in a shallow copy of it."""
    if _is(thing, Mapping):
        for key, part in thing.items():
            copy_of[key] = new(part)
    elif _is(thing, (list, deque, set)):
        parts = [new(part) for part in thing]
        copy_of.clear()
        (copy_of.update if _is(thing, set) else copy_of.extend)(parts)
    for name, part in list(_attributes(thing)):
        fresh = new(part)
        if fresh is part or getattr(copy_of, name, None) is fresh:
            continue
        try:
            object.__setattr__(copy_of, name, fresh)
        except AttributeError:
            raise TypeError(
                f"{name!r} of {described(thing)} holds a tensor, and cannot be set"
            ) from None

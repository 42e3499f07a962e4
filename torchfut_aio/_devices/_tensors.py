"""Tensors in values: in containers, dataclasses and objects, however nested.

A value may be any object, and what it says of itself may raise: a proxy has a ``__class__`` of
its own, an object a ``__getattribute__``, a tensor a ``__torch_function__``. So its true type
decides where that will do; where the value's own code has to run and raises, nothing is found.
"""

from __future__ import annotations

import copy
import types
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

from .._pytorch import CppFuture, no_torch_function
from .._repr import described

# Types whose instances hold no tensor: most results, told by a glance.
HOST_ONLY = frozenset({type(None), bool, int, float, complex, str, bytes})

# What leads to tensors that are no part of the value.
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_OPAQUE = (CppFuture, type, types.ModuleType, *_FUNCTIONS)


def tensors(value: object) -> Iterator[torch.Tensor]:
    """Yields the tensors in ``value``, once each."""
    return (thing for thing, _ in _walk(value) if _is(thing, torch.Tensor))


def device_of(tensor: torch.Tensor) -> torch.device:
    """Returns the device of ``tensor``; the host if the tensor does not tell."""
    if type(tensor) is torch.Tensor:
        return tensor.device
    try:
        with no_torch_function():
            return tensor.device
    except Exception:
        return torch.device("cpu")


def _is(thing: object, kind: type | tuple[type, ...]) -> bool:
    """As ``isinstance``, but does not ask the thing itself, which may be a proxy."""
    return issubclass(type(thing), kind)


def _walk(value: object) -> Iterator[tuple[Any, list[Any]]]:
    """Yields all that ``value`` leads to, once each, and what each directly holds."""
    seen: dict[int, object] = {}  # kept, so that no id is used again meanwhile
    found = [value]
    while found:
        thing = found.pop()
        if type(thing) in HOST_ONLY or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        parts = [] if _is(thing, torch.Tensor) else _parts(thing)
        yield thing, parts
        found.extend(parts)


def _parts(thing: Any) -> list[Any]:
    parts: list[Any] = []
    # What cannot be read, such as a mapping whose file is closed, holds nothing.
    with suppress(Exception):
        if _is(thing, Mapping):
            parts += [*thing.values()]
        elif _is(thing, (list, tuple, set, frozenset, deque)):
            parts += [*thing]
    with suppress(Exception):
        parts += [part for _, part in _attributes(thing)]
    return parts


def _attributes(thing: object) -> Iterator[tuple[str, object]]:
    if _is(thing, _OPAQUE):
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
    holders = _holders(value, substitutes)
    copies: dict[int, Any] = dict(substitutes)
    # All but tuples are there before they are filled, as what they hold may lead back.
    for key, thing in holders.items():
        if not _is(thing, (tuple, frozenset)):
            copies[key] = copy.copy(thing)
            if copies[key] is thing:
                name = described(thing)
                raise TypeError(f"{name} holds a tensor, and copies of it are itself")

    def new(thing: Any) -> Any:
        if id(thing) in holders and id(thing) not in copies:
            parts = [new(part) for part in thing]
            make = getattr(type(thing), "_make", type(thing))  # of a named tuple
            copies.setdefault(id(thing), make(parts))
        return copies.get(id(thing), thing)

    for thing in holders.values():
        _fill(new(thing), thing, new)
    return new(value)


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

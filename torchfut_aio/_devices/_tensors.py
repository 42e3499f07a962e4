"""Tensors in values: in containers, dataclasses and objects, however nested."""

from __future__ import annotations

import copy
import types
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

__all__ = ["HOST_ONLY", "replaced", "tensors"]

# Types whose instances hold no tensor: most results, told by a glance.
HOST_ONLY = frozenset({type(None), bool, int, float, complex, str, bytes})

# What offers a way to tensors, and does not contain them; and what only code refers to.
_OPAQUE = (
    torch._C.Future,
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
)


def tensors(value: object) -> Iterator[torch.Tensor]:
    """Yields the tensors in ``value``, once each."""
    return (thing for thing, _ in _walk(value) if isinstance(thing, torch.Tensor))


def _walk(value: object) -> Iterator[tuple[Any, list[Any]]]:
    """Yields all that ``value`` leads to, once each, and what each directly holds."""
    seen: dict[int, object] = {}  # kept, so that no id is used again meanwhile
    found = [value]
    while found:
        thing = found.pop()
        if type(thing) in HOST_ONLY or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        parts = [] if isinstance(thing, torch.Tensor) else _parts(thing)
        yield thing, parts
        found.extend(parts)


def _parts(thing: object) -> list[Any]:
    try:
        return [*_items(thing), *(part for _, part in _attributes(thing))]
    except Exception:
        return []  # what cannot be read, such as a proxy for nothing, holds nothing


def _items(thing: object) -> list[Any]:
    if isinstance(thing, Mapping):
        return list(thing.values())
    if isinstance(thing, (list, tuple, set, frozenset, deque)):
        return list(thing)
    return []


def _attributes(thing: object) -> Iterator[tuple[str, object]]:
    if isinstance(thing, _OPAQUE):
        return
    yield from list(getattr(thing, "__dict__", {}).items())
    for kind in type(thing).__mro__:
        for name, slot in list(vars(kind).items()):
            if isinstance(slot, types.MemberDescriptorType) and name != "__dict__":
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
        if not isinstance(thing, (tuple, frozenset)):
            copies[key] = _copy(thing)

    def new(thing: Any) -> Any:
        if id(thing) in holders and id(thing) not in copies:
            parts = [new(part) for part in thing]
            make = getattr(type(thing), "_make", type(thing))  # of a named tuple
            copies.setdefault(id(thing), make(parts))
        return copies.get(id(thing), thing)

    for key, thing in holders.items():
        _fill(new(thing) if key not in copies else copies[key], thing, new)
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


def _copy(thing: Any) -> Any:
    copy_of = copy.copy(thing)
    if copy_of is thing:
        raise TypeError(f"{thing!r} holds a tensor to be replaced, and copies of it are itself")
    return copy_of


def _fill(copy_of: Any, thing: Any, new: Callable[[Any], Any]) -> None:
    """Puts ``new(part)`` in the place of each part of ``thing``, in a shallow copy of it."""
    if isinstance(thing, Mapping):
        for key, part in thing.items():
            copy_of[key] = new(part)
    elif isinstance(thing, list):
        copy_of[:] = [new(part) for part in thing]
    elif isinstance(thing, deque):
        copy_of.clear()
        copy_of.extend([new(part) for part in thing])
    elif isinstance(thing, set):
        copy_of.clear()
        copy_of.update([new(part) for part in thing])
    for name, part in list(_attributes(thing)):
        fresh = new(part)
        if fresh is part or getattr(copy_of, name, None) is fresh:
            continue
        try:
            object.__setattr__(copy_of, name, fresh)
        except AttributeError:
            raise TypeError(
                f"{name!r} of {type(thing).__qualname__} holds a tensor, and cannot be set"
            ) from None

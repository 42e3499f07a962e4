"""How this package shows what its users passed: never by a ``repr`` or ``str`` of theirs.

These may wait for a kernel or for another process, raise, or be as long as the data. So values of
Python's own types are cut to a line, and all others are told by their type.
"""

from __future__ import annotations

import functools
import itertools
import reprlib
from typing import Any

import torch

from ._pytorch import no_torch_function

_LONGEST, _MOST, _DEEPEST = 80, 6, 4
_LONGEST_LINE = 500  # those in containers, in containers, may be many

# A class may define these attributes as it likes.
_args: Any = vars(BaseException)["args"]

_cut = reprlib.Repr()
_cut.maxstring = _LONGEST

_BRACKETS: dict[type[Any], tuple[str, str]] = {
    dict: ("{", "}"),
    frozenset: ("frozenset([", "])"),
    list: ("[", "]"),
    set: ("set([", "])"),
    tuple: ("(", ")"),
}


def short(value: Any) -> str:
    """Returns a line that shows ``value``; of tensors no numbers, as kernels may compute them."""
    text = _short(value, 0)
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}..."


def _short(value: Any, depth: int) -> str:
    kind = type(value)
    if kind in (type(None), bool, float, complex):
        return repr(value)
    if kind is int:
        return repr(value) if value.bit_length() < 4 * _LONGEST else "<int of many digits>"
    if kind in (str, bytes):
        return _cut.repr_str(value, 0)
    if issubclass(kind, torch.Tensor):
        return _tensor(value)
    if issubclass(kind, BaseException):
        return f"{kind.__qualname__}({_items(_args.__get__(value), depth)})"
    if kind in _BRACKETS:
        before, after = _BRACKETS[kind]
        comma = "," if kind is tuple and len(value) == 1 else ""
        return f"{before}{_items(value, depth)}{comma}{after}"
    return f"<{type_name(value)} object>"


def type_name(thing: object) -> str:
    """Returns the full name of the type of ``thing``, as messages tell of it."""
    kind = type(thing)
    module = kind.__module__
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


def described(thing: object) -> str:
    """Returns the name of the type of ``thing``, with an article: what was passed by mistake."""
    name = type_name(thing)
    return f"an {name}" if name[0] in "aeioAEIO" else f"a {name}"


def function_name(function: Any) -> str:
    """Returns the name of a function, or of anything that can be called."""
    while issubclass(type(function), functools.partial):  # its repr has that of the arguments
        function = function.func
    try:
        module, name = function.__module__, function.__qualname__
    except Exception:
        return type_name(function)
    return f"{module}.{name}" if type(module) is type(name) is str else type_name(function)


def _items(values: Any, depth: int) -> str:
    if depth >= _DEEPEST:
        return "..."
    items = values.items() if type(values) is dict else values
    try:
        first = [*itertools.islice(items, _MOST)]
    except RecursionError:
        raise
    except RuntimeError:  # another thread changes it
        return "..."
    shown = [_item(values, item, depth + 1) for item in first]
    return ", ".join([*shown, "..."] if len(values) > _MOST else shown)


def _item(values: Any, item: Any, depth: int) -> str:
    if type(values) is dict:
        return f"{_short(item[0], depth)}: {_short(item[1], depth)}"
    return _short(item, depth)


def _tensor(tensor: Any) -> str:
    try:
        with no_torch_function():
            return f"<tensor {tuple(tensor.shape)} {tensor.dtype} {tensor.device}>"
    except Exception:
        return type_name(tensor)

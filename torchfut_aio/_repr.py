"""How messages show values of users without calling their ``repr`` or ``str``.

Those may wait for a kernel or for another process, raise, or be as long as the data. So values of
Python's types are cut to a line, and all others are shown by their type.
"""

from __future__ import annotations

import functools
import reprlib
from itertools import islice
from typing import Any, NamedTuple

import torch

from ._pytorch import no_torch_function

_LONGEST_LINE = 500  # characters: nested containers may show many values

# Read by this, as the class of an exception may override `args`.
_args: Any = vars(BaseException)["args"]


class _Item(NamedTuple):
    key: Any
    value: Any


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring = 4, 80

    def repr1(self, x: Any, level: int) -> str:
        # reprlib selects by the name of the type, which a class of a user may share. It also sorts
        # the keys of dicts and sets, which runs their comparisons.
        kind = type(x)
        if kind in (bool, float, complex, type(None)):
            return repr(x)
        if kind is int:
            return repr(x) if x.bit_length() < 320 else "<int of many digits>"
        if kind in (str, bytes):
            return self.repr_str(x, level)
        if kind in (list, tuple):
            return super().repr1(x, level)
        if kind in (set, frozenset):
            return f"{kind.__name__}({self.repr_list(self._first(x), level)})"
        if kind is dict:
            items = map(_Item._make, self._first(x.items()))
            return f"{{{self.repr_list([*items], level)[1:-1]}}}"
        if kind is _Item:
            return f"{self.repr1(x.key, level)}: {self.repr1(x.value, level)}"
        if issubclass(kind, torch.Tensor):
            return _tensor(x)
        if issubclass(kind, BaseException):
            return f"{kind.__qualname__}({self.repr_list([*_args.__get__(x)], level)[1:-1]})"
        return f"<{type_name(x)} object>"

    def _first(self, things: Any) -> list[Any]:
        return [*islice(things, self.maxlist + 1)]  # one too many, so that "..." is shown


_short = _Short()


def short(value: Any) -> str:
    """Return a line that shows ``value``, without numbers of tensors, whose reading may block."""
    try:
        text = _short.repr(value)
    except RecursionError:
        raise
    except RuntimeError:  # another thread changes a container
        text = f"<{type_name(value)} object>"
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}..."


def type_name(thing: object) -> str:
    """Return the full name of the type of ``thing``, for messages."""
    kind = type(thing)
    module = kind.__module__
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


def described(thing: object) -> str:
    """Return the name of the type of ``thing``, with an article."""
    name = type_name(thing)
    return f"an {name}" if name[0] in "aeioAEIO" else f"a {name}"


def function_name(function: Any) -> str:
    while issubclass(type(function), functools.partial):
        function = function.func
    try:
        module, name = function.__module__, function.__qualname__
    except Exception:
        return type_name(function)
    return f"{module}.{name}" if type(module) is type(name) is str else type_name(function)


def _tensor(tensor: Any) -> str:
    try:
        with no_torch_function():
            return f"<tensor {tuple(tensor.shape)} {tensor.dtype} {tensor.device}>"
    except Exception:
        return type_name(tensor)

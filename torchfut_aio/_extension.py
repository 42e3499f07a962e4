"""The hot paths in C.

A function that is decorated with `speedup` is its own specification. If the extension was built,
``_speedups.c`` does the same for the common case, and calls the function for everything else. The
extension is built for CPython 3.11 to 3.14 with a GIL, on POSIX. ``TORCHFUT_AIO_NO_EXTENSIONS=1``
in the environment turns it off, when the package is built and when it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def _load() -> Any:
    if os.environ.get("TORCHFUT_AIO_NO_EXTENSIONS"):
        return None
    try:
        return import_module("._speedups", __package__)
    except ImportError:  # it was not built for this Python
        return None


_speedups = _load()


def speedup(function: F) -> F:
    """Let C run the common case of a function, once `install` was called."""
    return function if _speedups is None else _speedups.Speedup(function)


def install() -> None:
    """Let the extension look up what it uses of the package, and begin."""
    if _speedups is not None:
        with suppress(AttributeError, TypeError):  # on a Python that lacks what it uses
            _speedups.install()


def use_extension(use: bool) -> bool:
    """Use the extension or not, for tests; return whether it was in use."""
    return _speedups is not None and bool(_speedups.use(use))


def uses_extension() -> bool:
    """Return True if the hot paths run in C.

    They run in Python if the extension was not built, if the environment variable
    ``TORCHFUT_AIO_NO_EXTENSIONS`` was set when the package was imported, without a GIL, and if a
    private name of CPython that the extension uses is missing.
    """
    return _speedups is not None and bool(_speedups.in_use())

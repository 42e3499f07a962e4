"""The names that users import are called what users import, and not after private modules."""

from __future__ import annotations

import sys


def publish(module: str) -> None:
    """Set the module of all that ``module`` exports: tracebacks, reprs and pickles have it.

    A pickle finds a class by that name, also in the next version, where it may be defined
    elsewhere.
    """
    names = vars(sys.modules[module])
    for name in names["__all__"]:
        names[name].__module__ = module

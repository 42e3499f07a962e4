"""The names that users import are called what users import, and not after private modules."""

from __future__ import annotations

import dataclasses
import sys
import typing


def publish(module: str) -> None:
    """Set the module of all that ``module`` exports: tracebacks, reprs and pickles have it.

    A pickle finds a class by that name, also in the next version, where it may be defined
    elsewhere. (``inspect.getsource`` finds the methods of such a class, and not the class.)
    """
    names = vars(sys.modules[module])
    for name in names["__all__"]:
        thing = names[name]
        if dataclasses.is_dataclass(thing):
            # Later, they would be looked up in ``module``, which lacks some.
            thing.__annotations__ = typing.get_type_hints(thing)
        thing.__module__ = module

"""Public names have the module that users import them from, not the private one."""

from __future__ import annotations

import dataclasses
import sys
import typing


def publish(module: str) -> None:
    """Set the ``__module__`` of everything that ``module`` exports.

    Tracebacks, reprs and pickles show it. So a pickle finds the class also in a later version,
    which may define it elsewhere. (``inspect.getsource`` finds the methods of such a class, but not
    the class.)
    """
    names = vars(sys.modules[module])
    for name in names["__all__"]:
        thing = names[name]
        if dataclasses.is_dataclass(thing):
            # *Before* the change: names in the annotations are resolved in `__module__`, and
            # ``module`` lacks some of them.
            thing.__annotations__ = typing.get_type_hints(thing)
        thing.__module__ = module

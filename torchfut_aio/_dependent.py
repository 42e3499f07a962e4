"""Futures that only one thing can complete: a source that was adopted, or another event loop."""

from __future__ import annotations

import weakref
from collections.abc import Generator
from typing import Any, Protocol, TypeVar

from ._arguments import Devices
from ._future import Future

T = TypeVar("T")


class _Checks(Protocol):
    def check(self) -> None:
        """Raise if waiting would not end; recover if what was to complete the future is done."""


class DependentFuture(Future[T]):
    """A future that checks, before a wait for it begins, that it can be completed."""

    __qualname__ = "Future"  # in its repr, as the class is internal
    __slots__ = ("_depends_on",)

    def __init__(self, *, devices: Devices = None) -> None:
        super().__init__(devices=devices)
        self._depends_on: weakref.ref[_Checks] | None = None

    def depend_on(self, thing: _Checks) -> None:
        """Ask ``thing`` before each wait; weakly, as it is what holds the future."""
        self._depends_on = weakref.ref(thing)

    def __await__(self, ready: bool = True) -> Generator[Any, Any, T]:
        self.check()
        return super().__await__(ready)

    def wait(self, timeout: float | None = None) -> T:
        self.check()
        return super().wait(timeout)

    def check(self) -> None:
        """Check that the future is done, or can be completed while this thread waits."""
        if self._depends_on is not None and not self.done():
            thing = self._depends_on()
            if thing is not None:
                thing.check()

"""Futures that only one thing can complete: a source that was adopted, or another event loop."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Generator
from typing import Any, Protocol, TypeVar

from ._arguments import Devices
from ._core import devices_of
from ._future import Future, chain

T = TypeVar("T")
S = TypeVar("S")


class _Checks(Protocol):
    def check(self, blocks: bool = False) -> None:
        """Raise if waiting would not end; recover if what was to complete the future is done.

        If ``blocks``, the wait is one of the calling thread, without a limit.
        """


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

    def __await__(self, _ready: bool = True) -> Generator[Any, Any, T]:
        self.check()
        return super().__await__(_ready)

    def wait(self, timeout: float | None = None) -> T:
        self.check(blocks=timeout is None)
        return super().wait(timeout)

    def as_asyncio(self) -> asyncio.Future[T]:
        self.check()
        return super().as_asyncio()

    def then(self, callback: Callable[[Future[T]], S]) -> Future[S]:
        child: DependentFuture[S] = DependentFuture(devices=devices_of(self))
        child._depends_on = self._depends_on
        return chain(self, callback, child)

    def check(self, blocks: bool = False) -> None:
        """Check that the future is done, or can be completed while this thread waits."""
        if self._depends_on is not None and not self.done():
            thing = self._depends_on()
            if thing is not None:
                thing.check(blocks)

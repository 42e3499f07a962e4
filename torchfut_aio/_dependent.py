"""Futures that depend on an adopted source or on another event loop to complete them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from ._core import devices_of
from ._future import Future, chain

T = TypeVar("T")
S = TypeVar("S")


class _Checks(Protocol):
    def check(self, blocks: bool = False) -> None:
        """Raise if a wait would never end.

        If ``blocks``, the calling thread is about to block without a timeout.
        """


class DependentFuture(Future[T]):
    """A future that checks, before a wait for it begins, that it can be completed."""

    __qualname__ = "Future"  # in its repr, as the class is internal
    __slots__ = ("_depends_on",)
    _is_dependent = True

    _depends_on: weakref.ref[_Checks]

    def depend_on(self, thing: _Checks) -> None:
        """Call ``thing.check()`` before each wait."""
        # Weakly: the thing refers to the future, so the two would be a cycle.
        self._depends_on = weakref.ref(thing)

    def check(self, blocks: bool = False) -> None:
        """Raise if the future is pending and nothing can complete it while this thread waits."""
        thing = self._depends_on()
        if thing is not None and not self.done():
            thing.check(blocks)

    def then(self, callback: Callable[[Future[T]], S]) -> Future[S]:
        return chain(self, callback, dependent(self, devices_of(self)))


def dependent(thing: _Checks, devices: Sequence[torch.device] = ()) -> DependentFuture[Any]:
    future: DependentFuture[Any] = DependentFuture(devices=devices)
    future.depend_on(thing)
    return future

"""asyncio's futures and tasks, of any loop.

Only the thread of its loop may touch a pending one. It never completes once its loop has closed,
nor if nobody refers to it any more: either fails the future that adopted it. And a loop that does
not run cannot start while this thread runs another, so whoever would wait for it here is told.
"""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections.abc import Generator
from threading import get_ident
from typing import Any, TypeVar

from .. import _loops
from .._cpython import running_loop, thread_of
from .._future import Future
from .._worker import call_contained
from ._registry import Adoption, Devices, adopts, once

T = TypeVar("T")

_SECONDS = 20 * 86400.0  # which any loop's timers can count
_ENDED = "its event loop ended"


@adopts("asyncio.Future", "asyncio.Task")
def _from_asyncio(source: asyncio.Future[Any], *, devices: Devices = None) -> Future[Any]:
    if not source.done():
        _check_that_it_can_run(source.get_loop())
    return _adopt_once(source, devices=devices)


class FutureOfLoop(Future[T]):
    """A future that a certain event loop has to complete."""

    __slots__ = ("source_loop",)

    def __init__(self, *, devices: Devices = None) -> None:
        super().__init__(devices=devices)
        # A future that is kept does not keep the loop, which may go without having been closed.
        self.source_loop: weakref.ref[asyncio.AbstractEventLoop] | None = None

    def __await__(self, ready: bool = True) -> Generator[Any, Any, T]:
        self.check_that_it_can_complete()
        return super().__await__(ready)

    def check_that_it_can_complete(self) -> None:
        """Raises RuntimeError if it is pending, and its loop cannot run while this thread waits."""
        loop = None if self.source_loop is None else self.source_loop()
        if loop is not None and not self.done():
            _check_that_it_can_run(loop)


def _adopt(source: asyncio.Future[Any], future: Future[Any]) -> None:
    assert isinstance(future, FutureOfLoop)
    adoption, loop = _Adoption(future, source), source.get_loop()
    if source.done():
        adoption(source)
        return
    future.source_loop = weakref.ref(loop)
    if running_loop() is loop:
        _follow(source, adoption)
        return
    try:
        call = loop.call_soon_threadsafe(_follow, source, adoption)
        if loop.is_closed():  # perhaps within this, and then it may keep the call for ever
            call.cancel()
            adoption.end(_ENDED)
    except RuntimeError as error:
        if not loop.is_closed():
            raise
        if not source.done():
            raise RuntimeError(
                "the asyncio future is pending on a loop that has closed: it will never complete"
            ) from error
        adoption(source)


class _Adoption(Adoption):
    """Has what it adopts, to look at when the loop ends: that may not have told what was done.

    The two are a cycle while the source is pending.
    """

    __slots__ = ("_source",)

    def __init__(self, future: Future[Any], source: asyncio.Future[Any]) -> None:
        super().__init__(future)
        self._source: asyncio.Future[Any] | None = source

    def __call__(self, source: Any) -> None:
        self._source = None
        super().__call__(source)

    def end(self, why: str) -> None:
        source = getattr(self, "_source", None)
        if source is not None and source.done():
            self(source)
        else:
            self._source = None
            super().end(why)


_adopt_once = once(_adopt, FutureOfLoop)


def _follow(source: asyncio.Future[Any], adoption: Adoption) -> None:
    """Has ``source`` complete the future; called on its loop."""
    _LoopEnd.of(source.get_loop()).adoptions.add(adoption)
    source.add_done_callback(adoption)


def _check_that_it_can_run(loop: asyncio.AbstractEventLoop) -> None:
    running = running_loop()
    if running is loop:
        return
    if loop.is_running():
        stands_still = thread_of(loop) == get_ident()
    else:
        stands_still = not loop.is_closed() and _loops.loop_in_this_thread()
    if stands_still:
        raise RuntimeError(
            "the asyncio future is attached to a different loop, which cannot complete it while "
            "this thread runs another: await it on its own loop, or run that in a thread of its own"
        )


class _LoopEnd:
    """Fails what was adopted of a loop when that closes.

    A timer of the loop keeps it, which the loop drops when it closes.
    """

    __slots__ = ("__weakref__", "adoptions")

    def __init__(self) -> None:
        self.adoptions: weakref.WeakSet[Adoption] = weakref.WeakSet()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _LoopEnd:
        """Returns that of ``loop``, which runs in this thread."""
        ref = _ends.get(loop)
        end = None if ref is None else ref()
        if end is None:
            end = cls()
            end.set_timer(loop)
            _ends[loop] = weakref.ref(end)
        return end

    def set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        """Has ``loop`` refer to this."""
        loop.call_later(_SECONDS, self.set_timer, loop, context=contextvars.Context())

    def reach(self) -> None:
        """Fails all that is pending."""
        for adoption in [*getattr(self, "adoptions", ())]:  # none if its maker was interrupted
            call_contained(adoption.end, _ENDED)

    __del__ = reach


_ends: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[_LoopEnd]] = (
    weakref.WeakKeyDictionary()
)

"""asyncio's futures and tasks, of any loop.

Only the thread of its loop may touch a pending one. It never completes once its loop has closed,
nor if nobody refers to it any more: either fails the future that adopted it. And a loop that does
not run cannot start while this thread runs another, so whoever would wait for it here is told.
"""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from typing import Any

from .. import _loops
from .._arguments import Devices
from .._cpython import running_loop
from .._dependent import DependentFuture
from .._future import Future
from .._worker import call_contained
from ._registry import Adoption, adopts, once

_SECONDS = 20 * 86400.0  # which any loop's timers can count


@adopts("asyncio.Future", "asyncio.Task")
def _from_asyncio(source: asyncio.Future[Any], *, devices: Devices = None) -> Future[Any]:
    if not source.done():
        _check_that_it_can_run(source.get_loop())
    return _adopt_once(source, devices=devices)


@once
def _adopt_once(source: asyncio.Future[Any], future: DependentFuture[Any]) -> None:
    adoption, loop = _Adoption(source, future), source.get_loop()
    if source.done():
        adoption.adopt(source)
        return
    if running_loop() is loop:
        _follow(source, adoption)
        return
    try:
        call = loop.call_soon_threadsafe(_follow, source, adoption)
        if loop.is_closed():  # perhaps within this, and then it may keep the call for ever
            call.cancel()
            adoption.end_with_loop()
    except RuntimeError as error:
        if not loop.is_closed():
            raise
        if not source.done():
            raise RuntimeError(
                "the asyncio future is pending on a loop that has closed: it will never complete"
            ) from error
        adoption.adopt(source)


class _Adoption(Adoption):
    """The promise of a future that adopted one of asyncio.

    It keeps the source while that is pending: a loop may end before it has delivered an outcome.
    """

    __slots__ = ("_kept",)

    def __init__(self, source: asyncio.Future[Any], future: DependentFuture[Any]) -> None:
        super().__init__(source, future)
        self._kept: asyncio.Future[Any] | None = source

    def adopt(self, source: asyncio.Future[Any]) -> None:
        self._kept = None
        super().adopt(source)

    def check(self, blocks: bool = False) -> None:  # noqa: ARG002
        source = self._source()
        if source is not None and not source.done():
            _check_that_it_can_run(source.get_loop())

    def cancel_at_end(self) -> None:
        source = self._kept
        if source is not None and source.done():
            self.adopt(source)
        else:
            super().cancel_at_end()

    def end_with_loop(self) -> None:
        """Complete the future, as the loop makes no more calls."""
        source, self._kept = self._kept, None
        if source is not None and source.done():
            self.adopt(source)
        else:
            self.fail_pending("its event loop ended")


def _follow(source: asyncio.Future[Any], adoption: _Adoption) -> None:
    """Let ``source`` complete the future; called on its loop."""
    _LoopEnd.of(source.get_loop()).adoptions.add(adoption)
    source.add_done_callback(adoption.callback())


def _check_that_it_can_run(loop: asyncio.AbstractEventLoop) -> None:
    if _loops.stands_still(loop):
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
        self.adoptions: weakref.WeakSet[_Adoption] = weakref.WeakSet()

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
            call_contained(adoption.end_with_loop)

    __del__ = reach


_ends: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[_LoopEnd]] = (
    weakref.WeakKeyDictionary()
)

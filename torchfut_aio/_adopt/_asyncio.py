"""asyncio's futures and tasks, of any loop.

Only the thread of its loop may touch a pending one. If its loop closes or nothing refers to it any
more, it never completes, and the future that adopted it fails. A loop that is not running cannot
start while this thread runs another one, so waiting for it here raises.
"""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections.abc import Generator
from functools import partial
from typing import Any, TypeVar

from .. import _loops
from .._cpython import running_loop
from .._threads import call_contained
from ._adopted import AdoptedFuture, once
from ._registry import adopts

T = TypeVar("T")
_Adoption = Generator[None, Any, None]

_SECONDS = 20 * 86400.0  # the timers of every loop can count as many


class _OfAsyncio(AdoptedFuture[T]):
    __qualname__ = "Future"
    __slots__ = ()

    def check(self, blocks: bool = False) -> None:  # noqa: ARG002
        source = self._source()
        if source is not None and not self.done() and not source.done():
            _check_that_it_can_run(source.get_loop())


@adopts("asyncio.Future", "asyncio.Task")
@partial(once, kind=_OfAsyncio)
def _from_asyncio(source: asyncio.Future[Any], future: _OfAsyncio[Any]) -> None:
    loop = source.get_loop()
    if not source.done():
        _check_that_it_can_run(loop)
    # Keep the source: the loop may close when the source is done and its callback was not called.
    adoption = future.until_done(kept=source)
    next(adoption)
    if source.done():
        adoption.send(source)
        return
    if running_loop() is loop:
        _follow(source, adoption)
        return
    try:
        call = loop.call_soon_threadsafe(_follow, source, adoption)
        # Check *after* the call: a loop that closes during it may keep the call for ever.
        if loop.is_closed():
            call.cancel()
            adoption.close()
    except RuntimeError as error:
        if not loop.is_closed():
            raise
        if not source.done():
            raise RuntimeError(
                "the asyncio future is pending on a loop that has closed: it will never complete"
            ) from error
        adoption.send(source)


def _follow(source: asyncio.Future[Any], adoption: _Adoption) -> None:
    """Let ``source`` complete the future; called on its loop."""
    _LoopEnd.of(source.get_loop()).adoptions.add(adoption)
    source.add_done_callback(adoption.send)


def _check_that_it_can_run(loop: asyncio.AbstractEventLoop) -> None:
    if _loops.stands_still(loop):
        raise RuntimeError(
            "the asyncio future is attached to a different loop, which cannot complete it while "
            "this thread runs another: await it on its own loop, or run that in a thread of its own"
        )


class _LoopEnd:
    """Ends the adoptions from a loop when that closes.

    Only a timer of the loop refers to it. A loop that closes drops its timers.
    """

    __slots__ = ("__weakref__", "adoptions")

    def __init__(self) -> None:
        self.adoptions: weakref.WeakSet[_Adoption] = weakref.WeakSet()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _LoopEnd:
        """Return the object for ``loop``, which runs in this thread."""
        ref = _ends.get(loop)
        end = None if ref is None else ref()
        if end is None:
            end = cls()
            end.set_timer(loop)
            _ends[loop] = weakref.ref(end)
        return end

    def set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_later(_SECONDS, self.set_timer, loop, context=contextvars.Context())

    def __del__(self) -> None:
        for adoption in [*getattr(self, "adoptions", ())]:  # none if __init__ was interrupted
            call_contained(adoption.close)


_ends: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[_LoopEnd]] = (
    weakref.WeakKeyDictionary()
)

"""Copies of a future for what insists on one of asyncio or of concurrent.futures.

A copy completes as its source does, once the kernels that fill the value have finished. Whoever
cancels it leaves the source as it was, and nothing behind with it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from . import _core, _loops
from ._cpython import what_shield_leaves
from ._errors import CANCELLATIONS

if TYPE_CHECKING:
    from ._future import Future

T = TypeVar("T")


def copy_to_asyncio(source: Future[T]) -> asyncio.Future[T]:
    """Returns a future of the running asyncio loop that completes as ``source`` does.

    Raises:
        RuntimeError: No asyncio loop runs in this thread.
    """
    loop = _loops.current_asyncio()
    if loop is None:
        raise RuntimeError(
            "as_asyncio() makes a future of the running asyncio loop, and none runs in "
            "this thread; await the future itself on trio, use wait() in a script"
        )
    target: _AsyncioCopy[T] = _AsyncioCopy()
    if _core.outcome_of(source) is None:
        waiter = loop.new_waiter()  # for the copy: this task does not wait
        if loop.wake_up is not None:
            loop.renew_wake_up()

        def withdraw(_: object) -> None:
            link.target = None
            _core.remove(source, waiter)

        target.link = link = _Link(target, withdraw)
        waiter.add_done_callback(lambda _: link.copy_from(source))
        asyncio.Future.add_done_callback(target, withdraw)
        _core.add_waiter(source, waiter, loop)
    copy_when_ready(source, target)
    return target


class _Link:
    """What the source has of its copy: all of it, or a weak reference while nobody waits for it.

    So a copy goes when whoever asked for it has lost interest, without a word: ``asyncio.shield``
    does not cancel what it shields.
    """

    __slots__ = ("_ref", "target")

    def __init__(self, target: _AsyncioCopy[Any], withdraw: Callable[[object], None]) -> None:
        self._ref = weakref.ref(target, withdraw)
        self.target: _AsyncioCopy[Any] | None = None

    def copy_from(self, source: Future[Any]) -> None:
        target = self._ref()
        if target is not None:
            copy_when_ready(source, target)


class _AsyncioCopy(asyncio.Future[T]):
    """A future of asyncio's that has its source keep it while somebody waits for it."""

    link: _Link | None = None
    _waiting = 0

    def add_done_callback(self, function: Any, /, **options: Any) -> None:
        super().add_done_callback(function, **options)
        if function is what_shield_leaves:
            return
        self._waiting += 1
        if self.link is not None:
            self.link.target = self

    def remove_done_callback(self, function: Any, /) -> int:
        removed = super().remove_done_callback(function)
        if function is not what_shield_leaves:
            self._waiting -= removed
        if self.link is not None and not self._waiting:
            self.link.target = None
        return removed


def copy_when_ready(source: Future[T], target: asyncio.Future[T]) -> None:
    """Completes ``target``, on its loop, once the value is ready or there is an error."""
    outcome = _core.outcome_of(source)
    if outcome is None or target.done():
        return
    if outcome.readiness is None or outcome.error is not None:
        _complete_asyncio(target, outcome, outcome.exception())
        return
    loop = _loops.current_asyncio()  # which may be the host of the trio that runs this task
    assert loop is not None
    notify = partial(_complete_asyncio, target, outcome)
    try:
        outcome.readiness.notify_when_ready(loop, notify, target.add_done_callback)
    except BaseException:
        target.cancel()  # which gives up the wait, if it has begun; nobody else would
        raise


def _complete_asyncio(
    target: asyncio.Future[T], outcome: _core.Outcome, error: BaseException | None
) -> None:
    if target.done():
        return
    if error is None:
        if outcome.readiness is not None:
            outcome.readiness.wait()
        target.set_result(outcome.value)
    elif issubclass(type(error), asyncio.CancelledError):
        target.cancel(*error.args[:1])
    elif issubclass(type(error), StopIteration):
        # asyncio cannot carry one; this is what a coroutine that raises it does.
        replacement = RuntimeError("the torchfut_aio future failed with StopIteration")
        replacement.__cause__ = error
        target.set_exception(replacement)
    else:
        own = error is outcome.error
        target.set_exception(error.with_traceback(outcome.traceback if own else None))


def copy_to_concurrent(source: Future[T]) -> concurrent.futures.Future[T]:
    """Returns a future of concurrent.futures that completes as ``source`` does."""
    target: concurrent.futures.Future[T] = concurrent.futures.Future()
    copy = _ConcurrentCopy(source, target)
    target.add_done_callback(copy.withdraw)
    _core.add_callback(source, copy)
    return target


class _ConcurrentCopy(_core.DoneCallback):
    """Completes a future of concurrent.futures, which others may cancel at any time.

    That keeps its callbacks for ever, so this lets go of both futures when it is done.
    """

    __slots__ = ("source", "target")

    uses_streams = False

    def __init__(self, source: Future[Any], target: concurrent.futures.Future[Any]) -> None:
        self.source: Future[Any] | None = source
        self.target: concurrent.futures.Future[Any] | None = target

    def run(self, source: Future[Any]) -> None:
        outcome = _core.outcome_of(source)
        assert outcome is not None
        if outcome.readiness is None or outcome.error is not None:
            self._complete(outcome, outcome.exception())
        else:
            # No thread can order the streams of those who read the value, so they read it later.
            outcome.readiness.notify_in_background(partial(self._complete, outcome))

    def fail(self, _source: Future[Any], error: BaseException) -> None:
        target = self.target
        if target is not None:
            with suppress(concurrent.futures.InvalidStateError):
                target.set_exception(error)

    def withdraw(self, target: concurrent.futures.Future[Any]) -> None:
        source, self.source, self.target = self.source, None, None
        if source is not None and target.cancelled():
            _core.remove(source, self)
            target.set_running_or_notify_cancel()  # wakes those in concurrent.futures.wait()

    def _complete(self, outcome: _core.Outcome, error: BaseException | None) -> None:
        target = self.target
        if target is None:
            return
        if issubclass(type(error), CANCELLATIONS) and target.cancel():
            return
        with suppress(concurrent.futures.InvalidStateError):  # it was cancelled just now
            if error is None:
                target.set_result(outcome.value)
            else:
                target.set_exception(error)

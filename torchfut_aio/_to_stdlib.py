"""Copies of a future for code that insists on one of asyncio or of concurrent.futures.

A copy completes as its source does, once the kernels that fill the value have finished. If the copy
is cancelled, the source stays as it is and no longer refers to the copy.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import weakref
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from . import _core, _loops
from ._cpython import what_shield_leaves
from ._errors import CANCELLATIONS

if TYPE_CHECKING:
    from ._future import Future

T = TypeVar("T")


def copy_to_asyncio(source: Future[T]) -> asyncio.Future[T]:
    """Return a future of the running asyncio loop that completes as ``source`` does.

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
    if _core.outcome_of(source) is not None or not _add_copy(source, target, loop):
        copy_when_ready(source, target)
    return target


def _add_copy(source: Future[T], target: _AsyncioCopy[T], loop: _loops.Loop) -> bool:
    """Complete ``target`` on its loop when ``source`` is done; return False if that is done."""
    waiter: Any = loop.new_waiter()  # for the copy: this task does not wait
    if loop.wake_up is not None:
        loop.renew_wake_up()
    kept = target.kept = []

    def withdraw(_: object) -> None:
        kept.clear()
        _core.remove(source, waiter)

    # Otherwise the source refers to the copy weakly. When `asyncio.shield` is cancelled, it does
    # not cancel the copy that it shields, but drops it: then this withdraws the copy.
    ref = weakref.ref(target, withdraw)

    def complete_now() -> None:
        target = ref()
        if target is not None:
            copy_when_ready(source, target)
        kept.clear()

    def complete(_: object) -> None:
        try:
            complete_now()
        except BaseException:  # interrupted: nothing else would complete the copy
            complete_now()
            raise

    waiter.add_done_callback(complete)
    # Of the base class, as the override would count this callback as one that waits.
    asyncio.Future.add_done_callback(target, withdraw)
    return _core.add_waiter(source, waiter, loop)


class _AsyncioCopy(asyncio.Future[T]):
    """A copy that its source keeps alive, through ``kept``, while something waits for the copy."""

    def __init__(self) -> None:
        super().__init__()
        # None if the source is done: it completes the copy without referring to it.
        self.kept: list[asyncio.Future[Any]] | None = None
        self._waiting = 0

    def add_done_callback(self, function: Any, /, **options: Any) -> None:
        super().add_done_callback(function, **options)
        self._count(function, 1)

    def remove_done_callback(self, function: Any, /) -> int:
        removed = super().remove_done_callback(function)
        self._count(function, -removed)
        return removed

    def _count(self, function: Any, more: int) -> None:
        if function is not what_shield_leaves and self.kept is not None:
            self._waiting += more
            self.kept[:] = [self] if self._waiting and not self.done() else []


def copy_when_ready(source: Future[T], target: asyncio.Future[T]) -> None:
    """Complete ``target``, on its loop, once the value is ready or there is an error."""
    outcome = _core.outcome_of(source)
    if outcome is None or target.done():
        return
    if outcome.readiness is None or outcome.error is not None:
        _complete_asyncio(target, outcome, outcome.exception())
        return
    loop = _loops.current_asyncio()  # in guest mode, the host of the trio run of this task
    assert loop is not None
    notify = partial(_complete_asyncio, target, outcome)
    try:
        target.add_done_callback(outcome.readiness.notify_when_ready(loop, notify))
    except BaseException:
        target.cancel()  # interrupted: nothing else would complete it
        raise


def _complete_asyncio(
    target: asyncio.Future[T], outcome: _core.Outcome, error: BaseException | None
) -> None:
    if target.done():
        return
    if error is None and outcome.readiness is not None:
        try:
            outcome.readiness.wait()
        except Exception as exception:
            error = exception
    if error is None:
        target.set_result(outcome.value)
    elif isinstance(error, asyncio.CancelledError):
        target.cancel(*error.args[:1])
    elif isinstance(error, StopIteration):
        # asyncio cannot carry one. A coroutine that raises one ends with a RuntimeError.
        replacement = RuntimeError("the torchfut_aio future failed with StopIteration")
        replacement.__cause__ = error
        target.set_exception(replacement)
    else:
        own = error is outcome.error
        target.set_exception(error.with_traceback(outcome.traceback if own else None))


def copy_to_concurrent(source: Future[T]) -> concurrent.futures.Future[T]:
    target: concurrent.futures.Future[T] = concurrent.futures.Future()
    copy = _ConcurrentCopy(source, target)
    target.add_done_callback(copy.withdraw)
    _core.add_callback(source, copy)
    return target


@dataclass(eq=False, slots=True)
class _ConcurrentCopy(_core.DoneCallback):
    """Completes a future of concurrent.futures, which may be cancelled at any time."""

    uses_streams = False

    source: Future[Any] | None
    target: concurrent.futures.Future[Any] | None

    def run(self, source: Future[Any]) -> None:
        outcome = _core.outcome_of(source)
        assert outcome is not None
        if outcome.readiness is None or outcome.error is not None:
            self._complete(outcome, outcome.exception())
        else:
            # Readers of the copy do not order their streams, so it completes after the kernels.
            outcome.readiness.notify_in_background(partial(self._complete, outcome))

    def fail(self, _source: Future[Any], error: BaseException) -> None:
        target = self.target
        if target is not None:
            with suppress(concurrent.futures.InvalidStateError):
                target.set_exception(error)

    def withdraw(self, target: concurrent.futures.Future[Any]) -> None:
        # A future that is done keeps its callbacks, including this one, so we drop both futures.
        source, self.source, self.target = self.source, None, None
        if source is not None and target.cancelled():
            _core.remove(source, self)
            target.set_running_or_notify_cancel()  # wakes threads in concurrent.futures.wait()

    def _complete(self, outcome: _core.Outcome, error: BaseException | None) -> None:
        target = self.target
        if target is None or (isinstance(error, CANCELLATIONS) and target.cancel()):
            return
        with suppress(concurrent.futures.InvalidStateError):  # another thread has just cancelled it
            if error is None:
                target.set_result(outcome.value)
            else:
                target.set_exception(error)

"""The pending futures, and the streams for which tasks or threads wait.

The garbage collector finds them. Futures, streams and loops know their waiters.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from time import perf_counter
from typing import Any

from .. import _core
from .._future import Future, InternalFuture
from .._loops import Waiter
from .._threads import workers
from ..serving._batch_worker import BatchWorker
from ..serving._stream import ValueStream, state_of
from ..serving._stream_state import StreamState
from ._recording import RecordedFunction


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)  # a future may define `==` as it likes
class PendingFuture:
    """A future that was pending, and its waiters.

    Attributes:
        future (torchfut_aio.Future): The future itself.
        waiters: The tasks and threads that waited, then the callbacks, both in order of arrival.
            Empty if nothing waited.
        where: ``queued in batcher NAME`` or ``running in batcher NAME`` for an item of a
            `torchfut_aio.Batcher`; else None.
    """

    future: Future[Any]
    waiters: tuple[Waiter, ...]
    where: str | None = None

    def __str__(self) -> str:
        now = perf_counter()
        where = [] if self.where is None else [self.where]
        return _indented([Future.__repr__(self.future), *where, *_lines(self.waiters, now)])


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)  # a future may define `==` as it likes
class PendingStream:
    """A stream for which tasks or threads waited.

    Attributes:
        stream: The stream itself. None if it has been garbage-collected and only its readers are
            left, so that nothing can be put any more.
        readers: The tasks and threads that waited for a value.
        writers: The tasks and threads that waited for room.
    """

    stream: ValueStream[Any] | None
    readers: tuple[Waiter, ...]
    writers: tuple[Waiter, ...]

    @property
    def waiters(self) -> tuple[Waiter, ...]:
        """The readers, then the writers."""
        return self.readers + self.writers

    def __str__(self) -> str:
        now, stream = perf_counter(), self.stream
        shown = "<ValueStream dropped by its producer>"
        if stream is not None:
            shown = ValueStream.__repr__(stream)
        readers = [f"{line}, reads" for line in _lines(self.readers, now)]
        writers = [f"{line}, writes" for line in _lines(self.writers, now)]
        return _indented([shown, *readers, *writers])


def pending_futures() -> list[PendingFuture | PendingStream]:
    """List every pending `torchfut_aio.Future` of the process, and what waits for each.

    For a program that hangs: call it in a signal handler, another thread or a debugger. It needs
    no preparation. A task that waits is listed with the function and line where it waits. A
    `torchfut_aio.ValueStream` is listed if a task or thread waits for it. Futures that only the
    package itself uses are not listed.

    The time when a wait began is known only if a `Recording` was on then.

    The search visits all objects that the garbage collector tracks. It takes some tens of
    milliseconds for every 100,000 of them, and nothing else in the process runs during that time.
    It misses futures that ``gc.freeze`` has hidden, and callbacks that PyTorch's C++ has added.

    Returns:
        The entries in the order in which their oldest wait began. If that is unknown, they are at
        the end.

    Example:
        >>> from torchfut_aio import Future, debug
        >>> fut = Future()
        >>> fut.add_done_callback(print)
        >>> for pending in debug.pending_futures():
        ...     if isinstance(pending, debug.PendingFuture) and pending.future is fut:
        ...         print(pending)
        <Future pending waiters=0 callbacks=1>
          callback builtins.print
    """
    kinds = {*_with_subclasses(Future), *_with_subclasses(ValueStream), StreamState}
    things = _instances_of(kinds - {InternalFuture})
    return sorted([*_futures(things), *_streams(things)], key=_oldest)


def _with_subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for each in type.__subclasses__(kind):
        yield from _with_subclasses(each)


def _instances_of(kinds: set[type[Any]]) -> list[Any]:
    # An object refers to its type. `gc.get_objects()` would add a reference to every object, and
    # before 3.14 CPython raises SystemError if a tuple gets one while another thread fills it, as
    # `tuple(generator)` does (CPython issue 127058).
    return [thing for thing in gc.get_referrers(*kinds) if type(thing) in kinds]


def _futures(things: list[Any]) -> list[PendingFuture]:
    where: dict[int, str] = {}  # by identity, as a class may define `==`
    for worker in workers():
        if isinstance(worker, BatchWorker):
            where |= {id(future): place for future, place in worker.queue.places().items()}
    return [
        PendingFuture(future=thing, waiters=_waiters_of(thing), where=where.get(id(thing)))
        for thing in things
        if isinstance(thing, Future) and _is_pending(thing)
    ]


def _is_pending(future: Future[Any]) -> bool:
    try:
        return not future.done()
    except AttributeError:  # another thread is still making it
        return False


def _waiters_of(future: Future[Any]) -> tuple[Waiter, ...]:
    tasks_and_threads = [waker.describe(waiter) for waiter, waker in _core.waiters_of(future)]
    callbacks = _core.callbacks_of(future)
    return (
        *tasks_and_threads,
        *(Waiter(kind="callback", name=each.name, since=_since(each)) for each in callbacks),
    )


def _since(callback: _core.DoneCallback) -> float | None:
    function = callback.function
    return function.since if isinstance(function, RecordedFunction) else None


def _streams(things: list[Any]) -> list[PendingStream]:
    streams: dict[StreamState, ValueStream[Any]] = {}
    for thing in things:
        if isinstance(thing, ValueStream):
            with suppress(AttributeError):  # another thread is still making it
                streams[state_of(thing)] = thing
    found = [
        PendingStream(
            stream=streams.get(thing),
            readers=tuple(thing.readers.describe()),
            writers=tuple(thing.writers.describe()),
        )
        for thing in things
        if isinstance(thing, StreamState) and _is_made(thing)
    ]
    return [pending for pending in found if pending.waiters]


def _is_made(state: StreamState) -> bool:
    return hasattr(state, "readers") and hasattr(state, "writers")


def _oldest(pending: PendingFuture | PendingStream) -> float:
    return min((each.since for each in pending.waiters if each.since is not None), default=inf)


def _indented(lines: list[str]) -> str:
    return "\n  ".join(lines)


def _lines(waiters: tuple[Waiter, ...], now: float) -> list[str]:
    return [
        f"{each}" if each.since is None else f"{each}, for {now - each.since:.3g} s"
        for each in waiters
    ]

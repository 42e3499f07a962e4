"""What is pending now: found by the garbage collector, and told by the futures themselves."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from math import inf
from time import perf_counter
from typing import Any

from .. import _core
from .._future import Future
from .._loops import Who


@dataclass(frozen=True)
class PendingFuture:
    """A future that was pending, and who waited for it then.

    Attributes:
        future: The future itself.
        who: The tasks and threads that waited, then the callbacks, each in the order in which they
            came. Empty if nobody waited.
    """

    future: Future[Any]
    who: tuple[Who, ...]

    def __str__(self) -> str:
        now = perf_counter()
        return "\n  ".join([Future.__repr__(self.future), *(_line(who, now) for who in self.who)])


def pending_futures() -> list[PendingFuture]:
    """Lists every pending `torchfut_aio.Future` of the process, and who waits for each.

    For a program that hangs: call it in a signal handler, another thread or a debugger. It needs
    no preparation. Since when they wait is known of those who began while a `Recording` was on.
    Whoever waits for a `torchfut_aio.ValueStream` waits for no future, and is not shown.

    It looks through all objects that the garbage collector tracks, some tens of milliseconds for
    every 100,000, and all else stands still meanwhile. It misses futures that ``gc.freeze`` has
    hidden, and what PyTorch's C++ has attached itself.

    Returns:
        Those whose oldest wait began first come first; those of which that is unknown, last.

    Example:
        >>> from torchfut_aio import Future, debug
        >>> fut = Future()
        >>> fut.add_done_callback(print)
        >>> [print(pending) for pending in debug.pending_futures() if pending.future is fut]
        <Future pending waiters=0 callbacks=1>
          callback builtins.print
        [None]
    """
    futures = [thing for thing in gc.get_objects() if issubclass(type(thing), Future)]
    found = [PendingFuture(future, _who_waits(future)) for future in futures if _is_pending(future)]
    return sorted(found, key=_oldest)


def _is_pending(future: Future[Any]) -> bool:
    try:
        return not future.done()
    except AttributeError:  # another thread is still making it
        return False


def _who_waits(future: Future[Any]) -> tuple[Who, ...]:
    tasks_and_threads = [waker.who(waiter) for waiter, waker in _core.waiters_of(future)]
    _, callbacks = _core.followers(future)
    return (*tasks_and_threads, *(Who("callback", each.name, each.since) for each in callbacks))


def _oldest(pending: PendingFuture) -> float:
    return min((who.since for who in pending.who if who.since is not None), default=inf)


def _line(who: Who, now: float) -> str:
    since = "" if who.since is None else f", for {now - who.since:.3g} s"
    return f"{who.kind} {who.name or 'of unknown name'}{since}"

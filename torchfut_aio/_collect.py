"""Many futures as one: all of them, their values, or one after the other.

Each function leaves one callback object with every pending future, the same object
with all of them: no task, no thread, and no closure per future.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, overload

import torch

from . import _callbacks, _loops
from ._adopt import as_future
from ._errors import NotAFutureError, warn_that_wait_blocks_a_loop
from ._future import Combination, Future

__all__ = ["as_completed", "collect_all", "gather", "wait_all"]

T = TypeVar("T")


@overload
def collect_all(futures: Iterable[torch.futures.Future[T]]) -> Future[list[Future[T]]]: ...
@overload
def collect_all(futures: Iterable[Any]) -> Future[list[Any]]: ...
def collect_all(futures: Iterable[Any]) -> Future[list[Any]]:
    """Returns a future that completes when all of ``futures`` have.

    Args:
        futures: Futures of this package, of torch, or anything that `as_future`
            adopts, in any mix. May be empty, and may name a future twice.

    Returns:
        A future of the list of the very objects passed in. If some failed, it fails
        with the error of the first of these in the list, once all are done. A caller
        who loses interest in it leaves it attached to those that are still pending.

    Raises:
        NotAFutureError: One of them is None, or cannot be adopted.

    Example:
        >>> fut0, fut1 = torchfut_aio.Future(), torchfut_aio.Future()
        >>> fut = torchfut_aio.collect_all([fut0, fut1])
        >>> fut0.set_result(0)
        >>> fut1.set_result(1)
        >>> [f.value() for f in fut.wait()]
        [0, 1]
    """
    given: list[Any] = _listed(futures)

    def result(ours: list[Future[Any]]) -> list[Any]:
        for future in ours:
            future.value()
        return given

    return _Collector(_adopted(given), result).start()


@overload
def gather(futures: Iterable[torch.futures.Future[T]]) -> Future[list[T]]: ...
@overload
def gather(futures: Iterable[Any]) -> Future[list[Any]]: ...
def gather(futures: Iterable[Any]) -> Future[list[Any]]:
    """Returns a future of the values of ``futures``, which fails as soon as one fails.

    Args:
        futures: As for `collect_all`.

    Returns:
        A future of the list of the values, in the order of ``futures``. When one
        fails it fails with that error at once, and waits for none of the others, which
        go on undisturbed. A caller who loses interest in it leaves it attached to those
        until they complete.

    Raises:
        NotAFutureError: One of them is None, or cannot be adopted.

    Example:
        >>> fut0, fut1 = torchfut_aio.Future(), torchfut_aio.Future()
        >>> both = torchfut_aio.gather([fut0, fut1])
        >>> fut1.set_result("b")
        >>> fut0.set_result("a")
        >>> both.wait()
        ['a', 'b']
    """
    return _Gatherer(_adopted(_listed(futures)), _values).start()


@overload
def wait_all(futures: Iterable[torch.futures.Future[T]]) -> list[T]: ...
@overload
def wait_all(futures: Iterable[Any]) -> list[Any]: ...
def wait_all(futures: Iterable[Any]) -> list[Any]:
    """Blocks until all of ``futures`` are done, or one has failed.

    Args:
        futures: As for `collect_all`.

    Returns:
        The list of the values, in the order of ``futures``.

    Raises:
        BaseException: The error of the first that failed; it waits for no others.
        NotAFutureError: One of them is None, or cannot be adopted.

    Example:
        >>> fut0, fut1 = torchfut_aio.Future(), torchfut_aio.Future()
        >>> fut0.set_result(0)
        >>> fut1.set_result(1)
        >>> torchfut_aio.wait_all([fut0, fut1])
        [0, 1]
    """
    gatherer = _Gatherer(_adopted(_listed(futures)), _values)
    try:
        values: list[Any] = gatherer.start().wait()
        return values
    except BaseException:
        gatherer.withdraw()
        raise


@overload
def as_completed(futures: Iterable[torch.futures.Future[T]]) -> _AsCompleted[T]: ...
@overload
def as_completed(futures: Iterable[Any]) -> _AsCompleted[Any]: ...
def as_completed(futures: Iterable[Any]) -> _AsCompleted[Any]:
    """Iterates over ``futures`` in the order in which they complete.

    Use it with ``async for`` on an event loop, with ``for`` in a thread. It may be
    abandoned half way, and then leaves nothing behind with the futures still pending.
    Several tasks or threads may share one: each future goes to one of them. Where they
    complete faster than a task takes them, one on asyncio or uvloop lets them gather for
    up to a millisecond when it has taken all.

    Args:
        futures: As for `collect_all`. A future that is named twice is yielded once.

    Returns:
        An iterator, for ``for`` and ``async for``, of futures of this package that are
        done: those passed in, and for those of another kind what `as_future` makes of
        them. To know which is which, pass what you got from `as_future` yourself.

    Raises:
        NotAFutureError: One of them is None, or cannot be adopted.

    Example:
        >>> fut0, fut1 = torchfut_aio.Future(), torchfut_aio.Future()
        >>> completed = torchfut_aio.as_completed([fut0, fut1])
        >>> fut1.set_result("first")
        >>> fut0.set_result("second")
        >>> [fut.value() for fut in completed]
        ['first', 'second']
    """
    return _AsCompleted(_adopted(_listed(futures)))


class _Collector(_callbacks.Entry):
    """Completes one future when the last of several has completed."""

    # ``result`` makes the combined result of the list of futures, or raises.
    __slots__ = ("combined", "distinct", "futures", "result", "tickets")

    def __init__(
        self, futures: list[Future[Any]], result: Callable[[list[Future[Any]]], list[Any]]
    ) -> None:
        self.result = result
        self.futures = futures
        self.distinct = _distinct(futures)
        self.combined: Future[Any] = Future()
        # Popping from a list is one indivisible step: who finds it empty is the last.
        self.tickets = [None] * (len(self.distinct) - 1)

    def start(self) -> Future[Any]:
        for future in self.distinct:
            future._add(self)
        if not self.distinct:
            self.combined.set_result([])
        return self.combined

    def run(self, future: Future[Any]) -> None:  # noqa: ARG002
        try:
            self.tickets.pop()
        except IndexError:
            self.complete()

    def interrupted(self, _future: Future[Any], interrupt: BaseException) -> None:
        if not self.combined.done():
            self.combined.set_exception(interrupt)

    def complete(self) -> None:
        try:
            result = self.result(self.futures)
        except BaseException as error:
            self.combined.set_exception(error)
        else:
            self.combined.set_result(Combination(result, self.distinct))


class _Gatherer(_Collector):
    """Completes at the first failure, too, and withdraws from the futures still pending."""

    __slots__ = ("failure",)

    def __init__(
        self, futures: list[Future[Any]], result: Callable[[list[Future[Any]]], list[Any]]
    ) -> None:
        super().__init__(futures, result)
        self.failure = [None]  # popped by the first to fail

    def start(self) -> Future[Any]:
        combined = super().start()
        if not self.failure:  # it failed meanwhile, with futures yet to be attached to
            self.withdraw()
        return combined

    def run(self, future: Future[Any]) -> None:
        error = future.exception()
        if error is None:
            super().run(future)
            return
        try:
            self.failure.pop()
        except IndexError:
            return
        self.withdraw()
        self.combined.set_exception(error)

    def withdraw(self) -> None:
        for future in self.distinct:
            future._discard(self)


class _Arrivals(_callbacks.Entry):
    """Takes in futures as they complete, and wakes those who wait for the next.

    A task awaits it for the next, a thread blocks for it.
    """

    __slots__ = ("awaited", "bells", "ready", "streak", "tickets")

    def __init__(self, futures: list[Future[Any]]) -> None:
        self.awaited = dict.fromkeys(futures)
        self.ready: deque[Future[Any]] = deque()
        # Of those who wait.
        self.bells: list[_loops.Waiter] = []
        # One for each arrival that nobody has asked for. Who holds one gets a future.
        self.tickets = [None] * len(self.awaited)
        # How many were taken since somebody last had to wait.
        self.streak = 0

    def run(self, future: Future[Any]) -> None:
        # Not with append(): Ctrl-C strikes after calls, and these go together.
        self.ready += (future,)
        del self.awaited[future]
        self.ring()

    def interrupted(self, future: Future[Any], _interrupt: BaseException) -> None:
        if future in self.awaited:
            self.run(future)
        self.ring()

    def ring(self) -> None:
        # A copy, as that locks the list where there is no GIL: see `arrived`.
        for bell in reversed(self.bells.copy()):
            bell.wake()
            with suppress(ValueError):  # another thread rings, too
                self.bells.remove(bell)

    def __await__(self) -> Generator[Any, Any, Future[Any]]:
        while (future := self.take()) is None:
            yield from self._suspend()
        return future

    def _suspend(self) -> Generator[Any, Any, None]:
        loop = _loops.current()
        waiter = loop.waiter()
        streak, self.streak = self.streak, 0
        if loop.wake_later(waiter, streak):
            # They come faster than they are taken, so there will be many more then.
            yield from waiter
            return
        with self.bell(waiter):
            if not self.arrived():
                yield from waiter

    def block(self) -> Future[Any]:
        """Does for a thread what ``await`` does for a task."""
        while (future := self.take()) is None:
            self._block_once()
        return future

    def _block_once(self) -> None:
        # Callbacks that this thread has put off may be the next to arrive.
        _callbacks.run_deferred()
        if self.ready:
            return
        if _loops.loop_in_this_thread():
            warn_that_wait_blocks_a_loop()
        waiter = _loops.ThreadWaiter()
        with self.bell(waiter):
            if not self.arrived():
                waiter.block(None)

    def arrived(self) -> bool:
        """Tells whether there is a future to take, for one whose bell hangs.

        A copy, as that locks the deque where there is no GIL: either this sees the future, or
        who brings it sees the bell.
        """
        return bool(self.ready.copy())

    @contextmanager
    def bell(self, waiter: _loops.Waiter) -> Iterator[None]:
        """Has ``waiter`` woken by the next arrival. If one has `arrived` by now, it may not be."""
        self.bells.append(waiter)
        try:
            yield
        finally:
            with suppress(ValueError):  # it has been rung
                self.bells.remove(waiter)

    def claim(self, exhausted: type[Exception]) -> None:
        try:
            self.tickets.pop()
        except IndexError:
            raise exhausted from None

    def unclaim(self) -> None:
        self.tickets.append(None)

    def take(self) -> Future[Any] | None:
        try:
            future = self.ready.popleft()
        except IndexError:
            return None
        self.streak += 1
        return future


class _AsCompleted(AsyncIterator[Future[T]], Iterator[Future[T]]):
    """What `as_completed` returns."""

    def __init__(self, futures: list[Future[T]]) -> None:
        self._arrivals = _Arrivals(futures)
        for future in list(self._arrivals.awaited):
            future._add(self._arrivals)

    def __iter__(self) -> _AsCompleted[T]:
        return self

    def __aiter__(self) -> _AsCompleted[T]:
        return self

    def __next__(self) -> Future[T]:
        arrivals = self._arrivals
        arrivals.claim(StopIteration)
        try:
            return arrivals.block()
        except BaseException:
            arrivals.unclaim()
            raise
        finally:
            del self  # or a traceback that is kept would keep the iterator

    async def __anext__(self) -> Future[T]:
        arrivals = self._arrivals
        arrivals.claim(StopAsyncIteration)
        try:
            return await arrivals
        except BaseException:
            arrivals.unclaim()
            raise
        finally:
            del self  # or a traceback that is kept would keep the iterator

    def __del__(self) -> None:
        for future in list(self._arrivals.awaited):
            future._discard(self._arrivals)


def _values(futures: list[Future[Any]]) -> list[Any]:
    return [future.value() for future in futures]


def _listed(futures: Iterable[Any]) -> list[Any]:
    try:
        return list(futures)
    except TypeError:
        raise NotAFutureError(
            f"expected an iterable of futures, such as [fut0, fut1], not {futures!r} "
            f"of type {type(futures).__qualname__}"
        ) from None


def _adopted(futures: list[Any]) -> list[Future[Any]]:
    return [future if type(future) is Future else as_future(future) for future in futures]


def _distinct(futures: list[Future[T]]) -> list[Future[T]]:
    return list(dict.fromkeys(futures))

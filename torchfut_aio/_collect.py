"""Many futures as one: all of them, or their values.

Each function leaves one callback object with every pending future, the same object
with all of them: no task, no thread, and no closure per future.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar, overload

from . import _core
from ._adopt import Source, as_future
from ._arguments import timeout_checked
from ._dependent import DependentFuture
from ._errors import InvalidStateError, NotAFutureError
from ._future import Future
from ._repr import described

T = TypeVar("T")
F = TypeVar("F")


@overload
def collect_all(futures: Iterable[F]) -> Future[list[F]]: ...
@overload
def collect_all(futures: Iterable[Any]) -> Future[list[Any]]: ...
def collect_all(futures: Iterable[Any], *_others: object) -> Future[list[Any]]:
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
    check_one_iterable("collect_all", _others)
    given = _listed(futures)
    return Collector(adopted(given), lambda _: given).start()


@overload
def wait_all(futures: Iterable[Source[T]], *, timeout: float | None = None) -> list[T]: ...
@overload
def wait_all(futures: Iterable[Any], *, timeout: float | None = None) -> list[Any]: ...
def wait_all(futures: Iterable[Any], *_others: object, timeout: float | None = None) -> list[Any]:
    """Blocks until all of ``futures`` are done, or one has failed.

    A wait that times out or is interrupted leaves them as they were, and nothing behind.

    Args:
        futures: As for `collect_all`.
        timeout: How long to wait at most, in seconds, as for `Future.wait`.

    Returns:
        The list of the values, in the order of ``futures``.

    Raises:
        BaseException: The error of the first that failed; it waits for no others.
        NotAFutureError: One of them is None, or cannot be adopted.
        TimeoutError: Not all were done in time.
        TypeError, ValueError: ``timeout`` is not a number, or is NaN.

    Example:
        >>> fut0, fut1 = torchfut_aio.Future(), torchfut_aio.Future()
        >>> fut0.set_result(0)
        >>> fut1.set_result(1)
        >>> torchfut_aio.wait_all([fut0, fut1])
        [0, 1]
    """
    check_one_iterable("wait_all", _others, ", and timeout= by its name")
    if timeout is not None:
        timeout = timeout_checked(timeout)
    gatherer = Gatherer(adopted(futures), values)
    try:
        result: list[Any] = gatherer.start().wait(timeout)
        return result
    except BaseException as error:
        gatherer.withdraw()
        if issubclass(type(error), TimeoutError) and not gatherer.combined.done():
            pending = sum(not future.done() for future in gatherer.distinct)
            raise not_done_within(timeout, pending) from None
        raise
    finally:
        del futures, gatherer  # as in Outcome.read()


class Collector(_core.DoneCallback):
    """Completes one future when the last of several has completed."""

    uses_streams = False

    # ``result`` makes the combined result of the list of futures, of which none failed.
    __slots__ = ("__weakref__", "combined", "distinct", "futures", "result", "tickets")

    def __init__(
        self, futures: list[Future[Any]], result: Callable[[list[Future[Any]]], Any]
    ) -> None:
        self.result = result
        self.futures = futures
        self.distinct = distinct(futures)
        self.combined: Future[Any] = Future()
        if any(issubclass(type(future), DependentFuture) for future in self.distinct):
            self.combined = DependentFuture()
            self.combined.depend_on(self)
        # Popping from a list is one indivisible step: whoever finds it empty is the last.
        self.tickets = [None] * (len(self.distinct) - 1)

    def check(self, blocks: bool = False) -> None:
        """Check that the futures can be completed while the calling thread waits."""
        for future in self.distinct:
            if issubclass(type(future), DependentFuture):
                future.check(blocks)  # type: ignore[attr-defined]

    def start(self) -> Future[Any]:
        for future in self.distinct:
            _core.add_callback(future, self)
        if not self.distinct:
            _core.complete_with_value(self.combined, self.result([]))
        return self.combined

    def run(self, future: Future[Any]) -> None:  # noqa: ARG002
        try:
            self.tickets.pop()
        except IndexError:
            self.complete()

    def fail(self, _future: Future[Any], error: BaseException) -> None:
        _core.try_complete_with_error(self.combined, error)

    def complete(self) -> None:
        with suppress(InvalidStateError):  # somebody has completed it instead
            failed = self.failed()
            if failed is not None:
                self.fail_as(failed)
            else:
                result = self.result(self.futures)
                _core.complete_with_parts(self.combined, result, self.distinct)

    def fail_as(self, failed: Future[Any]) -> None:
        for future in self.distinct:
            if future is not failed:
                _core.ignore_error(future)  # one error is enough, as with asyncio.gather
        _core.complete_as(self.combined, failed)

    def failed(self) -> Future[Any] | None:
        """Returns the future to fail as, now that all are done; or None."""
        return next(filter(_core.has_failed, self.distinct), None)


class Settler(Collector):
    """Completes with the errors of those that fail among the values."""

    __slots__ = ()

    def failed(self) -> None:
        return None


class Gatherer(Collector):
    """Completes at the first failure, too, and withdraws from the futures still pending."""

    __slots__ = ("failure",)

    def __init__(
        self, futures: list[Future[Any]], result: Callable[[list[Future[Any]]], Any]
    ) -> None:
        super().__init__(futures, result)
        self.failure = [None]  # popped by the first to fail

    def start(self) -> Future[Any]:
        combined = super().start()
        if not self.failure:  # it failed meanwhile, with futures yet to be attached to
            self.withdraw()
        return combined

    def run(self, future: Future[Any]) -> None:
        if not _core.has_failed(future):
            super().run(future)
            return
        try:
            self.failure.pop()
        except IndexError:
            return
        self.withdraw()
        with suppress(InvalidStateError):  # somebody has completed it instead
            self.fail_as(future)

    def withdraw(self) -> None:
        for future in self.distinct:
            _core.remove(future, self)


def distinct(futures: list[Future[Any]]) -> list[Future[Any]]:
    """Return the futures without repetitions: by identity, as a class may define ``==``."""
    return list({id(future): future for future in futures}.values())


def not_done_within(timeout: float | None, pending: int) -> TimeoutError:
    """Returns the error of who waited for several futures, of which some are pending still."""
    return TimeoutError(f"futures not done within {timeout:g} s: {pending}; they stay pending")


def values(futures: list[Future[Any]]) -> list[Any]:
    """Returns the values of futures that are done."""
    return [future.value() for future in futures]


def values_or_errors(futures: list[Future[Any]]) -> list[Any]:
    """Returns the values of futures that are done, or their errors in the places of these."""
    errors = [future.exception() for future in futures]
    return [
        future.value() if error is None else error
        for future, error in zip(futures, errors, strict=True)
    ]


def adopted(futures: Iterable[Any]) -> list[Future[Any]]:
    """Returns a list of ``futures``, with what `as_future` makes of those of another kind."""
    return [future if type(future) is Future else as_future(future) for future in _listed(futures)]


def check_one_iterable(by: str, others: tuple[object, ...], more: str = "") -> None:
    """Raise TypeError if futures were passed one by one, as to ``asyncio.gather``."""
    if others:
        raise TypeError(f"{by}() takes one iterable: {by}([a, b]){more}")


def _listed(futures: Iterable[F]) -> list[F]:
    try:
        return list(futures)
    except TypeError:
        raise NotAFutureError(
            f"expected an iterable of futures, such as [fut0, fut1], not {described(futures)}"
        ) from None

"""Many futures at once: one future of all of them, and completing all of them.

Each combination adds one callback object, the same to every pending future. It needs no task, no
thread, and no closure for each future.
"""

# A tuple is an iterable, and has separate overloads.
# mypy: disable-error-code="overload-overlap"

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NoReturn, TypeAlias, TypeVar, overload

import torch

from . import _core
from ._adopt import Source, as_future
from ._adopt import Source as S  # in overloads  # noqa: N817
from ._arguments import listed, timeout_checked
from ._dependent import DependentFuture, dependent
from ._errors import NotAFutureError
from ._future import Future
from ._repr import described

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
E = TypeVar("E")
F = TypeVar("F")
No: TypeAlias = Literal[False]
X: TypeAlias = BaseException


@overload
def collect_all(futures: Iterable[T]) -> Future[list[T]]: ...
@overload
def collect_all(futures: Iterable[Any]) -> Future[list[Any]]: ...
def collect_all(futures: Iterable[Any], *_others: object) -> Future[list[Any]]:
    """Return a future that completes when all of ``futures`` have.

    Args:
        futures: Futures of this package, of torch, or anything that `as_future`
            adopts, in any mix. May be empty, and may name a future twice.

    Returns:
        A future of a list of the same objects. If some failed, it fails once all are done, with the
        error of the one that comes first in the list. The pending futures keep a reference to it,
        even if it is cancelled or dropped.

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
    if _others:
        refuse_several("collect_all")
    given = _listed(futures)
    return Collector(adopted(given), lambda _: given).start()


@overload
def wait_all(futures: Iterable[Source[T]], *, timeout: float | None = None) -> list[T]: ...
@overload
def wait_all(futures: Iterable[Any], *, timeout: float | None = None) -> list[Any]: ...
def wait_all(futures: Iterable[Any], *_others: object, timeout: float | None = None) -> list[Any]:
    """Block until all of ``futures`` are done, or one has failed.

    A wait that times out or is interrupted leaves them as they were, and leaves no callback.

    Args:
        futures: As for `collect_all`.
        timeout: The longest time to wait, in seconds, as for `Future.wait`.

    Returns:
        The list of the values, in the order of ``futures``.

    Raises:
        BaseException: The error of the first that failed; it does not wait for the others.
        TimeoutError: Not all were done in time.

    Example:
        >>> fut0, fut1 = torchfut_aio.Future(), torchfut_aio.Future()
        >>> fut0.set_result(0)
        >>> fut1.set_result(1)
        >>> torchfut_aio.wait_all([fut0, fut1])
        [0, 1]
    """
    if _others:
        refuse_several("wait_all", ", and timeout= by its name")
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


# fmt: off
@overload
def gather(futures: tuple[S[A]], *, return_exceptions: No = False) -> Future[tuple[A]]: ...
@overload
def gather(futures: tuple[S[A], S[B]], *, return_exceptions: No = False) -> Future[tuple[A, B]]: ...
@overload
def gather(
    futures: tuple[S[A], S[B], S[C]], *, return_exceptions: No = False
) -> Future[tuple[A, B, C]]: ...
@overload
def gather(
    futures: tuple[S[A], S[B], S[C], S[D]], *, return_exceptions: No = False
) -> Future[tuple[A, B, C, D]]: ...
@overload
def gather(
    futures: tuple[S[A], S[B], S[C], S[D], S[E]], *, return_exceptions: No = False
) -> Future[tuple[A, B, C, D, E]]: ...
@overload
def gather(
    futures: tuple[S[A], S[B], S[C], S[D], S[E], S[F]], *, return_exceptions: No = False
) -> Future[tuple[A, B, C, D, E, F]]: ...
@overload
def gather(futures: tuple[S[A]], *, return_exceptions: bool) -> Future[tuple[A | X]]: ...
@overload
def gather(
    futures: tuple[S[A], S[B]], *, return_exceptions: bool
) -> Future[tuple[A | X, B | X]]: ...
@overload
def gather(
    futures: tuple[S[A], S[B], S[C]], *, return_exceptions: bool
) -> Future[tuple[A | X, B | X, C | X]]: ...
@overload
def gather(
    futures: tuple[S[A], S[B], S[C], S[D]], *, return_exceptions: bool
) -> Future[tuple[A | X, B | X, C | X, D | X]]: ...
@overload
def gather(
    futures: tuple[S[A], S[B], S[C], S[D], S[E]], *, return_exceptions: bool
) -> Future[tuple[A | X, B | X, C | X, D | X, E | X]]: ...
@overload
def gather(
    futures: tuple[S[A], S[B], S[C], S[D], S[E], S[F]], *, return_exceptions: bool
) -> Future[tuple[A | X, B | X, C | X, D | X, E | X, F | X]]: ...
@overload
def gather(
    futures: tuple[S[T], ...], *, return_exceptions: No = False
) -> Future[tuple[T, ...]]: ...
@overload
def gather(futures: tuple[S[T], ...], *, return_exceptions: bool) -> Future[tuple[T | X, ...]]: ...
@overload
def gather(futures: Iterable[S[T]], *, return_exceptions: No = False) -> Future[list[T]]: ...
@overload
def gather(futures: Iterable[S[T]], *, return_exceptions: bool) -> Future[list[T | X]]: ...
# fmt: on
@overload
def gather(futures: Iterable[Any], *, return_exceptions: bool = False) -> Future[Any]: ...
def gather(
    futures: Iterable[Any], *_others: object, return_exceptions: bool = False
) -> Future[Any]:
    """Return a future of the values of ``futures``, which fails as soon as one fails.

    Args:
        futures: As for `collect_all`.
        return_exceptions: Whether to wait for all of them, and return the error of each that
            fails in the place of its value.

    Returns:
        A future of the list of the values, in the order of ``futures``. When one fails, it fails
        with that error at once, and the others continue. If it is cancelled, or a wait for it times
        out, the others continue as well, and keep a reference to it until they complete. (Static
        type: a tuple of futures gives a tuple of values, as with ``asyncio.gather``, so that each
        value keeps its type. At run time it is always a list.)

    Example:
        >>> fut0, fut1 = torchfut_aio.Future(), torchfut_aio.Future()
        >>> both = torchfut_aio.gather([fut0, fut1])
        >>> fut1.set_result("b")
        >>> fut0.set_result("a")
        >>> both.wait()
        ['a', 'b']
    """
    if _others:
        refuse_several("gather")
    if return_exceptions:
        return Settler(adopted(futures), values_or_errors).start()
    return Gatherer(adopted(futures), values).start()


def set_results(
    futures: Iterable[Future[T]], values: Sequence[T | BaseException] | torch.Tensor
) -> list[Future[T]]:
    """Complete each of ``futures`` with the value in its place.

    Each future is completed as by `Future.set_result`, and each loop is woken once for all of them.
    When this returns, every future is done, also for C++ consumers, and all callbacks have run.
    A future that was done before keeps its outcome and is skipped. So a request that was given up
    can complete its future without disturbing the others.

    Args:
        futures: Futures of this package. One that is named twice gets the first value.
        values: As many values, in a list, a tuple or another sequence that is not a string. A value
            that is an exception fails its future, as `Future.set_exception` does. A tensor or array
            is treated as the sequence of its rows. Rows share storage: ``.clone()`` a row that is
            kept, or sent elsewhere, without the others.

    Returns:
        The list of the futures that were done already; almost always empty.

    Raises:
        TypeError: ``values`` is not such a sequence, but a dict, a string or an iterator, for
            example.
        ValueError: The numbers of values and futures differ.
        NotAFutureError: One of ``futures`` is not a future of this package. After any of these
            errors all futures are as they were.

    Example:
        >>> futures = [torchfut_aio.Future() for _ in range(3)]
        >>> torchfut_aio.set_results(futures, ["a", ValueError("b"), "c"])
        []
        >>> futures
        [<Future done result='a'>, <Future done error=ValueError('b')>, <Future done result='c'>]
    """
    all_futures, all_values = list(futures), listed(values, "set_results() takes")
    if len(all_futures) != len(all_values):
        raise ValueError(
            f"set_results() takes as many values as futures, "
            f"not {len(all_values)} for {len(all_futures)}"
        )
    for future in all_futures:
        # Not isinstance(), which reads `__class__` and so could run the code of a proxy.
        if not issubclass(type(future), Future):
            what = described(future)
            raise NotAFutureError(f"set_results() completes torchfut_aio futures, not {what}")
    outcomes = _core.outcomes_of_results(all_futures, all_values)
    done_before: list[Any] = _core.complete_all(all_futures, outcomes)
    return done_before


class Collector(_core.DoneCallback):
    """Completes one future when the last of several has completed."""

    uses_streams = False

    # ``result`` makes the combined result of the list of futures, if none has failed.
    __slots__ = ("__weakref__", "combined", "dependent", "distinct", "futures", "result", "tickets")

    def __init__(
        self, futures: list[Future[Any]], result: Callable[[list[Future[Any]]], Any]
    ) -> None:
        self.result = result
        self.futures = futures
        self.distinct = distinct(futures)
        self.dependent = [f for f in self.distinct if issubclass(type(f), DependentFuture)]
        self.combined: Future[Any] = dependent(self) if self.dependent else Future()
        # pop() of a list is atomic, so exactly one thread finds it empty: the last.
        self.tickets = [None] * (len(self.distinct) - 1)

    def check(self, blocks: bool = False) -> None:
        for future in self.dependent:
            future.check(blocks)  # type: ignore[attr-defined]

    def start(self) -> Future[Any]:
        for future in self.distinct:
            _core.add_callback(future, self)
        if not self.distinct:
            _core.try_complete_with_value(self.combined, self.result([]))
        return self.combined

    def run(self, future: Future[Any]) -> None:  # noqa: ARG002
        try:
            self.tickets.pop()
        except IndexError:
            self.complete()

    def fail(self, _future: Future[Any], error: BaseException) -> None:
        _core.try_complete_with_error(self.combined, error)

    def complete(self) -> None:
        failed = self.failed()
        if failed is not None:
            self.fail_as(failed)
        else:
            result = self.result(self.futures)
            _core.try_complete_with_parts(self.combined, result, self.distinct)

    def fail_as(self, failed: Future[Any]) -> None:
        for future in self.distinct:
            if future is not failed:
                _core.ignore_error(future)  # one error is enough, as with asyncio.gather
        _core.try_complete_as(self.combined, failed)

    def failed(self) -> Future[Any] | None:
        """Return the future whose error to use, now that all are done, or None."""
        return next(filter(_core.has_failed, self.distinct), None)


class Settler(Collector):
    """Completes with the errors of the futures that failed in the places of their values."""

    __slots__ = ()

    def failed(self) -> None:
        return None


class Gatherer(Collector):
    """Completes when all have completed, or at the first failure."""

    __slots__ = ("failure",)

    def __init__(
        self, futures: list[Future[Any]], result: Callable[[list[Future[Any]]], Any]
    ) -> None:
        super().__init__(futures, result)
        self.failure = [None]  # popped by the first to fail

    def start(self) -> Future[Any]:
        combined = super().start()
        # One may have failed before the callback was added to the others: remove it there again.
        if not self.failure:
            self.withdraw()
        return combined

    def run(self, future: Future[Any]) -> None:
        if not _core.has_failed(future):
            super().run(future)
            return
        try:
            self.failure.pop()  # atomic: one thread is the first
        except IndexError:
            return
        self.withdraw()
        self.fail_as(future)

    def withdraw(self) -> None:
        for future in self.distinct:
            _core.remove(future, self)


def distinct(futures: list[Future[Any]]) -> list[Future[Any]]:
    """Return the futures without repetitions: by identity, as a class may define ``==``."""
    return list({id(future): future for future in futures}.values())


def not_done_within(timeout: float | None, pending: int) -> TimeoutError:
    return TimeoutError(f"futures not done within {timeout:g} s: {pending}; they stay pending")


def values(futures: list[Future[Any]]) -> list[Any]:
    return [future.value() for future in futures]


def values_or_errors(futures: list[Future[Any]]) -> list[Any]:
    """Return the values of futures that are done, with errors in the places of missing values."""
    return [
        future.value() if (error := future.exception()) is None else error for future in futures
    ]


def adopted(futures: Iterable[Any]) -> list[Future[Any]]:
    """Return a list of ``futures``, each adopted by `as_future` if it is of another kind."""
    return [future if type(future) is Future else as_future(future) for future in _listed(futures)]


def refuse_several(by: str, more: str = "") -> NoReturn:
    raise TypeError(f"{by}() takes one iterable: {by}([a, b]){more}")


def _listed(futures: Iterable[T]) -> list[T]:
    try:
        return list(futures)
    except TypeError:
        raise NotAFutureError(
            f"expected an iterable of futures, such as [fut0, fut1], not {described(futures)}"
        ) from None

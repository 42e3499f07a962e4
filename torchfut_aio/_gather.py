"""`gather`, whose overloads keep the types of a few values apart."""

# A tuple is an iterable too, and has overloads of its own.
# mypy: disable-error-code="overload-overlap"

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, TypeVar, overload

from ._adopt import Source
from ._collect import Gatherer, Settler, adopted, check_one_iterable, values, values_or_errors
from ._future import Future

E: TypeAlias = BaseException

T = TypeVar("T")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")
T5 = TypeVar("T5")
T6 = TypeVar("T6")


@overload
def gather(
    futures: tuple[Source[T1]],
    *,
    return_exceptions: Literal[False] = False,
) -> Future[tuple[T1]]: ...
@overload
def gather(
    futures: tuple[Source[T1], Source[T2]],
    *,
    return_exceptions: Literal[False] = False,
) -> Future[tuple[T1, T2]]: ...
@overload
def gather(
    futures: tuple[Source[T1], Source[T2], Source[T3]],
    *,
    return_exceptions: Literal[False] = False,
) -> Future[tuple[T1, T2, T3]]: ...
@overload
def gather(
    futures: tuple[Source[T1], Source[T2], Source[T3], Source[T4]],
    *,
    return_exceptions: Literal[False] = False,
) -> Future[tuple[T1, T2, T3, T4]]: ...
@overload
def gather(
    futures: tuple[Source[T1], Source[T2], Source[T3], Source[T4], Source[T5]],
    *,
    return_exceptions: Literal[False] = False,
) -> Future[tuple[T1, T2, T3, T4, T5]]: ...
@overload
def gather(
    futures: tuple[Source[T1], Source[T2], Source[T3], Source[T4], Source[T5], Source[T6]],
    *,
    return_exceptions: Literal[False] = False,
) -> Future[tuple[T1, T2, T3, T4, T5, T6]]: ...
@overload
def gather(
    futures: tuple[Source[T1]],
    *,
    return_exceptions: bool,
) -> Future[tuple[T1 | E]]: ...
@overload
def gather(
    futures: tuple[Source[T1], Source[T2]],
    *,
    return_exceptions: bool,
) -> Future[tuple[T1 | E, T2 | E]]: ...
@overload
def gather(
    futures: tuple[Source[T1], Source[T2], Source[T3]],
    *,
    return_exceptions: bool,
) -> Future[tuple[T1 | E, T2 | E, T3 | E]]: ...
@overload
def gather(
    futures: tuple[Source[T1], Source[T2], Source[T3], Source[T4]],
    *,
    return_exceptions: bool,
) -> Future[tuple[T1 | E, T2 | E, T3 | E, T4 | E]]: ...
@overload
def gather(
    futures: tuple[Source[T1], Source[T2], Source[T3], Source[T4], Source[T5]],
    *,
    return_exceptions: bool,
) -> Future[tuple[T1 | E, T2 | E, T3 | E, T4 | E, T5 | E]]: ...
@overload
def gather(
    futures: tuple[Source[T1], Source[T2], Source[T3], Source[T4], Source[T5], Source[T6]],
    *,
    return_exceptions: bool,
) -> Future[tuple[T1 | E, T2 | E, T3 | E, T4 | E, T5 | E, T6 | E]]: ...
@overload
def gather(
    futures: tuple[Source[T], ...], *, return_exceptions: Literal[False] = False
) -> Future[tuple[T, ...]]: ...
@overload
def gather(
    futures: tuple[Source[T], ...], *, return_exceptions: bool
) -> Future[tuple[T | E, ...]]: ...
@overload
def gather(
    futures: Iterable[Source[T]], *, return_exceptions: Literal[False] = False
) -> Future[list[T]]: ...
@overload
def gather(futures: Iterable[Source[T]], *, return_exceptions: bool) -> Future[list[T | E]]: ...
@overload
def gather(futures: Iterable[Any], *, return_exceptions: bool = False) -> Future[Any]: ...
def gather(
    futures: Iterable[Any], *_others: object, return_exceptions: bool = False
) -> Future[Any]:
    """Returns a future of the values of ``futures``, which fails as soon as one fails.

    Args:
        futures: As for `collect_all`.
        return_exceptions: Whether to wait for all of them, and give the error of each that
            fails in the place of its value.

    Returns:
        A future of the list of the values, in the order of ``futures``. (For type checkers, that
        of a tuple is a tuple, as with ``asyncio.gather``, so that each value keeps its type.)
        When one fails it fails with that error at once, and waits for none of
        the others, which go on undisturbed. To cancel it, or to time out on it, leaves them as
        they are, and it stays attached to them until they complete.

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
    check_one_iterable("gather", _others)
    if return_exceptions:
        return Settler(adopted(futures), values_or_errors).start()
    return Gatherer(adopted(futures), values).start()

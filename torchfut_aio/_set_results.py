"""Completing many futures at once, as a thread does that has computed a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch

from . import _core
from ._arguments import listed
from ._devices import Moment
from ._errors import NotAFutureError
from ._future import Future
from ._repr import described

T = TypeVar("T")


def set_results(
    futures: Iterable[Future[T]], values: Sequence[T | BaseException] | torch.Tensor
) -> list[Future[T]]:
    """Completes each of ``futures`` with the value in its place.

    It does what `Future.set_result` does for each, and wakes each loop once for all. When
    it returns, every future is done, for C++ consumers, too, and all callbacks have run.
    A future that is done already keeps its outcome and is skipped, so whoever has given
    up on a request may complete its future, and does not disturb the others.

    Args:
        futures: Futures of this package. One that is named twice gets the first value.
        values: As many values, as a list, a tuple or another sequence that is no text. One that is
            an exception is an error, as if given to `Future.set_exception`. A tensor or array is
            treated as the sequence of its rows. These share its storage: ``.clone()`` a row that is
            kept, or sent elsewhere, without the others.

    Returns:
        The list of the futures that were done already; nearly always empty.

    Raises:
        TypeError: ``values`` is nothing of that kind, but a dict, a text or an iterator, say.
        ValueError: There are more values than futures, or fewer.
        NotAFutureError: One of them is no future of this package. After any of these
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
    outcomes = []
    moment = Moment()
    for future, value in zip(all_futures, all_values, strict=True):
        # By the types: to ask for its class could run the code of a proxy, which may raise.
        if not issubclass(type(future), Future):
            what = described(future)
            raise NotAFutureError(f"set_results() completes torchfut_aio futures, not {what}")
        devices = _core.devices_of(future)
        if issubclass(type(value), BaseException):
            outcomes.append(_core.outcome_of_error(value, devices))
        else:
            outcomes.append(_core.outcome_of_value(value, devices, moment))
    done_before: list[Any] = _core.complete_all(all_futures, outcomes)
    return done_before

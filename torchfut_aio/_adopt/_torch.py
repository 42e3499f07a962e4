"""Futures of torch, ours among them."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from .._future import Future
from .._rpc_errors import error_in, parse_remote_error
from ._asyncio import FutureOfLoop
from ._registry import Devices, adopts, copy_outcome, once

T = TypeVar("T")


@adopts("torchfut_aio.Future", kind=Future)
def _from_ours(source: Future[T], *, devices: Devices = None) -> Future[T]:
    if isinstance(source, FutureOfLoop):
        source.check_that_it_can_complete()
    return source if devices is None else _from_torch(source, devices=devices)


@adopts("torch.futures.Future", kind=torch._C.Future)
@once
def _from_torch(source: torch._C.Future[Any], future: Future[Any]) -> None:
    source.add_done_callback(
        lambda source: copy_outcome(lambda: read(source), future, parse_remote_error)
    )


def read(source: torch._C.Future[Any]) -> Any:
    """Returns the value of a future that is done, or raises its error.

    Also the error of a failed future of ours that C++ has copied, as a value, to ``source``.
    """
    value = source.value()
    error = error_in(value)
    if error is not None:
        raise error
    return value

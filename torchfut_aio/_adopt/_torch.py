"""Futures of torch, ours among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .._devices import finish_devices, has_streams_for_callbacks
from .._future import Future
from .._rpc_errors import error_in, parse_remote_error
from ._asyncio import FutureOfLoop
from ._registry import Devices, adopts, copy_outcome, once
from ._threads import complete_in_thread

T = TypeVar("T")


@adopts("torchfut_aio.Future", kind=Future)
def _from_ours(source: Future[T], *, devices: Devices = None) -> Future[T]:
    if isinstance(source, FutureOfLoop):
        source.check_that_it_can_complete()
    return source if devices is None else _from_torch(source, devices=devices)


@adopts("torch.futures.Future", kind=torch._C.Future)
@once
def _from_torch(source: torch._C.Future[Any], future: Future[Any]) -> None:
    follow(source, future, parse_remote_error)


def follow(
    source: torch._C.Future[Any],
    future: Future[Any],
    translate: Callable[[BaseException], BaseException] = lambda error: error,
) -> None:
    """Has ``future`` completed as ``source`` is, once that is done."""

    def complete_with(read: Callable[[torch._C.Future[Any]], Any]) -> Callable[[object], None]:
        return lambda _: copy_outcome(lambda: read(source), future, translate)

    if not (source.done() or isinstance(source, Future) or has_streams_for_callbacks()):
        # If it has devices, no callback could run, and the first would end the ``set_result`` of
        # whoever completes it.
        complete_in_thread(future, complete_with(_finished))
        return
    try:
        source.add_done_callback(complete_with(read))
    except RecursionError:
        raise
    except RuntimeError:  # it is done, and there are no streams to run the callback on
        complete_with(_waited)(source)


def _finished(source: torch._C.Future[Any]) -> Any:
    source.wait()
    # If it has no devices, nobody knows on which streams its kernels are.
    finish_devices()
    return read(source)


def _waited(source: torch._C.Future[Any]) -> Any:
    source.wait()
    return read(source)


def read(source: torch._C.Future[Any]) -> Any:
    """Returns the value of a future that is done, or raises its error.

    Also the error of a failed future of ours that C++ has copied, as a value, to ``source``.
    """
    value = source.value()
    error = error_in(value)
    if error is not None:
        raise error
    return value

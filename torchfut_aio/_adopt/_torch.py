"""Futures of torch, including our own."""

from __future__ import annotations

from _thread import start_new_thread
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .. import _core
from .._arguments import Devices
from .._dependent import DependentFuture
from .._errors import own_cancellation
from .._future import Future
from .._pytorch import CppFuture
from .._threads import call_contained
from ._adopted import AdoptedFuture, once
from ._registry import adopts, as_future

T = TypeVar("T")


class OfTorch(AdoptedFuture[T]):
    """A future that completes as one of torch does."""

    __qualname__ = "Future"
    __slots__ = ()

    def complete_as(self, source: Any, again: bool = False) -> None:
        from .._rpc_errors import error_in, parse_remote_error

        error = value = None
        try:
            if not isinstance(source, CppFuture):
                source = source.get_future()  # of a Work
            if isinstance(source, Future):
                error = source.exception()
                value = source.value() if error is None else None
            else:
                value = source.value()
                error = error_in(value)
        except BaseException as raised:
            # One of these may be this thread's. If the source itself failed with it, the repetition
            # finds it there again.
            if isinstance(raised, _OF_A_THREAD) and not again:
                raise
            error = raised
        finally:
            del source  # the error's traceback leads here, and the source holds the error
        try:
            if error is None:
                _core.try_complete_with_value(self, value)
            else:
                _drop_reading_frames(error)
                _core.try_complete_with_error(self, own_cancellation(parse_remote_error(error)))
        finally:
            del error


def _drop_reading_frames(error: BaseException) -> None:
    # Frames of torch refer to its future, which keeps the error in C++. The garbage collector does
    # not see that cycle.
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__") in _READERS:
        traceback = traceback.tb_next
    error.with_traceback(traceback)


_READERS = (__name__, "torch.futures")
_OF_A_THREAD = (KeyboardInterrupt, SystemExit, RecursionError, MemoryError)


def follow(source: CppFuture[Any], future: AdoptedFuture[Any]) -> None:
    callback = future.callback()
    if isinstance(source, Future):
        _core.add_callback(source, _Callback(future, callback))
        return
    try:
        source.add_done_callback(callback)
    except RecursionError:
        raise
    except RuntimeError as error:  # it is done, and no stream can be ordered after its kernels
        start_new_thread(call_contained, (future.recover, source, error))


@dataclass(eq=False, slots=True)
class _Callback(_core.DoneCallback):
    """The callback with a source that is a future of ours."""

    future: AdoptedFuture[Any]
    run: Callable[[Any], None]

    def fail(self, source: Any, error: BaseException) -> None:
        start_new_thread(call_contained, (self.future.recover, source, error))


_from_torch = once(follow, kind=OfTorch)
adopts("torch.futures.Future")(_from_torch)
as_future.register(CppFuture, _from_torch)


@adopts("torchfut_aio.Future")
def _from_ours(source: Future[T], *, devices: Devices = None) -> Future[T]:
    if isinstance(source, DependentFuture):
        source.check()
    return source if devices is None else _from_torch(source, devices=devices)


as_future.register(Future, _from_ours)

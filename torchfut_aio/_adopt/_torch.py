"""Futures of torch, ours among them."""

from __future__ import annotations

from _thread import start_new_thread
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from .. import _core
from .._arguments import Devices
from .._dependent import DependentFuture
from .._future import Future
from .._pytorch import CppFuture
from .._worker import call_contained
from ._registry import Adoption, adopts, once

T = TypeVar("T")
Translate = Callable[[BaseException], BaseException]


@adopts("torchfut_aio.Future", kind=Future)
def _from_ours(source: Future[T], *, devices: Devices = None) -> Future[T]:
    if issubclass(type(source), DependentFuture):
        source.check()  # type: ignore[attr-defined]
    return source if devices is None else _from_torch(source, devices=devices)


@adopts("torch.futures.Future", kind=CppFuture)
@once
def _from_torch(source: CppFuture[Any], future: DependentFuture[Any]) -> None:
    from .._rpc_errors import parse_remote_error

    follow(source, future, parse_remote_error)


def follow(
    source: CppFuture[Any],
    future: DependentFuture[Any],
    translate: Translate = lambda error: error,
) -> None:
    """Complete ``future`` as ``source``, once that is done."""
    adoption = _Adoption(source, future, translate)
    if issubclass(type(source), Future):
        _core.add_callback(source, _Callback(adoption))  # type: ignore[arg-type]
        return
    try:
        source.add_done_callback(adoption.callback())
    except RecursionError:
        raise
    except RuntimeError:  # it is done, and no stream can be ordered after its kernels
        adoption.settle(partial(_waited, source), adoption.translate)


_READERS = (__name__, "torch.futures")


class _Adoption(Adoption):
    """The promise of a future that adopted one of torch."""

    __slots__ = ("_translate",)

    def __init__(self, source: Any, future: DependentFuture[Any], translate: Translate) -> None:
        super().__init__(source, future)
        self._translate = translate

    def adopt(self, source: Any) -> None:
        error = value = None
        try:
            from .._rpc_errors import error_in

            if issubclass(type(source), Future):
                error = source.exception()
                value = source.value() if error is None else None
            else:
                value = source.value()
                error = error_in(value)
        except (KeyboardInterrupt, SystemExit, RecursionError, MemoryError):
            raise  # of this thread; if it is the source's after all, `recover` finds it again
        except BaseException as raised:
            error = raised
        finally:
            del source  # the error's traceback leads here, and the source holds the error
        if error is None:
            self.keep(value)
        else:
            try:
                self.fail(self.translate(error))
            finally:
                del error

    def adopt_again(self, source: Any) -> None:
        self.settle(partial(_waited, source), self.translate)

    def translate(self, error: BaseException) -> BaseException:
        """Return the error of the future, without the frames in which it was read."""
        # Those of torch refer to its future, which keeps the error where no collector finds it.
        traceback = error.__traceback__
        while traceback is not None and traceback.tb_frame.f_globals.get("__name__") in _READERS:
            traceback = traceback.tb_next
        return self._translate(error.with_traceback(traceback))


class _Callback(_core.DoneCallback):
    """What a source that is a future of ours calls."""

    __slots__ = ("_adoption", "run")

    def __init__(self, adoption: _Adoption) -> None:
        self._adoption = adoption
        self.run = adoption.adopt

    def fail(self, source: Any, error: BaseException) -> None:
        start_new_thread(call_contained, (self._adoption.recover, source, error))


def _waited(source: CppFuture[Any]) -> Any:
    source.wait()
    return read(source)


def read(source: CppFuture[Any]) -> Any:
    """Return the value of a future that is done, or raise its error.

    Also the error of a failed future of ours that C++ has copied, as a value, to ``source``.
    """
    try:
        from .._rpc_errors import error_in

        value = source.value()
        error = error_in(value)
        if error is not None:
            raise error
        return value
    finally:
        del source

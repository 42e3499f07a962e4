"""The future that a source completes, made once for each source.

A source refers to the future through its callback. The future refers to the source only weakly: a
pending source that is dropped is freed together with its callback, and the future fails.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from _thread import start_new_thread
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any, TypeVar

from .. import _core
from .._arguments import Devices, devices_checked
from .._core import OUTCOME
from .._dependent import DependentFuture
from .._devices import finish_devices
from .._errors import (
    CANCELLATIONS,
    CancelledError,
    InvalidStateError,
    drop_catching_frame,
    own_cancellation,
)
from .._future import Future
from .._threads import call_contained

T = TypeVar("T")

_GRACE = 0.05  # seconds in which a source that is done should call its callback


class AdoptedFuture(DependentFuture[T]):
    """A future that completes as its source does, by the source's ``exception`` and ``result``."""

    __qualname__ = "Future"
    __slots__ = ("_recovers", "_source")

    # A weak reference, or a function that returns None. A strong reference to a torch source would
    # be a cycle through C++, which the garbage collector does not see.
    _source: Callable[[], Any]
    _recovers: bool  # False before a callback was handed out, and once `check` has recovered

    def callback(self) -> Callable[[Any], None]:
        """Return a function that the source calls, with itself, when it is done."""
        adoption = self.until_done()
        next(adoption)
        return adoption.send

    def until_done(self, kept: Any = None) -> Generator[None, Any, None]:
        """Wait to be sent the source, then complete the future.

        Args:
            kept: The source, to keep it until then: for sources written in Python, as this makes a
                cycle, which the garbage collector has to see.
        """
        self._recovers = True
        # Not a function: an interrupt at its entry would come before the `try`, and the future
        # would stay pending. `send` of a generator is C, and we are suspended within the `try`.
        source = None
        try:
            source = yield
            self.complete_as(source)
        except GeneratorExit:  # the source, or its event loop, has dropped the callback
            self._end(kept)
            return
        except BaseException as error:  # an interrupt, or a full stack: a new thread has neither
            start_new_thread(call_contained, (self.recover, source, error))
            raise
        finally:
            del source, kept, self  # a source that keeps its callback must not keep these
        yield  # so that `send` returns: a generator that ends raises StopIteration

    def complete_as(self, source: Any, again: bool = False) -> None:  # noqa: ARG002
        """Complete the future as ``source``, which is done.

        With ``again``, in a thread that nothing interrupts, after an error has ended a call.
        """
        try:
            error = source.exception()  # not result(), which would add frames to the traceback
        except (RecursionError, MemoryError):
            raise  # it is this thread's, not the outcome
        except (Exception, asyncio.CancelledError) as raised:
            error = raised.with_traceback(None)
            # gRPC has a separate class for cancellations.
            if source.cancelled() and not isinstance(error, CANCELLATIONS):
                error = CancelledError(*error.args)
        if error is None:
            value = source.result()
            if OUTCOME not in self._state:
                with suppress(InvalidStateError):  # another thread was faster
                    self.set_result(value)
        else:
            try:
                _core.try_complete_with_error(self, own_cancellation(error))
            finally:
                del error

    def _end(self, source: Any) -> None:
        if source is not None and source.done():  # the loop closed before it called the callback
            self.complete_as(source)
        elif OUTCOME not in self._state:
            text = (
                "the adopted future was pending when its source was garbage-collected, or the "
                "event loop of its source ended: nothing can complete it any more"
            )
            _core.try_complete_with_error(self, CancelledError(text))

    def check(self, blocks: bool = False) -> None:  # noqa: ARG002
        """Recover if the source is done and its callback found no frame left on the stack."""
        source = self._source() if self._recovers else None
        if source is None or OUTCOME in self._state:
            return
        if hasattr(source, "done") and source.done():
            self._recovers = False  # *before* the start, so that only one thread recovers
            start_new_thread(call_contained, (self._recover_later, source))

    def _recover_later(self, source: Any) -> None:
        # Usually the callback was not lost: another thread is about to call it.
        time.sleep(_GRACE)
        self.recover(source, RuntimeError("the source is done"))

    def recover(self, source: Any, error: BaseException) -> None:
        """Complete the future in a new thread, after ``error`` has stopped `until_done`."""
        if source is None:  # the error came before the generator had received it
            source = self._source()
        if OUTCOME in self._state:
            return
        if source is None:
            _core.try_complete_with_error(self, error)
            return
        try:
            # In this thread, the streams of the kernels that fill the value are not current.
            finish_devices()
            self.complete_as(source, again=True)
        except Exception as failure:
            _core.try_complete_with_error(self, drop_catching_frame(failure))


# The pending futures, by adapter, source and devices.
_made: weakref.WeakValueDictionary[tuple[Any, Any, Any], Any] = weakref.WeakValueDictionary()


def once(
    adopt: Callable[[Any, Any], object] | None = None,
    *,
    kind: type[AdoptedFuture[Any]] = AdoptedFuture,
    identity: Callable[[Any], object] | None = None,
) -> Callable[..., Future[Any]]:
    """Make an adapter, which returns the same future for a source while that future is pending.

    Args:
        adopt: A function that gets a source and its future, and makes the source complete the
            future. By default, ``source.add_done_callback(future.callback())``.
        kind: The class of the future: how to read the source, and what to check before a wait.
        identity: A function that returns a key for a source without weak references. No other
            source may have that key while the future is pending.
    """

    def adapter(source: Any, *, devices: Devices = None) -> Future[Any]:
        declared = () if devices is None else devices_checked(devices)
        key = adopt, (id(source) if identity is None else identity(source)), declared
        future: AdoptedFuture[Any] | None = _made.get(key)
        if (
            future is not None
            and OUTCOME not in future._state
            # A new object may have the id of one that was freed, whose future is pending.
            and (identity is not None or future._source() is source)
        ):
            future.check()
            return future
        future = kind(devices=declared or None)
        future._source = weakref.ref(source) if identity is None else _no_source
        future._recovers = False
        if adopt is not None:
            adopt(source, future)
        else:  # as `callback`, without that call: this is a hot path
            adoption = future.until_done()
            next(adoption)
            source.add_done_callback(adoption.send)
        # *After* adopting, so that a source that is done, or refused, leaves no entry. Two threads
        # may adopt a source at the same time. Then both of their futures complete.
        if OUTCOME not in future._state:
            _made[key] = future
        return future

    return adapter


def _no_source() -> None:
    return None

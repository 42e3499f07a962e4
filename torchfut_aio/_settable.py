"""The half of a future for whoever completes it; `Future` adds that of those who wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from . import _core
from ._arguments import exception_checked
from ._core import OUTCOME
from ._devices import HOST_ONLY
from ._errors import AsyncioCancelledError

T = TypeVar("T")


class Settable(_core.Completable[T]):
    """What can be completed, once, with a value or an error."""

    __slots__ = ()

    def set_result(self, result: T) -> None:
        """Marks the future completed with ``result``, wakes all who wait, runs callbacks.

        Callbacks run in the calling thread before this returns, except those of chains
        nested deeper than 32 completions: the outermost completion runs these.

        Tensors in the result that reside on an accelerator may still be being written
        by kernels, provided that the streams on which these were enqueued are the
        current ones now.

        Args:
            result: Any object.

        Raises:
            InvalidStateError: The future has been completed before; its outcome stays.

        Example:
            >>> fut = torchfut_aio.Future()
            >>> fut.set_result(5)
            >>> fut.wait()
            5
        """
        if type(result) in HOST_ONLY and not self._devices:
            # As nearly always; the same without a call, which a thread that completes many feels.
            outcome = _core.Outcome()
            outcome.value = result
        else:
            outcome = _core.outcome_of_value(result, self._devices)
        _core.complete(self, outcome)

    def set_exception(self, result: BaseException) -> None:  # type: ignore[override]
        """Marks the future completed with an error, wakes all who wait, runs callbacks.

        `wait`, `value` and ``await`` raise this very exception. (All but StopIteration:
        Python turns that into a RuntimeError where it leaves a coroutine.)

        An error that nobody has retrieved when the future goes is logged, to the logger
        ``torchfut_aio.unretrieved``, unless it is a cancellation.

        Args:
            result: The exception, an instance of any ``BaseException``.

        Raises:
            TypeError: ``result`` is not an exception; the future stays pending.
            InvalidStateError: The future has been completed before; its outcome stays.

        Example:
            >>> fut = torchfut_aio.Future()
            >>> fut.set_exception(ValueError("foo"))
            >>> fut.wait()
            Traceback (most recent call last):
            ...
            ValueError: foo
        """
        exception_checked(result, "set_exception")
        _core.complete_with_error(self, result)

    def try_set_result(self, result: T) -> bool:
        """Does what `set_result` does, unless the future is done already.

        For whoever completes what others may cancel or complete.

        Args:
            result: Any object.

        Returns:
            Whether this call completed the future. If not, its outcome stays.

        Example:
            >>> fut = torchfut_aio.Future()
            >>> fut.try_set_result(5), fut.try_set_result(6)
            (True, False)
            >>> fut.value()
            5
        """
        return _core.try_complete_with_value(self, result)

    def try_set_exception(self, result: BaseException) -> bool:
        """Does what `set_exception` does, unless the future is done already.

        Args:
            result: The exception, an instance of any ``BaseException``.

        Returns:
            Whether this call completed the future. If not, its outcome stays.

        Raises:
            TypeError: ``result`` is not an exception; the future stays as it is.

        Example:
            >>> fut = torchfut_aio.Future()
            >>> fut.set_result(5)
            >>> fut.try_set_exception(ValueError("foo"))
            False
        """
        exception_checked(result, "try_set_exception")
        return _core.try_complete_with_error(self, result)

    def cancel(self, msg: object = None) -> bool:
        """Fails the future with `CancelledError`, unless it is done already.

        It cancels this future only. What was to complete it goes on, such as a thread, the
        task of `start_soon`, or the future that this is a child of; it has to complete it with
        `try_set_result` and `try_set_exception`, which do nothing then, and can ask `done`
        whether it need go on. Cancelling a task that awaits a future does not cancel the
        future.

        Args:
            msg: What the error says, if not None.

        Returns:
            Whether this call completed the future.

        Example:
            >>> fut = torchfut_aio.Future()
            >>> fut.cancel(), fut.cancel()
            (True, False)
            >>> fut.done(), fut.cancelled(), fut.try_set_result("too late")
            (True, True, False)
        """
        error = AsyncioCancelledError() if msg is None else AsyncioCancelledError(msg)
        return _core.try_complete_with_error(self, error)

    def done(self) -> bool:
        """Returns whether the future has a result or an error.

        For a value on an accelerator this may be True while the kernels that fill it
        still run; `wait` orders streams after these, and ``await`` waits for them.
        """
        return OUTCOME in self._state

    def cancelled(self) -> bool:
        """Returns whether the future failed because it, or what it stands for, was cancelled.

        That is: with a `CancelledError`, or another of asyncio or of concurrent.futures.
        """
        return _core.is_cancelled(self)

    def has_waiters(self) -> bool:
        """Returns whether the future is pending and somebody waits for it now.

        That is: whether a task awaits it, a thread blocks in `wait`, or a callback is attached,
        be that of a child of `then`, of `gather` and the like, or of a copy for another library.
        What PyTorch's C++ has attached itself does not count.

        A worker may ask this to give up what nobody wants any more. But nobody waits yet, either,
        between the moment that the future is handed out and that in which it is first awaited: so
        take False for an answer only where you know that somebody has waited before. Who wants
        to be sure cancels the future instead; see `cancel`.

        Example:
            >>> fut = torchfut_aio.Future()
            >>> fut.has_waiters()
            False
            >>> child = fut.then(lambda fut: fut.value() + 1)
            >>> fut.has_waiters()
            True
        """
        return _core.is_followed(self)


def _stand_in(error: BaseException, find: Callable[[], BaseException]) -> object:
    """Return what C++ gets in the place of an error; the first failure imports what makes it."""
    try:
        from ._rpc_errors import StandIn
    except ImportError:  # the interpreter exits, or this is a signal handler within that import
        return None
    return StandIn.of(error, find)


_core.install_stand_in(_stand_in)

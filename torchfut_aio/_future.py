"""The future. What its methods rely on is in ``_core/``."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch

from . import _core, _loops
from ._absent import Absent
from ._annotations import FutureAlias
from ._arguments import callback_checked, devices_checked, exception_checked, timeout_checked
from ._core import OUTCOME
from ._errors import (
    WAIT_BLOCKS,
    AsyncioCancelledError,
    InvalidStateError,
    warn_that_wait_blocks_a_loop,
)
from ._extension import speedup
from ._repr import short
from ._to_stdlib import copy_to_asyncio, copy_to_concurrent

T = TypeVar("T")
S = TypeVar("S")


class Future(torch.futures.Future[T]):
    """A ``torch.futures.Future`` that can be awaited.

    It keeps every documented promise of ``torch.futures.Future``, can be passed wherever
    PyTorch takes one, and may be awaited by any number of tasks on asyncio, uvloop and
    trio loops in any number of threads, while other threads block in `wait` and
    callbacks are attached. All methods may be called from any thread.

    Awaiting resumes with the value, or raises the error, once the future is done *and*
    the kernels that fill the value have finished: reading it does not block the loop. If
    one of these has failed, it raises the device's error, a RuntimeError.
    `stream_ordered` waits for no kernel. Cancelling a task that awaits leaves the future
    as it was.

    Args:
        devices: The devices on which tensors in the value may reside, each as a
            ``torch.device``, a string or an index. A value on another device is an error. Child
            futures made by `then` inherit the devices. If None, the value is searched for tensors
            of the accelerator when the future is completed, and streams are synchronised all the
            same. The search looks into containers that torch's pytree knows, dataclasses, and the
            attributes of plain objects, but never into a module. It ends after a thousand parts.
            A value with more parts is ready when all kernels have finished that are enqueued on
            the current streams.

    Example:
        >>> import asyncio, threading
        >>> async def main():
        ...     fut = torchfut_aio.Future()
        ...     threading.Thread(target=fut.set_result, args=(42,)).start()
        ...     return await fut
        >>> asyncio.run(main())
        42
    """

    __slots__ = ("_devices", "_state")

    _devices: tuple[torch.device, ...]
    _state: dict[Any, Any]  # see the rules in _core/_completion.py
    _is_dependent = False  # in subclasses: whether to call `check` before a wait; see _dependent.py

    def __init__(self, *, devices: Iterable[int | str | torch.device] | None = None) -> None:
        """Make a pending future."""
        self._devices = () if devices is None else devices_checked(devices)
        _core.init_in_torch(self, self._devices)
        self._state = {}

    if not TYPE_CHECKING:

        def __class_getitem__(cls, item: Any) -> Any:
            # See _annotations.py.
            alias = super().__class_getitem__(item)
            return FutureAlias(cls, alias.__args__) if cls is Future else alias

    # ------------------------------------------------------------------ completing

    @speedup
    def set_result(self, result: T) -> None:
        """Complete the future with ``result``: wake its waiters and run its callbacks.

        Callbacks run in the calling thread before this returns, except those of chains
        nested deeper than 32 completions: the outermost completion runs these.

        Kernels may still write to tensors in the result, if they were enqueued on the streams that
        are current now.

        Raises:
            InvalidStateError: The future has been completed before; its outcome stays.

        Example:
            >>> fut = torchfut_aio.Future()
            >>> fut.set_result(5)
            >>> fut.wait()
            5
        """
        if not _core.try_complete_with_value(self, result):
            _core.refuse_second(self)

    def set_exception(self, result: BaseException) -> None:  # type: ignore[override]
        """Complete the future with an error: wake its waiters and run its callbacks.

        `wait`, `value` and ``await`` raise this very exception. (All but StopIteration:
        Python turns that into a RuntimeError where it leaves a coroutine.)

        An error that was never retrieved is logged when the future is garbage-collected, to the
        logger ``torchfut_aio.unretrieved``, unless it is a cancellation.

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
        if not _core.try_complete_with_error(self, result):
            _core.refuse_second(self)

    def try_set_result(self, result: T) -> bool:
        """Complete the future with ``result``, unless it is done.

        For futures that other code may cancel or complete.

        Returns:
            True if this call completed the future. If not, its outcome stays.

        Example:
            >>> fut = torchfut_aio.Future()
            >>> fut.try_set_result(5), fut.try_set_result(6)
            (True, False)
            >>> fut.value()
            5
        """
        return _core.try_complete_with_value(self, result)

    def try_set_exception(self, result: BaseException) -> bool:
        """Complete the future with an error, unless it is done; see `try_set_result`.

        Raises:
            TypeError: ``result`` is not an exception; the future stays as it is.
        """
        exception_checked(result, "try_set_exception")
        return _core.try_complete_with_error(self, result)

    def cancel(self, msg: object = None) -> bool:
        """Complete the future with a `CancelledError`, unless it is done.

        This cancels the future only. The thread, the task of `start_soon` or the parent future
        that should have completed it continues. It should complete the future by `try_set_result`
        or `try_set_exception`, which do nothing on a cancelled one, and can check `done` to stop
        early. Cancelling a task that awaits the future does not cancel the future.

        Args:
            msg: What the error says, if not None.

        Returns:
            True if this call completed the future.

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
        """Return True if the future has a result or an error.

        For a value on an accelerator this may be True while the kernels that fill it
        still run; `wait` orders streams after these, and ``await`` waits for them.
        """
        return OUTCOME in self._state

    def cancelled(self) -> bool:
        """Return True if the future was cancelled, or failed because its source was cancelled.

        That is, if its error is a `CancelledError` of this package, asyncio or
        concurrent.futures.
        """
        return _core.is_cancelled(self)

    def has_waiters(self) -> bool:
        """Return True if the future is pending and something waits for it now.

        Tasks that await it count, threads in `wait`, and attached callbacks. These include the
        callbacks of a child of `then`, of `gather`, and of a copy for another library, but not
        those that PyTorch's C++ has attached.

        A worker may check this to skip abandoned work. But it is also False between the creation
        of the future and the first ``await``, so False means abandoned only after something has
        waited. To be sure, cancel the future; see `cancel`.

        Example:
            >>> fut = torchfut_aio.Future()
            >>> fut.has_waiters()
            False
            >>> child = fut.then(lambda fut: fut.value() + 1)
            >>> fut.has_waiters()
            True
        """
        return _core.has_waiters(self)

    # --------------------------------------------------------------------- reading

    def value(self) -> T:
        """Return the value of a future that is done, without synchronising streams.

        Kernels may still fill its tensors, unless this thread has waited for the future, got it
        from `as_completed`, or runs its callback.

        Raises:
            InvalidStateError: The future is pending.
            BaseException: The error that the future was completed with.
        """
        outcome: _core.Outcome | None = self._state.get(OUTCOME)
        if outcome is None:
            raise InvalidStateError(
                f"the value of {self!r} was read while it is pending; wait() or await it first"
            )
        try:
            value: T = outcome.read()
            return value
        finally:
            del self, outcome  # as in Outcome.read()

    def exception(self) -> BaseException | None:
        """Return the error that the future was completed with, or None if it has a value.

        Unlike that of asyncio, it returns a `CancelledError`, and does not raise it. Unlike that of
        concurrent.futures, it never blocks.

        Raises:
            InvalidStateError: The future is pending.
        """
        outcome: _core.Outcome | None = self._state.get(OUTCOME)
        if outcome is None:
            raise InvalidStateError(
                f"the exception of {self!r} was read while it is pending; wait() or await it first"
            )
        return outcome.exception()

    def wait(self, timeout: float | None = None) -> T:
        """Block the calling thread until the future is done, and return its value.

        If the value holds tensors on an accelerator, the current streams are ordered
        after the kernels that fill them. That does not block: work enqueued on these
        streams from here on runs after the kernels, which may still be running.

        Ctrl-C interrupts it, on the main thread. A wait that times out or is
        interrupted leaves the future as it was, without a waiter.

        Args:
            timeout: The longest time to wait, in seconds. None sets no limit. With 0 or less, do
                not wait.

        Raises:
            TimeoutError: The future was not done in time. It stays pending.
            TypeError, ValueError: ``timeout`` is not a number, or is NaN.
            BaseException: The error that the future was completed with.

        Warns:
            BlockingWaitWarning: The future is pending and this thread runs an event
                loop, which the wait blocks.
        """
        if timeout is not None:
            timeout = timeout_checked(timeout)
        outcome = self._state.get(OUTCOME) or self._block(timeout)
        try:
            if outcome.readiness is not None and outcome.error is None:
                outcome.readiness.wait()
            value: T = outcome.read()
            return value
        finally:
            del self, outcome  # as in Outcome.read()

    def _block(
        self,
        timeout: float | None,
        warning: str = WAIT_BLOCKS,
        waker: _loops.Waker = _loops.THREADS,
    ) -> _core.Outcome:
        # Callbacks that this thread has deferred may be the ones to complete the future.
        _core.run_deferred()
        state = self._state
        outcome: _core.Outcome | None = state.get(OUTCOME)
        if outcome is not None:
            return outcome
        if self._is_dependent:
            self.check(blocks=timeout is None)  # type: ignore[attr-defined]
        if (timeout is None or timeout > 0) and _loops.loop_in_this_thread():
            warn_that_wait_blocks_a_loop(warning)
        waiter = _loops.ThreadWaiter()
        try:
            state[waiter] = waker
            if OUTCOME not in state:
                waiter.block(timeout)
        finally:
            try:  # noqa: SIM105  a call could be interrupted before it begins; a statement cannot
                del state[waiter]
            except KeyError:
                pass  # the completion has removed it
        if OUTCOME not in state:
            raise TimeoutError(f"{self!r} was not done within {timeout:g} s; it stays pending")
        return state[OUTCOME]  # type: ignore[no-any-return]

    # -------------------------------------------------------------------- awaiting

    @speedup
    def __await__(self, _ready: bool = True) -> Generator[Any, Any, T]:
        """Suspend the current task until the value is there, and return it.

        If ``_ready``, wait until the kernels that fill it have finished.
        """
        loop = _loops.running() or _loops.current()
        state = self._state
        if OUTCOME in state:
            yield from loop.checkpoint()
        else:
            if self._is_dependent:
                self.check()  # type: ignore[attr-defined]
            waiter = loop.waiter()
            try:
                # The waiter is stored before the check for the outcome: rule 3 of _core.
                state[waiter] = loop
                if OUTCOME not in state:
                    yield from waiter
                else:
                    state.pop(waiter, None)
                    yield from loop.checkpoint()
            except BaseException:
                try:  # noqa: SIM105  as in _block()
                    del state[waiter]
                except KeyError:
                    pass
                raise
        outcome = state[OUTCOME]
        if outcome.error is None:
            if outcome.readiness is not None:
                if _ready:
                    yield from outcome.readiness.ready()
                outcome.readiness.wait()
            return outcome.value  # type: ignore[no-any-return]
        try:
            return outcome.read()  # type: ignore[no-any-return]
        finally:
            del self, state, outcome  # as in Outcome.read()

    async def stream_ordered(self) -> T:
        """Wait until the future is done, and order streams as `wait` does.

        The kernels that fill the value may still run then. Work that is enqueued on the current
        streams from here on, until the task awaits something else, runs after them. Reading the
        value on the host blocks until they have finished.

        Raises:
            BaseException: The error that the future was completed with.

        Example:
            >>> import asyncio, torch
            >>> async def main(fut):
            ...     return await fut.stream_ordered() * 2
            >>> fut = torchfut_aio.Future()
            >>> fut.set_result(torch.ones(2))
            >>> asyncio.run(main(fut))
            tensor([2., 2.])
        """
        try:
            value: T = await _StreamOrdered(self)
            return value
        finally:
            del self  # as in Outcome.read()

    def as_asyncio(self) -> asyncio.Future[T]:
        """Return an ``asyncio.Future`` of the running loop that completes as this one.

        For code that needs one, such as ``asyncio.wait``, or ``asyncio.wait_for`` with a timeout
        of 0. Cancelling it leaves this future as it was. A copy that is cancelled, or is no longer
        referenced or awaited, leaves nothing in this future. (``asyncio.shield`` is not needed:
        cancelling a task that awaits this future itself does not cancel the future.)

        Raises:
            RuntimeError: No asyncio loop runs in this thread.

        Example:
            >>> import asyncio
            >>> async def main():
            ...     fut = torchfut_aio.Future()
            ...     fut.set_result(5)
            ...     done, pending = await asyncio.wait([fut.as_asyncio()])
            ...     return done.pop().result()
            >>> asyncio.run(main())
            5
        """
        if self._is_dependent:
            self.check()  # type: ignore[attr-defined]
        return copy_to_asyncio(self)

    def as_concurrent(self) -> concurrent.futures.Future[T]:
        """Return a ``concurrent.futures.Future`` that completes as this one.

        For ``concurrent.futures.wait``, executors, and frameworks that need one. It completes once
        the kernels that fill the value have finished: any thread may read it then, on any stream. A
        thread that enqueues kernels on the value keeps it until they are done, or calls
        ``tensor.record_stream``. Its callbacks must not block: they run in the thread that
        completes this future or, after kernels, in the thread of this package that watches them.
        Cancelling it leaves this future as it was, without a callback; so cancel a copy that you
        no longer need.

        Example:
            >>> import concurrent.futures
            >>> fut = torchfut_aio.Future()
            >>> fut.set_result(5)
            >>> done, pending = concurrent.futures.wait([fut.as_concurrent()])
            >>> done.pop().result()
            5
        """
        return copy_to_concurrent(self)

    # ------------------------------------------------------------------- callbacks

    def add_done_callback(self, callback: Callable[[Future[T]], object]) -> None:
        """Run ``callback(self)`` when the future completes, or now if it is done.

        Callbacks run in the thread that completes the future, in the order in which
        they were added, each in a copy of the context (``contextvars``) in which it was
        added. If the future has devices, or its value is on an accelerator, dedicated streams of
        high priority are current while a callback runs, synchronised with the kernels that fill
        the value. An exception of a callback is logged, to the logger ``torchfut_aio``, and affects
        neither the future nor other callbacks. KeyboardInterrupt and SystemExit propagate to the
        caller of `set_result`, after the other callbacks have run.

        Raises:
            TypeError: ``callback`` is not callable.

        Example:
            >>> fut = torchfut_aio.Future()
            >>> fut.add_done_callback(lambda fut: print(fut.value()))
            >>> fut.set_result(5)
            5
        """
        callback_checked(callback)
        _core.add_callback(self, _core.FunctionCallback(callback))

    def then(self, callback: Callable[[Future[T]], S]) -> Future[S]:
        """Return a child future of what ``callback(self)`` returns.

        The callback runs as one given to `add_done_callback` does, context and streams included.
        A child has the devices of this future, and also its class, unless that has a different
        constructor. Chains may have any length.

        Kernels may still fill what the callback returns, on the streams that are current when it
        has returned. A ``with stream:`` around ``return`` has ended by then: let the stream
        outside wait for that one, by ``torch.cuda.current_stream().wait_stream(stream)``.

        Returns:
            A future that completes when the callback has finished. If the callback
            raises, it fails with a `CallbackError`; cancellation, KeyboardInterrupt
            and SystemExit are passed on as they are.

        Raises:
            TypeError: ``callback`` is not callable.

        Example:
            >>> fut = torchfut_aio.Future()
            >>> child = fut.then(lambda fut: fut.value() + 1)
            >>> fut.set_result(5)
            >>> child.wait()
            6
        """
        # A subclass with its own constructor may need arguments that are unknown here.
        kind = type(self) if type(self).__init__ is Future.__init__ else Future
        return chain(self, callback, kind(devices=self._devices))

    def remove_done_callback(self, callback: Callable[[Future[T]], object]) -> int:
        """Remove every attached ``callback`` that has not run yet.

        Args:
            callback: The function that was passed to `add_done_callback`, compared with ``==``.

        Returns:
            How many were removed; 0 once the future is done.
        """
        attached = [
            each
            for each in _core.callbacks_of(self)
            if isinstance(each, _core.FunctionCallback) and each.function == callback
        ]
        return sum(_core.remove(self, each) for each in attached)

    # --------------------------------------------------------------------- the rest

    if not TYPE_CHECKING:  # type checkers find none of these
        result = Absent(
            "a Future has no result(), which returns at once in asyncio and blocks in "
            "concurrent.futures: await the future, or call wait(timeout) to block, or value() if "
            "it is done"
        )
        get_loop = Absent("a Future has no get_loop(): it belongs to no loop; await it on any loop")
        running = Absent(
            "a Future has no running(): it does not know what will complete it; done() and "
            "has_waiters() describe it"
        )
        set_running_or_notify_cancel = Absent(
            "a Future has no set_running_or_notify_cancel(): check done() before the work, and "
            "call try_set_result() or try_set_exception(), which do nothing if it was cancelled"
        )
        _condition = Absent(
            "wait() and as_completed() of concurrent.futures take futures of that module only: "
            "pass fut.as_concurrent() to them, or use those of torchfut_aio, as_completed() and "
            "wait_all()"
        )

    def __repr__(self) -> str:
        outcome: _core.Outcome | None = self._state.get(OUTCOME)
        if outcome is None:
            waiters, callbacks = _core.waiters_of(self), _core.callbacks_of(self)
            state = f"pending waiters={len(waiters)} callbacks={len(callbacks)}"
        elif outcome.error is not None:
            state = f"done error={short(outcome.error)}"
        else:
            state = f"done result={short(outcome.value)}"
        devices = f" devices=[{', '.join(map(str, self._devices))}]" if self._devices else ""
        return f"<{type(self).__qualname__} {state}{devices}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise RuntimeError(
            "Can not pickle torch.futures.Future: its completion belongs to this process; "
            "send its value instead"
        )


class InternalFuture(Future[T]):
    """A future that never leaves the package, so `debug.pending_futures` does not list it."""

    __slots__ = ()

    def block(self, timeout: float | None, warning: str) -> None:
        """Wait as `wait` does, with a `BlockingWaitWarning` of another text; ignore the outcome."""
        if not self.done():
            self._block(timeout, warning)


def chain(future: Future[T], callback: Callable[[Future[T]], S], child: Future[S]) -> Future[S]:
    callback_checked(callback)
    _core.add_callback(future, _core.ThenCallback(callback, child))
    return child


class _StreamOrdered:
    """Awaits a future as `Future.stream_ordered` does."""

    __slots__ = ("_future",)

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._future.__await__(_ready=False)

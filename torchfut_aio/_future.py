"""The future: the methods of those who wait. What they rely on is in ``_core/``.

Those of whoever completes it are in ``_settable.py``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch

from . import _core, _loops
from ._annotations import FutureAlias
from ._arguments import callback_checked, devices_checked, timeout_checked
from ._core import OUTCOME
from ._errors import WAIT_BLOCKS, InvalidStateError, warn_that_wait_blocks_a_loop
from ._repr import short
from ._settable import Settable
from ._to_stdlib import copy_to_asyncio, copy_to_concurrent

T = TypeVar("T")
S = TypeVar("S")


class _Absent:
    """An attribute that other futures have; to ask for it says what to use instead."""

    def __init__(self, cure: str) -> None:
        self._cure = cure

    def __get__(self, future: object, kind: object) -> NoReturn:
        raise AttributeError(self._cure)


class Future(Settable[T]):
    """A ``torch.futures.Future`` that can be awaited.

    It keeps every documented promise of ``torch.futures.Future``, goes wherever
    PyTorch takes one, and may be awaited by any number of tasks on asyncio, uvloop and
    trio loops in any number of threads, while other threads block in `wait` and
    callbacks are attached. All methods may be called from any thread.

    Awaiting resumes with the value, or raises the error, once the future is done *and*
    the kernels that fill the value have finished: reading it does not block the loop. If
    one of these has failed, it raises the device's error, a RuntimeError.
    `stream_ordered` waits for no kernel. Cancelling a task that awaits leaves the future
    as it was.

    Args:
        devices: The devices on which tensors in the value may reside, as
            ``torch.device`` with an index, string or index; a value on any other is an error. Child
            futures made by `then` inherit them. If None, the value is searched for
            tensors of the accelerator when the future is completed, and streams are
            synchronised all the same. Tensors are found in containers that torch's pytree
            knows, in dataclasses, and in the attributes of plain objects, but never in a
            module. A value of more than a thousand parts is not searched to the end, and
            counts as one that the kernels fill that are enqueued on the current streams.

    Example:
        >>> import asyncio, threading
        >>> async def main():
        ...     fut = torchfut_aio.Future()
        ...     threading.Thread(target=fut.set_result, args=(42,)).start()
        ...     return await fut
        >>> asyncio.run(main())
        42
    """

    __slots__ = ()

    def __init__(self, *, devices: Iterable[int | str | torch.device] | None = None) -> None:
        """Makes a pending future."""
        self._devices = () if devices is None else devices_checked(devices)
        _core.init_in_torch(self, self._devices)
        self._state = {}

    if not TYPE_CHECKING:

        def __class_getitem__(cls, item: Any) -> Any:
            # See _annotations.py, which is for this class alone.
            alias = super().__class_getitem__(item)
            return FutureAlias(cls, alias.__args__) if cls is Future else alias

    # --------------------------------------------------------------------- reading

    def value(self) -> T:
        """Returns the value of a future that is done, without synchronising streams.

        So tensors on an accelerator may still be being filled, unless this thread has waited for
        the future, or got it from `as_completed`, or is in its callback.

        Returns:
            The value held by this future.

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
        """Returns the error that the future was completed with, or None if it has a value.

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
        """Blocks the calling thread until the future is done, and returns its value.

        If the value holds tensors on an accelerator, the current streams are ordered
        after the kernels that fill them. That does not block: work enqueued on these
        streams from here on runs after the kernels, which may still be running.

        Ctrl-C interrupts it, on the main thread. A wait that times out or is
        interrupted leaves the future as it was, and nothing behind.

        Args:
            timeout: How long to wait at most, in seconds; None waits for ever, and a
                number that is not positive does not wait.

        Returns:
            The value held by this future.

        Raises:
            TimeoutError: The future was not done in time. It stays pending.
            TypeError, ValueError: ``timeout`` is not a number, or is NaN.
            BaseException: The error that the future was completed with.

        Warns:
            BlockingWaitWarning: The future is pending and this thread runs an event
                loop, which stands still meanwhile.
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

    def _block(self, timeout: float | None, warning: str = WAIT_BLOCKS) -> _core.Outcome:
        # Callbacks that this thread has put off may be the ones to complete the future.
        _core.run_deferred()
        outcome: _core.Outcome | None = self._state.get(OUTCOME)
        if outcome is not None:
            return outcome
        if (timeout is None or timeout > 0) and _loops.loop_in_this_thread():
            warn_that_wait_blocks_a_loop(warning)
        waiter = _loops.ThreadWaiter()
        try:
            if _core.add_waiter(self, waiter, _loops.THREADS):
                waiter.block(timeout)
        finally:
            try:  # noqa: SIM105  a call could be interrupted before it begins; a statement cannot
                del self._state[waiter]
            except KeyError:
                pass  # it has been woken
        outcome = _core.outcome_of(self)
        if outcome is None:
            raise TimeoutError(f"{self!r} was not done within {timeout:g} s; it stays pending")
        return outcome

    # -------------------------------------------------------------------- awaiting

    def __await__(self, _ready: bool = True) -> Generator[Any, Any, T]:
        """Suspends the current task until the value is there, and gives it.

        If ``_ready``, until the kernels that fill it have finished, too.
        """
        loop = _loops.current()
        outcome: _core.Outcome | None = self._state.get(OUTCOME)
        if outcome is None:
            waiter = loop.waiter()
            try:
                if _core.add_waiter(self, waiter, loop):
                    yield from waiter
                else:
                    yield from loop.checkpoint()
            except BaseException:
                try:  # noqa: SIM105  as in _block()
                    del self._state[waiter]
                except KeyError:
                    pass
                raise
            outcome = self._state[OUTCOME]  # or nobody would have woken this task
        else:
            yield from loop.checkpoint()
        readiness = outcome.readiness
        if outcome.error is None:
            if readiness is not None:
                if _ready:
                    yield from readiness.ready()
                readiness.wait()
            value: T = outcome.value
            return value
        try:
            value = outcome.read()
            return value
        finally:
            del self, outcome  # as in Outcome.read()

    async def stream_ordered(self) -> T:
        """Waits until the future is done, and orders streams as `wait` does; for ``await``.

        The kernels that fill the value may still be running then. What is enqueued on the
        current streams from here on, until the task awaits something else, runs after
        them. Reading the value on the host blocks until they have finished.

        Returns:
            The value held by this future.

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
        """Returns an ``asyncio.Future`` of the running loop that completes as this one.

        For what insists on one, such as ``asyncio.wait``, or ``asyncio.wait_for`` with a time
        of 0. Cancelling it leaves this future as it was. A copy that was cancelled, or that
        nobody refers to or waits for, leaves nothing behind. (``asyncio.shield`` is not needed:
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
        return copy_to_asyncio(self)

    def as_concurrent(self) -> concurrent.futures.Future[T]:
        """Returns a ``concurrent.futures.Future`` that completes as this one.

        For ``concurrent.futures.wait``, executors, and frameworks that insist on one. It
        completes once the kernels that fill the value have finished, as threads may read it
        then whatever streams they use. A thread that enqueues kernels on it keeps it until they
        are done, or calls ``tensor.record_stream``. Its callbacks run in the thread that completes
        this future, or, after kernels, in one of this package that watches them: they must not
        block. Cancelling it leaves this future as it was, and nothing behind; so cancel it when
        you lose interest.

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
        """Runs ``callback(self)`` when the future completes; inline now, if it is done.

        Callbacks run in the thread that completes the future, in the order in which
        they were added, each in a copy of the context (``contextvars``) in which it was
        added. If the future has devices, or its value is on an accelerator, dedicated streams of
        high priority are current while a callback runs, synchronised with the kernels that fill
        the value. What
        a callback raises is logged, to the logger ``torchfut_aio``, and touches neither
        the future nor other callbacks; KeyboardInterrupt and SystemExit go on to the
        caller of `set_result`, after the other callbacks have run.

        Args:
            callback: Called with this future as its only argument.

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
        """Returns a child future of what ``callback(self)`` returns.

        The callback runs as one given to `add_done_callback` does, context and streams included.
        A child has the devices of this future, and its class too, unless that has a
        constructor of its own. Chains may have any length.

        Kernels may still fill what the callback returns, on the streams that are current when it
        has returned. A ``with stream:`` around ``return`` has ended by then: let the stream
        outside wait for that one, by ``torch.cuda.current_stream().wait_stream(stream)``.

        Args:
            callback: Called with this future as its only argument.

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
        # A class with a constructor of its own may need what only its users know.
        kind = type(self) if type(self).__init__ is Future.__init__ else Future
        return chain(self, callback, kind(devices=self._devices))

    def remove_done_callback(self, callback: Callable[[Future[T]], object]) -> int:
        """Removes every attached ``callback`` that has not run yet.

        Args:
            callback: What was passed to `add_done_callback`, compared with ``==``.

        Returns:
            How many were removed; 0 once the future is done.
        """
        removed = 0
        for attached in _core.followers(self)[1]:
            if attached.is_for(callback) and _core.remove(self, attached):
                removed += 1
        return removed

    # --------------------------------------------------------------------- the rest

    if not TYPE_CHECKING:  # a type checker is to find none of these
        result = _Absent(
            "a Future has no result(), which returns at once in asyncio and blocks in "
            "concurrent.futures: await the future, or call wait(timeout) to block, or value() if "
            "it is done"
        )
        _condition = _Absent(
            "wait() and as_completed() of concurrent.futures take futures of that module only: "
            "pass fut.as_concurrent() to them, or use those of torchfut_aio, as_completed() and "
            "wait_all()"
        )

    def __repr__(self) -> str:
        outcome: _core.Outcome | None = self._state.get(OUTCOME)
        if outcome is None:
            waiters, callbacks = _core.followers(self)
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

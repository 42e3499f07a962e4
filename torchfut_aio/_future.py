"""The future: its state, who waits for it, and how it is read.

A future is *pending*, is *claimed* by the one setter that wins, and is *done*. Every
change of state is in this file, and these things are always true:

- ``_open`` exists exactly until a setter claims the future by deleting it. Deleting a
  slot is one indivisible step: of any number of racing setters one succeeds.
- ``_entries`` is a dict until the future is done, and None from then on. The outcome is
  stored before it becomes None and never changes after, so whoever sees None may read.
- Who wants to know of the completion first enters, then looks at ``_entries`` again. If
  the future became done meanwhile, a callback is taken out by exactly one side, the setter
  or the one who entered it, and who takes it out runs it: none is lost, and none run twice.
  A waiter may be woken twice, which does nothing, but not never.
- The first to enter has a place of its own, ``_first``, as most futures see no second: that
  is a quarter of what it takes to complete one. Who deletes ``_vacant`` has it, once and for
  all, and who deletes ``_first`` has taken out who was there.
- No lock is taken, so nothing here can deadlock with a signal handler, a finaliser or
  a C++ callback that uses the same future in the middle of a step: each is as good as
  one more thread.

An entry is a waiter (what a thread blocks on, or stands for a task on its loop), which the
setter wakes; or a callback, which has no ``wake``, and which the setter runs, after all
waiters have been woken. The dict is an ordered set of them.

Underneath is the C++ future that consumers in PyTorch's own C++ see. The setter that
has claimed the future completes it, once. ``_readiness`` is what is known of the kernels
that fill the value, if there may be any: see ``_devices/_readiness.py``.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Generator, Iterable
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch

from . import _callbacks, _devices, _loops
from ._arguments import callback_checked, devices_checked, timeout_checked
from ._callbacks import Callback, Continuation
from ._devices import HOST_ONLY, declared_readiness, found_readiness
from ._errors import (
    InvalidStateError,
    remade,
    type_and_text,
    warn_that_wait_blocks_a_loop,
)
from ._repr import short
from ._rpc_errors import StandIn

__all__ = ["Future"]

T = TypeVar("T")
S = TypeVar("S")

_Cpp = torch._C.Future
_complete_in_cpp = _Cpp.set_result  # looked up once: a class of pybind11's is slow at it

# Who has entered: one who waits, or a callback.
_Entry = _loops.Waiter | _callbacks.Entry

# What an entry that is no longer there is mapped to.
_GONE: Any = object()


class Future(torch.futures.Future[T]):
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
            synchronised all the same.

    Example:
        >>> import asyncio, threading
        >>> async def main():
        ...     fut = torchfut_aio.Future()
        ...     threading.Thread(target=fut.set_result, args=(42,)).start()
        ...     return await fut
        >>> asyncio.run(main())
        42
    """

    __slots__ = (
        "_devices",
        "_entries",
        "_error",
        "_first",
        "_open",
        "_readiness",
        "_traceback",
        "_vacant",
        "_value",
    )

    _open: None
    _vacant: None
    _first: _Entry | None
    _entries: dict[_Entry, None] | None
    _value: T
    _error: BaseException | None
    _traceback: TracebackType | None
    _readiness: _devices.Readiness | None
    _devices: tuple[torch.device, ...]

    def __init__(self, *, devices: Iterable[int | str | torch.device] | None = None) -> None:
        """Makes a pending future."""
        self._devices = () if devices is None else devices_checked(devices)
        # torch.futures.Future.__init__ would only convert the devices once more.
        _Cpp.__init__(self, self._devices)  # type: ignore[arg-type]
        self._entries = {}
        self._open = self._vacant = self._first = None

    # ------------------------------------------------------------------ completing

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
        # All in one function: a thread that completes many futures has its caches emptied at
        # every turn of the GIL, and each further call shows.
        error: BaseException | None = None
        traceback: TracebackType | None = None
        readiness: _devices.Readiness | None = None
        for_cpp: Any = result
        if type(result) not in HOST_ONLY or self._devices:
            result, error, traceback, readiness, for_cpp = _examined(self, result)
        try:
            del self._open
        except AttributeError:
            _refuse_second(self)
        # Claimed, so all of the rest must be done, even if Ctrl-C strikes. It does so at
        # calls and at jumps backward: from claimed to done there is none, and each step
        # from there on is guarded, and can be repeated.
        interrupt: BaseException | None = None
        self._value = result
        self._error = error
        self._traceback = traceback
        self._readiness = readiness
        entries: Any = self._entries
        self._entries = None
        callbacks = False
        try:
            first = self._first
        except AttributeError:
            first = None  # it has been taken out
        try:
            if first is not None:
                if first.wake is None:
                    callbacks = True
                else:
                    first.wake()
                    self._first = None
            # Listing the keys runs no Python code, not even the collector's; and it locks the
            # dict where there is no GIL, so who enters now will see that the future is done.
            for entry in [*entries]:
                if entry.wake is None:
                    callbacks = True
                else:
                    entry.wake()
        except BaseException as struck:
            interrupt, callbacks = struck, True
            self._wake_all(first, entries)
        # After the waiters are awake: callbacks of C++ consumers run in here, with the
        # GIL released around them. They may read this future, and take long.
        try:
            _complete_in_cpp(self, for_cpp) if error is None else _fail_in_cpp(self, for_cpp)
        except BaseException as struck:
            interrupt = struck
            if not _Cpp.done(self):
                _complete_in_cpp(self, for_cpp) if error is None else _fail_in_cpp(self, for_cpp)
        while callbacks:
            try:
                callbacks = False
                _callbacks.run(self, first, entries)
            except BaseException as struck:
                interrupt, callbacks = struck, True
        if interrupt is not None:
            raise interrupt

    def set_exception(self, result: BaseException) -> None:  # type: ignore[override]
        """Marks the future completed with an error, wakes all who wait, runs callbacks.

        `wait`, `value` and ``await`` raise this very exception. (All but StopIteration:
        Python turns that into a RuntimeError where it leaves a coroutine.)

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
        if not isinstance(result, BaseException):
            raise TypeError(
                f"set_exception() takes an exception instance, such as ValueError('...'), "
                f"not {result!r} of type {type(result).__qualname__}"
            )
        failure: Any = _Failure(self, result)
        Future.set_result(self, failure)

    # --------------------------------------------------------------------- reading

    def done(self) -> bool:
        """Returns whether the future has a result or an error.

        For a value on an accelerator this may be True while the kernels that fill it
        still run; `wait` orders streams after these, and ``await`` waits for them.
        """
        return self._entries is None

    def value(self) -> T:
        """Returns the value of a future that is done, without synchronising streams.

        Returns:
            The value held by this future.

        Raises:
            InvalidStateError: The future is pending.
            BaseException: The error that the future was completed with.
        """
        if self._entries is not None:
            raise InvalidStateError(
                f"the value of {self!r} was read while it is pending; wait() or await it first"
            )
        try:
            return self._read()
        finally:
            del self  # as in _read()

    def exception(self) -> BaseException | None:
        """Returns the error that the future was completed with, or None if it has a value.

        Raises:
            InvalidStateError: The future is pending.
        """
        if self._entries is not None:
            raise InvalidStateError(
                f"the exception of {self!r} was read while it is pending; wait() or await it first"
            )
        error = self._error
        return error and error.with_traceback(self._traceback)

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
        if self._entries is not None:
            self._block(timeout)
        self._order_streams()
        try:
            return self._read()
        finally:
            del self  # as in _read()

    def _block(self, timeout: float | None) -> None:
        # Callbacks that this thread has put off may be the ones to complete the future.
        _callbacks.run_deferred()
        entries = self._entries
        if entries is None:
            return
        if (timeout is None or timeout > 0) and _loops.loop_in_this_thread():
            warn_that_wait_blocks_a_loop()
        waiter = _loops.ThreadWaiter()
        try:
            self._enter(waiter, entries)
            if self._entries is not None:
                waiter.block(timeout)
        finally:
            self._take_out(waiter, entries)
        if self._entries is not None:
            raise TimeoutError(f"{self!r} was not done within {timeout:g} s; it stays pending")

    def _order_streams(self) -> None:
        """Orders the current streams after the kernels that fill the value."""
        if self._readiness is not None and self._error is None:
            self._readiness.wait()

    def _read(self) -> T:
        error = self._error
        if error is None:
            return self._value
        try:
            raise error.with_traceback(self._traceback)
        finally:
            # The traceback of the error refers to this frame. Let that not refer to the
            # future, which holds the error, or neither would go without the collector.
            del self, error

    # -------------------------------------------------------------------- awaiting

    def __await__(self, ready: bool = True) -> Generator[Any, Any, T]:
        """Suspends the current task until the value is there, and gives it.

        If ``ready``, until the kernels that fill it have finished, too.
        """
        loop = _loops.current()
        entries = self._entries
        if entries is not None:
            waiter = loop.waiter()
            try:
                self._enter(waiter, entries)
                if self._entries is None:
                    self._take_out(waiter, entries)
                    yield from loop.checkpoint()
                else:
                    yield from waiter
            except BaseException:
                self._take_out(waiter, entries)
                raise
        else:
            yield from loop.checkpoint()
        if self._error is None:
            readiness = self._readiness
            if readiness is not None:
                if ready:
                    yield from readiness.ready()
                readiness.wait()
            return self._value
        try:
            return self._read()
        finally:
            del self  # as in _read()

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
        value: T = await _StreamOrdered(self)
        return value

    def as_asyncio(self) -> asyncio.Future[T]:
        """Returns an ``asyncio.Future`` of the running loop that completes as this one.

        For what insists on one, such as ``asyncio.wait``. Cancelling it leaves this
        future as it was, and nothing behind; so cancel it when you lose interest.

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
        loop = _loops.current_asyncio()
        if loop is None:
            raise RuntimeError(
                "as_asyncio() makes a future of the running asyncio loop, and none runs in "
                "this thread; await the future itself on trio, use wait() in a script"
            )
        target: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        entries = self._entries
        if entries is not None:
            waiter = loop.waiter()
            waiter.future.add_done_callback(lambda _: self._copy_to(target))
            target.add_done_callback(lambda _: self._take_out(waiter, entries))
            self._enter(waiter, entries)
        if self._entries is None:
            self._copy_to(target)
        return target

    def _copy_to(self, target: asyncio.Future[T]) -> None:
        """Completes ``target``, on its loop, once the value is ready or there is an error."""
        readiness = self._readiness
        if target.done():
            return
        if readiness is None or self._error is not None:
            self._copy_ready_to(target, self._error)
            return
        loop = _loops.current_asyncio()  # which may be the host of the trio that runs this task
        assert loop is not None
        withdraw = readiness.notify_when_ready(loop, partial(self._copy_ready_to, target))
        target.add_done_callback(lambda _: withdraw())

    def _copy_ready_to(self, target: asyncio.Future[T], error: BaseException | None) -> None:
        if target.done():
            return
        if error is None:
            self._order_streams()
            target.set_result(self._value)
        elif isinstance(error, asyncio.CancelledError):
            target.cancel(*error.args[:1])
        elif isinstance(error, StopIteration):
            # asyncio cannot carry one; this is what a coroutine that raises it does.
            replacement = RuntimeError("the torchfut_aio future failed with StopIteration")
            replacement.__cause__ = error
            target.set_exception(replacement)
        else:
            own = error is self._error
            target.set_exception(error.with_traceback(self._traceback if own else None))

    # ------------------------------------------------------------------- callbacks

    def add_done_callback(self, callback: Callable[[Future[T]], object]) -> None:
        """Runs ``callback(self)`` when the future completes; inline now, if it is done.

        Callbacks run in the thread that completes the future, in the order in which
        they were added. If the future has devices, dedicated streams are current
        while a callback runs, synchronised with the kernels that fill the value. What
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
        self._add(Callback(callback))

    def then(self, callback: Callable[[Future[T]], S]) -> Future[S]:
        """Returns a child future of what ``callback(self)`` returns.

        The callback runs as one given to `add_done_callback` does, streams included.
        A child has the devices of this future, and its class too, unless that has a
        constructor of its own. Chains may have any length.

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
        callback_checked(callback)
        # A class with a constructor of its own may need what only its users know.
        kind = type(self) if type(self).__init__ is Future.__init__ else Future
        child: Future[Any] = kind(devices=self._devices)
        self._add(Continuation(callback, child))
        return child

    def remove_done_callback(self, callback: Callable[[Future[T]], object]) -> int:
        """Removes every attached ``callback`` that has not run yet.

        Args:
            callback: What was passed to `add_done_callback`, compared with ``==``.

        Returns:
            How many were removed; 0 once the future is done.
        """
        removed = 0
        for entry in self._entered():
            if type(entry) is Callback and entry.run == callback and self._discard(entry):
                removed += 1
        return removed

    def _add(self, callback: _callbacks.Entry) -> None:
        """Has ``callback`` run when the future completes; inline now, if it is done."""
        entries = self._entries
        if entries is not None:
            self._enter(callback, entries)
            if self._entries is not None or not self._take_out(callback, entries):
                return
        _callbacks.run(self, None, {callback: None}, inline=True)

    def _discard(self, callback: _callbacks.Entry) -> bool:
        """Takes ``callback`` back; False if it has been run or is about to be."""
        entries = self._entries
        return entries is not None and self._take_out(callback, entries)

    # -------------------------------------------------------- who is to be told, and how

    def _enter(self, entry: _Entry, entries: dict[_Entry, None]) -> None:
        """Has the setter find ``entry``, if it has not looked yet."""
        if entries:  # which somebody enters only once the first place is taken
            entries[entry] = None
            return
        try:
            del self._vacant
        except AttributeError:
            entries[entry] = None
        else:
            self._first = entry

    def _take_out(self, entry: _Entry, entries: dict[_Entry, None]) -> bool:
        """Takes ``entry`` out; False if somebody else has."""
        try:
            if self._first is entry:
                del self._first
                return True
        except AttributeError:
            pass  # whoever was first has been taken out
        return entries.pop(entry, _GONE) is not _GONE

    def _wake_all(self, first: _Entry | None, entries: dict[_Entry, None]) -> None:
        if first is not None and first.wake is not None:
            first.wake()
            self._first = None
        for entry in [*entries]:
            if entry.wake is not None:
                entry.wake()

    def _entered(self) -> list[_Entry]:
        """Returns who has entered and is to be told yet."""
        first = getattr(self, "_first", None)
        return [*filter(None, [first]), *(self._entries or ())]

    # --------------------------------------------------------------------- the rest

    def __repr__(self) -> str:
        if self._entries is not None:
            entered = self._entered()
            callbacks = sum(entry.wake is None for entry in entered)
            state = f"pending waiters={len(entered) - callbacks} callbacks={callbacks}"
        elif self._error is not None:
            state = f"done error={short(self._error)}"
        else:
            state = f"done result={short(self._value)}"
        devices = f" devices=[{', '.join(map(str, self._devices))}]" if self._devices else ""
        return f"<{type(self).__qualname__} {state}{devices}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise RuntimeError(
            "Can not pickle torch.futures.Future: its completion belongs to this process; "
            "send its value instead"
        )


class _StreamOrdered:
    """Awaits a future as `Future.stream_ordered` does."""

    __slots__ = ("_future",)

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._future.__await__(ready=False)


class Combination:
    """A result made of those of other futures, on its way through ``set_result``.

    It is ready when those of ``parts`` are, and no tensor has to be looked for.
    """

    __slots__ = ("error", "readiness", "result")

    def __init__(self, result: Any, parts: Iterable[Future[Any]]) -> None:
        self.result = result
        self.readiness, self.error = _devices.joint_readiness(part._readiness for part in parts)


class _Failure:
    """An error on its way through ``set_result``, where a result would be."""

    __slots__ = ("error", "stand_in", "traceback", "unwrap")

    def __init__(self, future: Future[Any], error: BaseException) -> None:
        self.error = error
        # A raised exception collects the frames it passes. Every reader starts from
        # the traceback that it came with, so a future read often does not grow.
        self.traceback = error.__traceback__
        # C++ knows an error of Python's as a value that raises when it is unwrapped.
        # The garbage collector does not see what C++ holds, and a traceback often leads
        # back to the future, so C++ gets a stand-in and a weak reference instead.
        find = partial(_error_of, weakref.ref(future), *type_and_text(error))
        self.stand_in = StandIn.of(error, find)
        self.unwrap = partial(_raise_found, find)


def _examined(
    future: Future[Any], result: Any
) -> tuple[Any, BaseException | None, TracebackType | None, _devices.Readiness | None, Any]:
    """Returns the value, the error, its traceback, the readiness, and what C++ is to be told."""
    error: BaseException | None = None
    if type(result) is _Failure:
        readiness = declared_readiness(future._devices, None)[0] if future._devices else None
        return None, result.error, result.traceback, readiness, result
    if type(result) is Combination:
        result, readiness, error = result.result, result.readiness, result.error
    elif future._devices:
        readiness, error = declared_readiness(future._devices, result)
    else:
        readiness, error = found_readiness(result)
    if error is None:
        return result, None, None, readiness, result
    # C++ finds out by itself about values on devices that were not declared.
    return None, error, None, readiness, result if future._devices else _Failure(future, error)


def _fail_in_cpp(future: Future[Any], failure: Any) -> None:
    if type(failure) is not _Failure:  # it is a value that C++ will refuse
        _complete_in_cpp(future, failure)
        return
    try:
        _Cpp._set_unwrap_func(future, failure.unwrap)
    finally:  # even if Ctrl-C strikes
        _complete_in_cpp(future, failure.stand_in)


def _refuse_second(future: Future[Any]) -> NoReturn:
    raise InvalidStateError(
        "Attempting to mark a completed Future as complete again. Note that a Future can "
        f"only be marked completed once: {future!r} keeps its outcome"
    ) from None


def _error_of(ref: weakref.ref[Future[Any]], kind: type[BaseException], text: str) -> BaseException:
    future = ref()
    error = None if future is None else future._error
    if future is None or error is None:
        return remade(kind, text)
    return error.with_traceback(future._traceback)


def _raise_found(find: Callable[[], BaseException], _stand_in: object) -> NoReturn:
    raise find()

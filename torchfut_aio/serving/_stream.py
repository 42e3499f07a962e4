"""A stream of values between threads and tasks; ``_stream_state.py`` has its state."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from .. import _core, _loops
from .._absent import Absent
from .._arguments import exception_checked, listed, size_checked, timeout_checked
from .._devices import Moment
from .._errors import CancelledError, ends_a_task
from .._extension import speedup
from .._process_local import ProcessLocal
from .._waiters import first, give_up_after
from ._stream_state import ROOM, StreamState

T = TypeVar("T")


class ValueStream(ProcessLocal, Generic[T]):
    """A stream of values, such as the tokens that a thread generates for a task.

    Any number of producers put values into it, and any number of consumers read them, in threads
    and in tasks on asyncio, uvloop or trio. Values are read in the order in which they were put,
    each by one consumer. (A ``torch.Stream`` is something else.)

    The producer writes ``with stream:``. The end of the block closes the stream, with the error
    that the block raised, if any. The consumer writes ``with stream.listen() as values:`` and
    iterates over ``values``, with ``for`` in a thread and ``async for`` in a task. Neither block
    ever waits, so tasks write ``with`` as well. A consumer may also iterate over the stream itself,
    or read one value with `get` or `aget`. After the stream was closed, consumers get the values
    that were put before. Then their loops end and `get` raises `StreamClosedError`, or both
    raise the error with which the stream was closed.

    Kernels may still fill tensors in a value. The streams on which these kernels were enqueued
    must be current when the value is put. A task gets the value when the kernels have finished, a
    thread gets it with its current streams ordered after them. Values behind it wait until then.

    Each iterator listens to the stream until its `listen` block ends or it is dropped, for example
    because a loop over the stream is left by ``break`` or its task is cancelled. If the last
    iterator leaves before the end of the stream, or `stop_listening` is called, nothing listens any
    more: values that were not read are dropped, `listening` is False, and `put` and `get` raise
    `StreamClosedError`. To continue to read after a ``break``, stay in the `listen` block. `get`
    does not listen, so it ends nothing for others.

    All methods may be called from any thread, also in signal handlers and finalisers. A
    cancelled or interrupted read loses no value. A put that is interrupted by Ctrl-C may
    have put its value or not. A task that finds a value does not yield to other tasks, as with
    ``asyncio.Queue``.

    A stream belongs to its process: it cannot be pickled or copied. To get values from another
    process, let a thread here read them from a ``multiprocessing.Queue`` and put them here.

    Args:
        max_size: The largest number of values in the stream, put and not yet read. While it is
            full, `put` blocks, `aput` waits and `try_put` returns False. None sets no limit.

    Raises:
        TypeError, ValueError: ``max_size`` is not an integer, or not positive.

    Example:
        >>> import asyncio, threading
        >>> def generate(stream):  # in a thread
        ...     with stream:
        ...         for token in ["Hello", ",", " world"]:
        ...             stream.put(token)
        >>> async def main():
        ...     stream = torchfut_aio.ValueStream(max_size=100)
        ...     threading.Thread(target=generate, args=(stream,)).start()
        ...     with stream.listen() as tokens:
        ...         return [token async for token in tokens]
        >>> asyncio.run(main())
        ['Hello', ',', ' world']
    """

    __slots__ = ("__weakref__", "_max_size", "_state")

    _what = "a ValueStream"
    _cure = (
        "let the other process put its values into a multiprocessing.Queue, from which a thread "
        "of this process puts them; to share the stream here, pass the stream itself"
    )

    if not TYPE_CHECKING:  # names of queues, and of the streams of anyio and trio
        put_nowait = send_nowait = full = Absent(
            "a ValueStream has try_put(value) instead, which returns False if the stream is full"
        )
        get_nowait = receive_nowait = Absent(
            "a ValueStream has get(timeout=0) instead, which raises TimeoutError if there is no "
            "value"
        )
        send = Absent("a ValueStream has `await aput(value)` instead, and put(value) for threads")
        receive = Absent("a ValueStream has `await aget()` instead, and get() for threads")
        qsize = empty = Absent("a ValueStream has a length instead: len(stream)")
        aclose = shutdown = Absent("a ValueStream has close() instead, which never waits")
        join = task_done = Absent(
            "a ValueStream does not know what its readers do with the values: let them complete "
            "a Future"
        )

    def __init__(self, *, max_size: int | None = None) -> None:
        """Make a stream that is open."""
        if max_size is not None:
            max_size = size_checked(max_size, "max_size", "an int or None")
        self._max_size = max_size
        self._state = StreamState(max_size)

    # --------------------------------------------------------------------- putting

    @speedup
    def put(self, value: T, *, timeout: float | None = None) -> None:
        """Put a value into the stream. Block the calling thread while the stream is full.

        Args:
            value: Any object.
            timeout: The longest time to wait for room, in seconds. None waits without limit.

        Raises:
            StreamClosedError: The stream was closed, or nothing listens to it any more.
            TimeoutError: There was no room in time, and the value was not put.
            TypeError, ValueError: ``timeout`` is not a number, or is NaN.

        Warns:
            BlockingWaitWarning: The stream is full and the calling thread runs an event loop,
                which cannot run anything else during the wait.

        Example:
            >>> stream = torchfut_aio.ValueStream()
            >>> stream.put(5)
            >>> stream.close()
            >>> list(stream)
            [5]
        """
        outcome = _core.outcome_of_value(value)
        if timeout is not None:
            timeout = timeout_checked(timeout)
        if not self._state.put(outcome):
            self._put_rest(deque((outcome,)), 1, timeout)

    @speedup
    def put_many(self, values: Sequence[T] | torch.Tensor, *, timeout: float | None = None) -> None:
        """Put values into the stream as `put` does, and wake each loop once for all of them.

        Args:
            values: A sequence, such as a list or a tuple, of any objects; or a tensor, which is
                treated as the sequence of its rows. Rows share the tensor's storage: to free the
                memory of other rows while one is in use, put ``row.clone()``.
            timeout: The longest time to wait for room for all of them, in seconds.

        Raises:
            StreamClosedError: The stream was closed, or nothing listens to it any more. Some of
                the values may have been read.
            TimeoutError: There was no room for all in time. The first of them were put, and the
                error says how many.
            TypeError: ``values`` is anything else, such as a generator, a dict or a string, and
                nothing was put; or ``timeout`` is not a number.
            ValueError: ``timeout`` is NaN.

        Warns:
            BlockingWaitWarning: As for `put`.

        Example:
            >>> stream = torchfut_aio.ValueStream()
            >>> stream.put_many(["a", "b"])
            >>> len(stream)
            2
        """
        if timeout is not None:
            timeout = timeout_checked(timeout)
        moment = Moment()
        pending = deque(
            _core.outcome_of_value(value, (), moment)
            for value in listed(values, "put_many() takes")
        )
        number = len(pending)
        self._state.put_many(pending)
        if pending:
            self._put_rest(pending, number, timeout)

    # A separate function: see tests/test_backward_jumps.py.
    def _put_as_room_comes(
        self, pending: deque[_core.Outcome], number: int, timeout: float | None
    ) -> None:
        state, give_up = self._state, give_up_after(timeout)
        while pending:
            if not state.writers.block(state.can_write, give_up, _PUT_BLOCKS):
                raise TimeoutError(
                    f"the stream had no room within {timeout:g} s: "
                    f"{number - len(pending)} of {number} values were put"
                )
            state.put_many(pending)

    def _put_rest(self, pending: deque[_core.Outcome], number: int, timeout: float | None) -> None:
        state = self._state
        try:
            self._put_as_room_comes(pending, number, timeout)
        except BaseException:
            # This thread may have been woken for room that it does not use, so wake another. An
            # interrupt may come before the call begins: then repeat it.
            try:
                state.hand_on()
            except BaseException:
                state.hand_on()
                raise
            raise

    def try_put(self, value: T) -> bool:
        """Put a value into the stream and return True. Return False if the stream is full.

        Raises:
            StreamClosedError: The stream was closed, or nothing listens to it any more.

        Example:
            >>> stream = torchfut_aio.ValueStream(max_size=1)
            >>> stream.try_put(5), stream.try_put(6)
            (True, False)
        """
        return self._state.put(_core.outcome_of_value(value))

    async def aput(self, value: T) -> None:
        """Put a value into the stream. Wait, without blocking the loop, while the stream is full.

        If it is cancelled, the value was not put.

        Raises:
            StreamClosedError: The stream was closed, or nothing listens to it any more.
        """
        state = self._state
        outcome = _core.outcome_of_value(value)
        try:
            while True:
                if state.put(outcome):
                    return
                await state.writers.wait(state.can_write)
        except BaseException:  # as in _put_rest()
            try:
                state.hand_on()
            except BaseException:
                state.hand_on()
                raise
            raise

    def close(self, error: BaseException | None = None) -> None:
        """Close the stream: it takes no more values. Do nothing if it was closed before.

        Consumers get the values that were put before. Then their loops end and `get` raises
        `StreamClosedError`, or both raise ``error``. When a consumer has raised it and no iterator
        listens, the stream keeps a copy without traceback, cause and context, so that their frames
        can be freed.

        Args:
            error: The error that consumers raise, an instance of any ``BaseException``. A
                StopIteration or StopAsyncIteration would end a loop: they raise a RuntimeError
                instead. A cancellation would end a consumer's own task as cancelled: they raise
                a `CancelledError` instead, which is not asyncio's. ``error`` is its cause.

        Raises:
            TypeError: ``error`` is not an exception; the stream stays open.

        Example:
            >>> stream = torchfut_aio.ValueStream()
            >>> stream.put("first")
            >>> stream.close(ValueError("foo"))
            >>> for value in stream:
            ...     print(value)
            Traceback (most recent call last):
            ...
            ValueError: foo
        """
        if error is None:
            self._state.close(None)
            return
        exception_checked(error, "close")
        if issubclass(type(error), (StopIteration, StopAsyncIteration)):
            replacement = RuntimeError(f"the producer failed with {type(error).__qualname__}")
            replacement.__cause__ = error
            error = replacement
        elif ends_a_task(error):
            cancelled = CancelledError("the producer of the stream was cancelled")
            cancelled.__cause__ = error
            error = cancelled
        self._state.close(_core.outcome_of_error(error))

    def __enter__(self) -> ValueStream[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(error)

    # --------------------------------------------------------------------- reading

    def listen(self) -> _Listener[T]:
        """Return an iterator, for ``for`` and ``async for``, that listens until its block ends.

        The end of the block closes the iterator, also if ``break``, an error or a cancellation
        ended the block. The iterator yields nothing after that. If it was the last that listened,
        and the stream has not been read to its end, then values that were not read are dropped,
        and `put` raises. Several threads and tasks may share one iterator.

        Raises:
            StreamClosedError: Nothing listens to the stream any more.

        Example:
            >>> stream = torchfut_aio.ValueStream()
            >>> stream.put_many(["a", "b", "c"])
            >>> with stream.listen() as values:
            ...     for value in values:
            ...         print(value)
            ...         break
            ...     print(next(values))
            a
            b
            >>> stream.listening
            False
        """
        return _Listener(self)

    def __iter__(self) -> Iterator[T]:
        return _Listener(self)

    def __aiter__(self) -> AsyncIterator[T]:
        return _Listener(self)

    def get(self, *, timeout: float | None = None) -> T:
        """Read one value. Block the calling thread while the stream is empty.

        It does not listen, so it ends nothing for others. If it times out or is interrupted, it
        loses no value.

        Args:
            timeout: The longest time to wait for a value, in seconds. None waits without limit.

        Raises:
            StreamClosedError: The stream was closed without an error and all its values have been
                read, or nothing listens to it any more.
            BaseException: The error with which the stream was closed, when all values that were
                put before have been read.
            TimeoutError: There was no value in time.
            TypeError, ValueError: ``timeout`` is not a number, or is NaN.

        Warns:
            BlockingWaitWarning: The stream is empty and the calling thread runs an event loop,
                which cannot run anything else during the wait.

        Example:
            >>> stream = torchfut_aio.ValueStream()
            >>> stream.put_many(["first", "second"])
            >>> stream.get(), len(stream), stream.listening
            ('first', 1, True)
        """
        if timeout is not None:
            timeout = timeout_checked(timeout)
        # Not `return next(reader)`: CPython checks for signals after the call, and an interrupt
        # there would lose the value. It does not check where a loop takes the next value.
        for value in _Reader(self, timeout):
            return value
        raise self._state.error_of_get()

    async def aget(self) -> T:
        """Read one value. Wait, without blocking the loop, while the stream is empty.

        It does not listen, so it ends nothing for others. If it is cancelled, it loses no value.
        For a timeout, use ``asyncio.timeout`` or ``anyio.fail_after``.

        Raises:
            StreamClosedError, BaseException: As for `get`.

        Example:
            >>> import asyncio
            >>> async def main():
            ...     stream = torchfut_aio.ValueStream()
            ...     with stream:
            ...         await stream.aput("first")
            ...     return await stream.aget()
            >>> asyncio.run(main())
            'first'
        """
        async for value in _Reader(self):  # as in get()
            return value
        raise self._state.error_of_get()

    @property
    def listening(self) -> bool:
        """False if nothing listens any more. True if something listens, or nothing has yet."""
        return self._state.is_listening()

    @property
    def closed(self) -> bool:
        """True if the stream was closed. Values that were put before may still be read."""
        return self._state.is_closed()

    def stop_listening(self) -> None:
        """Close the reading side. Drop the values that were not read.

        Loops that still read end. `put` and `get` raise `StreamClosedError`, also calls that wait.
        """
        self._state.stop()

    def __len__(self) -> int:
        """Return the number of values that were put and not yet read."""
        return len(self._state.values)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        limit = "" if self._max_size is None else f"/{self._max_size}"
        listening = "" if self.listening else ", nothing listens"
        return f"<{type(self).__qualname__} {state} size={len(self)}{limit}{listening}>"


def state_of(stream: ValueStream[Any]) -> StreamState:
    """Return the state of the stream, which its iterators share."""
    return stream._state


class _Reader(AsyncIterator[T], Iterator[T]):
    """Read values in turn with all other readers of the stream, in threads and in tasks."""

    # __next__() and __anext__() share no function that takes a value: an interrupt at its return
    # would lose the value.

    __slots__ = ("_state", "_timeout")

    def __init__(self, stream: ValueStream[T], timeout: float | None = None) -> None:
        self._state = state_of(stream)
        self._timeout = timeout

    def __next__(self) -> T:
        state, timeout = self._state, self._timeout
        give_up = give_up_after(timeout)
        del self  # or a traceback that is kept would keep the listener
        values, taken = state.values, None
        try:
            while True:
                outcome = first(values) if values else None
                if outcome is None:
                    if state.end:
                        state.check_end(StopIteration)
                    elif not state.readers.block(state.can_read, give_up, _READ_BLOCKS):
                        raise TimeoutError(f"the stream had no value within {timeout:g} s")
                    continue
                # Wait *before* taking the value, so that an interrupt of the wait leaves it in
                # place.
                readiness = outcome.readiness
                failure = outcome.error if readiness is None else _wait_in_thread(readiness)
                # The deletion takes the value. CPython checks for no signal from here to `taken`.
                # If an interrupt comes later, in wake(), the handler below puts the value back.
                try:
                    del values[outcome]
                except KeyError:  # another reader has it
                    continue
                taken = outcome
                if state.room is not None:
                    if outcome in state.owed:
                        del state.owed[outcome]
                    else:
                        state.room += ROOM  # not append(), which is a call
                    if state.writers.waiting:
                        state.writers.wake()
                if failure is not None:
                    taken = None  # it was read, and must not be put back
                    outcome.mark_retrieved()
                    raise failure
                value: T = outcome.value
                return value
        except BaseException:
            failure = outcome = None  # or a kept traceback would keep them, as in Outcome.read()
            # As in _put_rest(), with a value.
            try:
                state.end_read(taken)
            except BaseException:
                state.end_read(taken)
                raise
            raise

    @speedup
    async def __anext__(self) -> T:
        state = self._state
        del self  # as in __next__()
        values, taken = state.values, None
        try:
            while True:
                outcome = first(values) if values else None
                if outcome is None:
                    if state.end:
                        state.check_end(StopAsyncIteration)
                        continue
                    # As in Waiters.wait(). Without its calls a read is faster, as
                    # benchmarks/NOTES.md shows.
                    loop = _loops.running() or _loops.current()
                    waiter = loop.waiter()
                    waiting = state.readers.waiting
                    try:
                        waiting[waiter] = loop
                        if len(waiting) > 1:
                            state.readers.line_up(waiter, loop)
                        if not [*values] and not [*state.end]:
                            await waiter
                    finally:
                        waiting.pop(waiter, None)
                        if state.readers.lines:
                            state.readers.leave_line(waiter, loop)
                    continue
                readiness = outcome.readiness
                failure = outcome.error if readiness is None else await _wait_in_task(readiness)
                # As in __next__().
                try:
                    del values[outcome]
                except KeyError:  # another reader has it
                    continue
                taken = outcome
                if state.room is not None:
                    if outcome in state.owed:
                        del state.owed[outcome]
                    else:
                        state.room += ROOM
                    if state.writers.waiting:
                        state.writers.wake()
                if failure is not None:
                    taken = None
                    outcome.mark_retrieved()
                    raise failure
                value: T = outcome.value
                return value
        except BaseException:
            failure = outcome = None  # or a kept traceback would keep them, as in Outcome.read()
            try:
                state.end_read(taken)
            except BaseException:
                state.end_read(taken)
                raise
            raise


class _Listener(_Reader[T], ProcessLocal):
    """An iterator of a stream; it listens until it is dropped or its block ends."""

    __slots__ = ("_key",)

    _what = "an iterator of a ValueStream"
    _cure = "call stream.listen() for another iterator, which reads in turn with this one"

    def __init__(self, stream: ValueStream[T]) -> None:
        state = state_of(stream)
        self._timeout = None
        self._key = object()
        self._state = state
        # *Before* the check: if the last other iterator leaves after it, the stream stays open.
        state.listeners[self._key] = None
        state.check_listening()

    def __enter__(self) -> _Listener[T]:
        return self

    def __exit__(self, *_: object) -> None:
        state: StreamState | None = getattr(self, "_state", None)
        if state is None:  # __init__() was interrupted
            return
        self._state = _ENDED
        try:
            state.leave(self._key)
        except BaseException:
            state.leave(self._key)
            raise

    __del__ = __exit__


_ENDED = StreamState(None)  # for iterators that have left a stream
_ENDED.stop()


_PUT_BLOCKS = (
    "putting into a stream that is full blocks the event loop that this thread runs; "
    "await stream.aput() instead"
)
_READ_BLOCKS = (
    "reading from a stream that is empty blocks the event loop that this thread runs; "
    "use async for, or await stream.aget(), instead"
)


def _wait_in_thread(readiness: Any) -> Exception | None:
    try:
        readiness.wait()
    except Exception as error:
        return error
    return None


@types.coroutine
def _wait_in_task(readiness: Any) -> Generator[Any, Any, Exception | None]:
    try:
        yield from readiness.ready()
        readiness.wait()
    except Exception as error:
        return error
    return None

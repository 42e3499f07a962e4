"""The errors and warnings of this package, and errors of two classes at once.

Code written for ``torch.futures`` catches ``RuntimeError`` around a failed ``then``. New code
catches the class that the callback raised. `callback_error` makes an error for both: a
`CallbackError`, hence a ``RuntimeError``, that is also an instance of the raised class.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import queue
import sys
import warnings
from contextlib import suppress
from traceback import clear_frames
from types import BuiltinFunctionType, GetSetDescriptorType, MemberDescriptorType
from typing import Any, ClassVar, TypeVar

import torch

from ._repr import short

E = TypeVar("E", bound=BaseException)

CANCELLATIONS = (asyncio.CancelledError, concurrent.futures.CancelledError)
"""The errors of a future that was cancelled."""


class InvalidStateError(
    RuntimeError, asyncio.InvalidStateError, concurrent.futures.InvalidStateError
):
    """The outcome of a pending future was read, or a future that is done was completed again.

    It is a ``RuntimeError``, as in ``torch.futures``, and the ``InvalidStateError`` of ``asyncio``
    and of ``concurrent.futures``.
    """


class CancelledError(concurrent.futures.CancelledError):
    """The future was cancelled: by `Future.cancel`, or because its task or source was cancelled.

    It is a ``concurrent.futures.CancelledError``, and so an ``Exception``: a task that does not
    catch it fails, and does not end as cancelled.

    `Future.cancel`, and an adopted future of asyncio that was cancelled, raise the subclass
    ``CancelledError.OfAsyncio``. It is also an ``asyncio.CancelledError``: a task of asyncio that
    does not catch it ends as cancelled.

    Example:
        >>> fut = torchfut_aio.Future()
        >>> fut.cancel("the client has disconnected")
        True
        >>> fut.wait()
        Traceback (most recent call last):
        ...
        torchfut_aio.CancelledError.OfAsyncio: the client has disconnected
    """

    OfAsyncio: ClassVar[type[CancelledError]]


class AsyncioCancelledError(CancelledError, asyncio.CancelledError):
    """A CancelledError that is also asyncio's."""

    __module__, __qualname__ = __package__, "CancelledError.OfAsyncio"


CancelledError.OfAsyncio = AsyncioCancelledError
AsyncioCancelledError.__name__ = CancelledError.__name__  # its repr shows it


def own_cancellation(error: BaseException) -> BaseException:
    """Return a `CancelledError` for one of asyncio or of concurrent.futures; else ``error``.

    If ``error`` is of a subclass, such as a library's, it becomes the cause.
    """
    if isinstance(error, CancelledError) or not isinstance(error, CANCELLATIONS):
        return error
    is_asyncios = isinstance(error, asyncio.CancelledError)
    own = (AsyncioCancelledError if is_asyncios else CancelledError)(*error.args)
    if type(error) in CANCELLATIONS:
        _copy_chain(error, own)
    else:
        own.__cause__ = error
    return own


def ends_a_task(error: BaseException) -> bool:
    """Return True if ``error`` ends a task without failing it, or is a group of such errors only.

    Such an error is a cancellation, or GeneratorExit in a task that nothing will resume.
    """
    trios = getattr(sys.modules.get("trio"), "Cancelled", GeneratorExit)
    return consists_of(error, (asyncio.CancelledError, GeneratorExit, trios))


def consists_of(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    """Return True if ``error`` is of these kinds, or a group of such errors only."""
    if isinstance(error, BaseExceptionGroup):
        return all(consists_of(each, kinds) for each in error.exceptions)
    return isinstance(error, kinds)


class NotAFutureError(TypeError, RuntimeError):
    """The argument is not a future and cannot be adopted as one.

    It is a ``TypeError``, and also the ``RuntimeError`` that ``torch.futures`` raises for None.
    """


class StreamClosedError(RuntimeError):
    """A `ValueStream` takes no more values, or has no more.

    `ValueStream.put` raises it after the stream was closed, and `ValueStream.get` after all values
    of a closed stream were read. If the reading side was closed, both raise it, and a new iterator
    raises it as well.
    """


class BlockingWaitWarning(RuntimeWarning):
    """``wait()`` is about to block a thread that runs an event loop.

    No other task of that loop runs during the wait, not even one that would complete the future.
    ``await`` the future instead.
    """


class TaskStateWarning(RuntimeWarning):
    """A task awaits while torch's state differs from that at `debug.set_task_state_checks`.

    The state belongs to the thread, so all other tasks run with it until this one resumes.
    """


WAIT_BLOCKS = (
    "waiting for a pending future blocks the event loop that this thread runs; "
    "await the future instead (wait_all: await gather(); for: async for)"
)


def warn_that_wait_blocks_a_loop(what: str = WAIT_BLOCKS) -> None:
    """Warn, at the line outside this package that led to the wait."""
    warn_at_users_line(what, BlockingWaitWarning)


def warn_at_users_line(what: str, kind: type[Warning]) -> None:
    """Warn, at the line outside this package that led here."""
    package = __name__.partition(".")[0]
    level, frame = 1, inspect.currentframe()  # None if the interpreter shows no frames
    while frame is not None and frame.f_back is not None:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] != package:
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(what, kind, stacklevel=level)


class CallbackError(RuntimeError):
    """A callback passed to ``then`` raised.

    The child future fails with it. If Python can build such a class, it is also an instance of the
    type that the callback raised, with the same ``args`` and attributes. Its ``__cause__`` is the
    original, with its traceback. A further ``then`` passes it on unchanged.

    Example:
        >>> fut = torchfut_aio.Future()
        >>> fut.set_result("abc")
        >>> try:
        ...     fut.then(lambda fut: int(fut.value())).wait()
        ... except ValueError as error:
        ...     print(isinstance(error, RuntimeError), type(error.__cause__).__name__)
        True ValueError
    """

    def __str__(self) -> str:
        if self.__cause__ is None:
            return super().__str__()
        return f"Got the following error when running the callback: {_describe(self.__cause__)}"

    def __reduce__(self) -> tuple[Any, ...]:
        # A combined class is made at run time and is in no module, so we pickle the original.
        if self.__cause__ is None:
            return RuntimeError.__reduce__(self)  # type: ignore[return-value]
        return CallbackError._of, (self.__cause__,)

    @classmethod
    def _of(cls, error: BaseException) -> BaseException:
        return callback_error(error)


class QueueFullError(RuntimeError, asyncio.QueueFull, queue.Full):
    """The queue of a `Batcher` is full, and takes no more items: a server can answer 503.

    It is also an ``asyncio.QueueFull`` and a ``queue.Full``.
    """


class BatcherClosedError(RuntimeError):
    """A `Batcher` was closed: it takes no more items, or has dropped this one."""


class RpcError(RuntimeError):
    """A remote procedure call failed: the error of a future that `as_future` made of the call.

    If the call has timed out, it is also a TimeoutError. If the connection was lost, for example
    because the callee has died, it is also a ConnectionError. Otherwise, it is also an instance of
    the type that the callee raised. (That type must be an ``Exception``, no ``ExceptionGroup``, and
    importable in this process.) Its text has the remote traceback. It has none of the attributes of
    the remote error.

    PyTorch itself calls functions without ``async_rpc``. If it cannot pickle the type of their
    error, import the type in this process, or construct the error from a text, the caller gets an
    error of another type.

    Example:
        >>> from torchfut_aio import RpcError
        >>> async def ask(call):
        ...     try:
        ...         return await torchfut_aio.as_future(call)
        ...     except KeyError:  # of the function that was called
        ...         return None
        ...     except ConnectionError:  # the callee has died
        ...         raise
    """

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return RpcError._of, (type(self).__bases__[-1], str(self))

    @classmethod
    def _of(cls, kind: Any, text: str) -> RpcError:
        return rpc_error(kind, text)


def rpc_error(kind: Any, text: str) -> RpcError:
    """Return an RpcError, also of class ``kind`` if Python can build such a class."""
    if kind is not None and not hasattr(kind, "subgroup"):  # a group would lack its errors
        with suppress(Exception):
            error: RpcError = _new_without_init(_combined(RpcError, kind), text)
            return error
    return RpcError(text)


def rebuild_exception(kind: type[BaseException], text: str) -> BaseException:
    """Return an error of class ``kind`` with the text, or a RuntimeError if that is impossible."""
    try:
        error: BaseException = _new_without_init(kind, text)
    except Exception:
        return RuntimeError(text)
    return error


def callback_error(error: BaseException) -> BaseException:
    """Return the error of a child future whose callback raised ``error``."""
    if not isinstance(error, Exception):
        return error
    if isinstance(error, (CallbackError, concurrent.futures.CancelledError)):
        return error
    kind: Any = type(error)
    combined: BaseException
    try:
        combined = _copied(error, _combined(CallbackError, kind), *error.args)
    except Exception:
        combined = CallbackError(*error.args)
    object.__setattr__(combined, "__cause__", error)  # its class may be a frozen dataclass
    return combined


def drop_catching_frame(error: E) -> E:
    """Remove from the traceback the frame that caught ``error``.

    That frame refers to the future that will hold the error: the two would be a cycle.
    """
    traceback = error.__traceback__
    traceback = traceback and traceback.tb_next
    if traceback is not None and isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        # The program needs the memory of these frames, however long it keeps the error.
        clear_frames(traceback)
    return error.with_traceback(traceback)


# --------------------------------------------------------------------------------- copies


def one_for_each(error: BaseException, count: int) -> list[BaseException]:
    """Return ``error`` and copies of it, one for each of ``count`` callers.

    To raise an exception changes its traceback and ``__context__``. So one caller would see there
    what another was doing.
    """
    return [error, *(own_copy(error) for _ in range(count - 1))] if count else []


def own_copy(error: E) -> E:
    """Return a copy with the same attributes, cause and notes; ``error`` itself if that fails."""
    # Not copy.copy(), which would call the class with `error.args`. Many classes do not take those.
    try:
        copied: E = _copied(error, type(error), *error.args)
    except Exception:
        return error
    _copy_chain(error, copied)
    return copied


def without_frames(error: BaseException) -> BaseException:
    """Return a copy that keeps no frame: without traceback, cause and context.

    Errors in a group are copied as well.
    """
    args = error.args
    if isinstance(error, BaseExceptionGroup):
        args = error.message, [without_frames(each) for each in error.exceptions]
    try:
        copied: BaseException = _copied(error, type(error), *args)
    except Exception:
        return rebuild_exception(*type_and_text(error))
    return copied


def _copied(error: BaseException, kind: type[BaseException], *args: object) -> Any:
    """Return an error of class ``kind`` with these ``args``, and the attributes of ``error``."""
    copied = _new_without_init(kind, *args)
    for base in type(error).__mro__:
        for name, attribute in [*vars(base).items()]:
            # Attributes that are not in __dict__: slots, and attributes in C, such as errno.
            is_state = isinstance(attribute, (MemberDescriptorType, GetSetDescriptorType))
            if is_state and name != "args" and not name.startswith("__"):
                with suppress(AttributeError, TypeError):  # unset, or read-only
                    value = attribute.__get__(error)
                    # If its second filename is set, even to None, an OSError shows it.
                    if value is not None:
                        attribute.__set__(copied, value)
    copied.__dict__.update(error.__dict__)
    if "__notes__" in copied.__dict__:
        copied.__dict__["__notes__"] = [*error.__notes__]
    return copied


def _copy_chain(error: BaseException, copied: BaseException) -> None:
    # `__suppress_context__` *last*, as setting the cause sets it.
    for name in ("__traceback__", "__context__", "__cause__", "__suppress_context__"):
        object.__setattr__(copied, name, getattr(error, name))


def _new_without_init(kind: Any, *args: object) -> Any:
    """Return an instance of ``kind`` without running any constructor written in Python."""
    # Such a constructor may do anything, and take other arguments than the error has kept. So the
    # nearest base class that is written in C makes the instance.
    base = kind
    while not isinstance(vars(base).get("__new__"), BuiltinFunctionType):
        base = base.__base__
    error = base.__new__(kind, *args)
    object.__setattr__(error, "args", args)  # __new__ may leave them to __init__, as in OSError
    return error


@functools.lru_cache(maxsize=256)
def _combined(base: type[Any], kind: type[Any]) -> type[Any]:
    # Python replaces a StopIteration that leaves a coroutine by a RuntimeError.
    if issubclass(base, kind) or issubclass(kind, (StopIteration, StopAsyncIteration)):
        return base
    name = f"{base.__qualname__}[{kind.__qualname__}]"
    return type(name, (base, kind), {"__module__": base.__module__})


# ---------------------------------------------------------------------------------- texts


def type_and_text(error: BaseException) -> tuple[type[BaseException], str]:
    """Return a class and a text in place of ``error``, to send them."""
    if isinstance(error, CallbackError) and error.__cause__ is not None:
        return type(error.__cause__), str(error)
    if isinstance(error, RpcError):
        return type(error).__bases__[-1], str(error)
    return type(error), _describe(error)


def _describe(error: BaseException) -> str:
    name, args = type(error).__qualname__, error.args
    # Not in the `try`: Python 3.14 makes this a loop there.
    all_plain = all(type(arg) in _PLAIN for arg in args)
    try:
        if all_plain or type(error).__str__ not in _SHOW_ARGS:
            text = str(error)
        else:
            text = short(args[0] if len(args) == 1 else args)
    except Exception:
        text = "<its __str__ raised>"
    return f"{name}: {text}" if text else name


# The methods that call the `repr` or `str` of the arguments, and the types for which that is safe.
_SHOW_ARGS = (BaseException.__str__, KeyError.__str__)
_PLAIN = (str, int, float, bool, type(None))

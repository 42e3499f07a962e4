"""The errors and warnings that this package raises, and errors of two types at once.

Code written for ``torch.futures`` catches ``RuntimeError`` around a failed ``then``; code written
today wants the type that the callback raised. `callback_error` serves both: it makes a
`CallbackError`, hence a ``RuntimeError``, that is also an instance of the callback's own type.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import functools
import inspect
import operator
import queue
import sys
import types
import warnings
from traceback import clear_frames
from typing import Any, ClassVar, TypeVar

import torch

from ._cpython import laid_out_by_c
from ._repr import short

E = TypeVar("E", bound=BaseException)

CANCELLATIONS = (asyncio.CancelledError, concurrent.futures.CancelledError)
"""The errors of a future that was cancelled."""

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


class InvalidStateError(
    RuntimeError, asyncio.InvalidStateError, concurrent.futures.InvalidStateError
):
    """The operation does not fit the future's state.

    The outcome of a pending future was read, or a future that is done was to be completed again.
    It is a ``RuntimeError``, as in ``torch.futures``, and the ``InvalidStateError`` of ``asyncio``
    and of ``concurrent.futures``.
    """


class CancelledError(concurrent.futures.CancelledError):
    """The future was cancelled: by `Future.cancel`, or with the task or future that it stands for.

    It is a ``concurrent.futures.CancelledError``, and so an ``Exception``, which ends nothing but
    what waited for the future.

    That of `Future.cancel`, and of an asyncio future that was adopted, is an
    ``asyncio.CancelledError`` as well: a task of asyncio's that does not catch it ends as
    cancelled. Its class is the subclass ``CancelledError.OfAsyncio``.

    Example:
        >>> fut = torchfut_aio.Future()
        >>> fut.cancel("the client has gone")
        True
        >>> fut.wait()
        Traceback (most recent call last):
        ...
        torchfut_aio.CancelledError.OfAsyncio: the client has gone
    """

    OfAsyncio: ClassVar[type[CancelledError]]


class AsyncioCancelledError(CancelledError, asyncio.CancelledError):
    """A CancelledError that asyncio takes for its own."""

    __module__, __qualname__ = __package__, "CancelledError.OfAsyncio"


CancelledError.OfAsyncio = AsyncioCancelledError
AsyncioCancelledError.__name__ = CancelledError.__name__  # in its repr


def own_cancellation(error: BaseException) -> BaseException:
    """Return a `CancelledError` in the place of one of asyncio or of concurrent.futures.

    One of a subclass, as a library may have, is its cause.
    """
    kind = type(error)
    if issubclass(kind, CancelledError) or not issubclass(kind, CANCELLATIONS):
        return error
    own_kind = AsyncioCancelledError if issubclass(kind, asyncio.CancelledError) else CancelledError
    own = own_kind(*_args.__get__(error))
    if kind in CANCELLATIONS:
        for attribute in _CHAIN:
            attribute.__set__(own, attribute.__get__(error))
    else:
        own.__cause__ = error
    return own


def ends_a_task(error: BaseException) -> bool:
    """Return True if ``error`` ends a task without failing it, or groups nothing but such errors.

    That is a cancellation, or GeneratorExit in a task that nothing will resume.
    """
    trios = getattr(sys.modules.get("trio"), "Cancelled", GeneratorExit)
    return consists_of(error, (asyncio.CancelledError, GeneratorExit, trios))


def consists_of(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    """Return whether ``error`` is of these kinds, or a group of such, as a nursery raises."""
    if issubclass(type(error), BaseExceptionGroup):
        return all(consists_of(each, kinds) for each in error.exceptions)  # type: ignore[attr-defined]
    return issubclass(type(error), kinds)


class NotAFutureError(TypeError, RuntimeError):
    """Something was passed as a future that is none, and cannot be adopted as one.

    It is a ``TypeError``, and also the ``RuntimeError`` that ``torch.futures`` raises for None.
    """


class StreamClosedError(RuntimeError):
    """A `ValueStream` takes no more values, or has none any more.

    `ValueStream.put` raises it when the stream has been closed, `ValueStream.get` when all values
    of a closed stream have been read. When nothing listens any more, both do, and so does a new
    iterator.
    """


class BlockingWaitWarning(RuntimeWarning):
    """``wait()`` is about to block a thread that runs an event loop.

    Every other task of that loop stands still meanwhile, perhaps the one that would complete the
    future among them. ``await`` the future instead.
    """


class TaskStateWarning(RuntimeWarning):
    """A task awaits while torch's state is not that of `debug.set_task_state_checks`' call.

    The state belongs to the thread, so all other tasks have it until this one goes on.
    """


WAIT_BLOCKS = (
    "waiting for a pending future blocks the event loop that this thread runs; "
    "await the future instead (wait_all: await gather(); for: async for)"
)


def warn_that_wait_blocks_a_loop(what: str = WAIT_BLOCKS) -> None:
    """Warns, at the line outside this package that led to the wait."""
    warn_at_users_line(what, BlockingWaitWarning)


def warn_at_users_line(what: str, kind: type[Warning]) -> None:
    """Warns, at the line outside this package that led here."""
    package = __name__.partition(".")[0]
    level, frame = 1, inspect.currentframe()  # None, if the interpreter has no frames to show
    while frame is not None and frame.f_back is not None and _package_of(frame) == package:
        level, frame = level + 1, frame.f_back
    warnings.warn(what, kind, stacklevel=level)


def _package_of(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


class CallbackError(RuntimeError):
    """A callback passed to ``then`` raised.

    The child future fails with it. It is also an instance of the type that the callback raised,
    wherever Python can build such a class, with the same ``args`` and attributes; its
    ``__cause__`` is the original, with its traceback. A further ``then`` passes it on unchanged.

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
        # A combined class is made at run time and is in no module. So a pickle has the original.
        if self.__cause__ is None:
            return RuntimeError.__reduce__(self)  # type: ignore[return-value]
        return CallbackError._of, (self.__cause__,)

    @classmethod
    def _of(cls, error: BaseException) -> BaseException:
        return callback_error(error)


class QueueFullError(RuntimeError, asyncio.QueueFull, queue.Full):
    """The queue of a `Batcher` is full, and takes no more items: a server answers 503.

    It is an ``asyncio.QueueFull`` and a ``queue.Full``, too.
    """


class BatcherClosedError(RuntimeError):
    """A `Batcher` has been closed: it takes no more items, or has dropped this one."""


class RpcError(RuntimeError):
    """A remote procedure call failed: what `as_future` makes of its error.

    It is also an instance of the type that the callee raised, if that is an ``Exception`` that
    this process finds by its name, and no ``ExceptionGroup``; of TimeoutError, if the call has
    timed out; or of ConnectionError, if the connection was lost, as when the callee dies. Its text
    has the remote traceback. It has none of the attributes of the remote error.

    PyTorch serves functions without ``async_rpc`` itself. If it cannot pickle the type of their
    error, import it here, or make it of a text, the caller gets something else.

    Example:
        >>> from torchfut_aio import RpcError
        >>> async def ask(call):
        ...     try:
        ...         return await torchfut_aio.as_future(call)
        ...     except KeyError:  # of the function that was called
        ...         return None
        ...     except ConnectionError:  # the callee has gone
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
    """Returns an RpcError, also of type ``kind`` wherever Python can build such a class."""
    if kind is not None and not hasattr(kind, "subgroup"):  # a group would lack its errors
        with contextlib.suppress(Exception):
            error: RpcError = _with_text(_combined(RpcError, kind), text)
            return error
    return RpcError(text)


def rebuild_exception(kind: type[BaseException], text: str) -> BaseException:
    """Returns an error of that type, or a RuntimeError if that can't be, with the text."""
    try:
        error: BaseException = _with_text(kind, text)
    except Exception:
        return RuntimeError(text)
    return error


def callback_error(error: BaseException) -> BaseException:
    """Returns the error of a child future whose callback raised ``error``."""
    kind: Any = type(error)  # not __class__, which the error may have defined as it likes
    if not issubclass(kind, Exception):
        return error
    if issubclass(kind, (CallbackError, concurrent.futures.CancelledError)):
        return error
    try:
        combined = _combine_with(kind, error)
    except Exception:
        combined = CallbackError(*_args.__get__(error))
    _cause.__set__(combined, error)
    return combined


def drop_catching_frame(error: BaseException) -> BaseException:
    """Takes the frame that caught ``error`` out of its traceback.

    That frame refers to the future that is to hold the error: the two would be a cycle.

    If memory ran out, the frames below it let go of what they hold. Others are to have that
    memory, however long the error is kept.
    """
    traceback = traceback_of(error)
    traceback = traceback and traceback.tb_next
    if traceback is not None and issubclass(type(error), OUT_OF_MEMORY):
        clear_frames(traceback)
    return with_traceback(error, traceback)


def traceback_of(error: BaseException) -> types.TracebackType | None:
    """Return the traceback, whatever the class of the error defines."""
    found: types.TracebackType | None = _traceback.__get__(error)
    return found


def with_traceback(error: E, traceback: types.TracebackType | None) -> E:
    """Return the error with that traceback, whatever the class of the error defines."""
    _traceback.__set__(error, traceback)
    return error


def one_for_each(error: BaseException, count: int) -> list[BaseException]:
    """Return an error for each of ``count`` callers that share nothing but that error.

    An exception that is raised changes: its traceback, its ``__context__``, its notes. So a caller
    would see in it what another was doing.
    """
    return [error, *(own_copy(error) for _ in range(count - 1))] if count else []


def own_copy(error: E) -> E:
    """Return a copy with the same cause and notes; ``error`` itself if ``copy.copy`` fails it."""
    args = _args.__get__(error)
    try:
        copied = copy.copy(error)
        copied_args = _args.__get__(copied)  # TypeError if it is no exception
    except KeyboardInterrupt:
        raise
    except BaseException:
        return error
    same = len(args) == len(copied_args) and all(map(operator.is_, args, copied_args))
    if copied is error or type(copied) is not type(error) or not same:
        return error
    _copy_state(error, copied)
    for attribute in _CHAIN:
        attribute.__set__(copied, attribute.__get__(error))
    own = {**_dict.__get__(copied)}  # tblib, for one, makes exceptions share it with a copy
    notes = _dict.__get__(error).get("__notes__")
    if type(notes) is list:
        own["__notes__"] = [*notes]
    _dict.__set__(copied, own)
    return copied


def _copy_state(error: BaseException, copied: BaseException) -> None:
    """Copy what is neither in the arguments nor in the dict: slots, and what C keeps."""
    for base in type(error).__mro__:
        for name, attribute in list(vars(base).items()):
            if isinstance(attribute, _STATE) and not name.startswith("__"):
                with contextlib.suppress(AttributeError, TypeError):  # unset, or read-only
                    _copy_attribute(attribute, error, copied)


def _copy_attribute(attribute: Any, error: BaseException, copied: BaseException) -> None:
    value, missing = attribute.__get__(error), object()
    try:
        copy_has: object = attribute.__get__(copied)
    except AttributeError:
        copy_has = missing
    if copy_has is not value:  # an OSError shows a second filename that was set to None
        attribute.__set__(copied, value)


def without_frames(error: BaseException) -> BaseException:
    """Return a copy that keeps no frame: without traceback, cause and context.

    Those in a group are copied, too.
    """
    copied = own_copy(error)
    if copied is error or issubclass(type(error), BaseExceptionGroup):
        try:
            copied = _copied_without_init(error)
        except Exception:
            return rebuild_exception(*type_and_text(error))
    for attribute in _CHAIN[:3]:
        attribute.__set__(copied, None)
    return copied


def _copied_without_init(error: BaseException) -> BaseException:
    """Return a copy of an error whose constructor takes other arguments than it has kept."""
    args = _args.__get__(error)
    if issubclass(type(error), BaseExceptionGroup):
        group: Any = error
        args = group.message, [without_frames(each) for each in group.exceptions]
    copied: BaseException = _new_without_init(type(error), *args)
    _copy_state(error, copied)
    _args.__set__(copied, args)
    _dict.__set__(copied, {**_dict.__get__(error)})
    return copied


def type_and_text(error: BaseException) -> tuple[type[BaseException], str]:
    """Returns the type and text that stand for ``error`` where it cannot go itself."""
    if issubclass(type(error), CallbackError) and error.__cause__ is not None:
        return type(error.__cause__), str(error)
    if issubclass(type(error), RpcError):
        return type(error).__bases__[-1], str(error)
    return type(error), _describe(error)


def _describe(error: BaseException) -> str:
    name = type(error).__qualname__
    args = _args.__get__(error)
    try:
        if type(error).__str__ in _SHOW_ARGS and not _are_plain(args):
            text = short(args[0] if len(args) == 1 else args)
        else:
            text = str(error)
    except Exception:
        text = "<its __str__ raised>"
    return f"{name}: {text}" if text else name


def _are_plain(args: tuple[Any, ...]) -> bool:
    return all(type(arg) in _PLAIN for arg in args)


# Ways to make a text of the arguments, whatever these are.
_SHOW_ARGS = (BaseException.__str__, KeyError.__str__)
_PLAIN = (str, int, float, bool, type(None))


# An exception's own class may define these attributes as it likes.
_args: Any = vars(BaseException)["args"]
_cause: Any = vars(BaseException)["__cause__"]
_dict: Any = vars(BaseException)["__dict__"]
_traceback: Any = vars(BaseException)["__traceback__"]
# In this order: to set the cause suppresses the context.
_CHAIN: list[Any] = [
    vars(BaseException)[name]
    for name in ("__traceback__", "__context__", "__cause__", "__suppress_context__")
]
# State outside of __dict__: slots, and what C keeps, such as errno.
_STATE = (types.MemberDescriptorType, types.GetSetDescriptorType)


def _with_text(kind: type[BaseException], text: str) -> Any:
    error = _new_without_init(kind, text)
    _args.__set__(error, (text,))
    return error


def _combine_with(kind: Any, error: BaseException) -> CallbackError:
    args = _args.__get__(error)
    combined: CallbackError = _new_without_init(_combined(CallbackError, kind), *args)
    _copy_state(error, combined)
    _args.__set__(combined, args)
    combined.__dict__.update(error.__dict__)
    return combined


def _new_without_init(kind: type[BaseException], *args: object) -> Any:
    """Returns an instance of ``kind`` without running any constructor written in Python.

    Such a constructor might do anything and need anything. The built-in class among the bases
    makes the instance.
    """
    built_in: Any = kind
    while not laid_out_by_c(built_in):
        built_in = built_in.__base__
    return built_in.__new__(kind, *args)


@functools.lru_cache(maxsize=256)
def _combined(base: type[Any], kind: type[Any]) -> type[Any]:
    # Python replaces a StopIteration that leaves a coroutine by a RuntimeError.
    if issubclass(base, kind) or issubclass(kind, (StopIteration, StopAsyncIteration)):
        return base
    name = f"{base.__qualname__}[{kind.__qualname__}]"
    return type(name, (base, kind), {"__module__": base.__module__})

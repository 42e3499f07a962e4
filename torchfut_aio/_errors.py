"""The errors and warnings that this package raises, and how a callback's error is dressed.

Code written for ``torch.futures`` catches ``RuntimeError`` around a failed ``then``;
code written today wants the type that the callback raised. `callback_error` serves
both: it makes one error that is a `CallbackError`, hence a ``RuntimeError``, and an
instance of the original's own type.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import types
import warnings
from typing import Any

from ._cpython import laid_out_by_c

__all__ = [
    "BlockingWaitWarning",
    "CallbackError",
    "InvalidStateError",
    "NotAFutureError",
    "RpcError",
    "callback_error",
    "drop_catching_frame",
    "rebuild_exception",
    "rpc_error",
    "type_and_text",
    "warn_that_wait_blocks_a_loop",
]


class InvalidStateError(RuntimeError, asyncio.InvalidStateError):
    """The operation does not fit the future's state.

    Raised when the outcome of a pending future is read, and when a future that is
    done is marked completed again. It is a ``RuntimeError``, as in ``torch.futures``,
    and an ``asyncio.InvalidStateError``, as in asyncio.
    """


class NotAFutureError(TypeError, RuntimeError):
    """Something that is not a future, and cannot be adopted as one, was passed as one.

    It is a ``TypeError``, and also the ``RuntimeError`` that ``torch.futures`` raises
    when it is given None.
    """


class BlockingWaitWarning(RuntimeWarning):
    """``wait()`` is about to block a thread that runs an event loop.

    Every other task of that loop stands still meanwhile, the one that would complete
    the future perhaps among them. ``await`` the future instead.
    """


def warn_that_wait_blocks_a_loop(
    what: str = "waiting for a pending future blocks the event loop that this thread runs; "
    "await the future instead (wait_all: await gather(); for: async for)",
) -> None:
    """Warns, at the line outside this package that led to the wait."""
    package = __name__.partition(".")[0]
    level, frame = 1, inspect.currentframe()  # None, if the interpreter has no frames to show
    while frame is not None and frame.f_back is not None and _package_of(frame) == package:
        level, frame = level + 1, frame.f_back
    warnings.warn(what, BlockingWaitWarning, stacklevel=level)


def _package_of(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


class CallbackError(RuntimeError):
    """A callback passed to ``then`` raised.

    The error that a reader of the child future sees is a `CallbackError`, is also an
    instance of the type that the callback raised wherever Python can build such a
    class, and has the original, with its traceback, as ``__cause__``. Its ``args`` and
    attributes are the original's. It passes through a further ``then`` unchanged.

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
        cause = self.__cause__
        if cause is None:
            return super().__str__()
        return f"Got the following error when running the callback: {describe(cause)}"

    def __reduce__(self) -> tuple[Any, ...]:
        # The combined classes are made at run time: no module holds them, so a
        # pickle carries the original and the other side dresses it again.
        if self.__cause__ is None:
            return RuntimeError.__reduce__(self)  # type: ignore[return-value]
        return callback_error, (self.__cause__,)


class RpcError(RuntimeError):
    """A remote procedure call failed, as `as_future` tells it.

    It is also an instance of the type that the callee raised, if that is an ``Exception`` that
    can be found here; of TimeoutError, if the call has timed out; or of ConnectionError, if
    the connection was lost, as when the callee dies. Its text has the remote traceback. The
    attributes of what was raised stay behind.

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
        return rpc_error, (type(self).__bases__[-1], str(self))


def rpc_error(kind: Any, text: str) -> RpcError:
    """Returns an RpcError, of that type, too, wherever Python can build such a class."""
    if kind is not None:
        with contextlib.suppress(Exception):
            error: RpcError = new_without_init(_combined(RpcError, kind), text)
            _args.__set__(error, (text,))
            return error
    return RpcError(text)


def drop_catching_frame(error: BaseException) -> BaseException:
    """Takes the frame that caught ``error`` out of its traceback.

    That frame knows the future which is to hold the error: the two would be a cycle.
    """
    traceback = error.__traceback__
    return error.with_traceback(traceback and traceback.tb_next)


def describe(error: BaseException) -> str:
    """Returns ``TypeName: text``, whatever the error's own ``__str__`` does."""
    name = type(error).__qualname__
    try:
        text = str(error)
    except Exception:
        text = "<its __str__ raised>"
    return f"{name}: {text}" if text else name


def callback_error(error: BaseException) -> BaseException:
    """Returns what a child future fails with when its callback raised ``error``."""
    # Asking the type: what an instance says of its class is up to whoever wrote it.
    kind: Any = type(error)
    if not issubclass(kind, Exception):
        return error
    if issubclass(kind, (CallbackError, concurrent.futures.CancelledError)):
        return error
    try:
        dressed = _dress(kind, error)
    except Exception:
        dressed = CallbackError(*_args.__get__(error))
    _cause.__set__(dressed, error)
    return dressed


def type_and_text(error: BaseException) -> tuple[type[BaseException], str]:
    """Returns what is told of ``error`` where it cannot go itself."""
    if issubclass(type(error), CallbackError) and error.__cause__ is not None:
        return type(error.__cause__), str(error)
    if issubclass(type(error), RpcError):
        return type(error).__bases__[-1], str(error)
    return type(error), describe(error)


def rebuild_exception(kind: type[BaseException], text: str) -> BaseException:
    """Returns an error of that type, or a RuntimeError if that can't be, with the text."""
    try:
        error: BaseException = new_without_init(kind, text)
    except Exception:
        return RuntimeError(text)
    _args.__set__(error, (text,))
    return error


# Read and written past what an exception's own class makes of attributes.
_args: Any = vars(BaseException)["args"]
_cause: Any = vars(BaseException)["__cause__"]


def _dress(kind: Any, error: BaseException) -> CallbackError:
    dressed: CallbackError = new_without_init(_combined(CallbackError, kind), *_args.__get__(error))
    for descriptor in _state(kind):
        with contextlib.suppress(AttributeError, TypeError):  # unset, or read-only
            descriptor.__set__(dressed, descriptor.__get__(error))
    _args.__set__(dressed, _args.__get__(error))
    dressed.__dict__.update(error.__dict__)
    return dressed


def new_without_init(kind: type[BaseException], *args: object) -> Any:
    """Returns an instance of ``kind`` on which no constructor written in Python ran.

    Such a constructor might do anything and need anything. What C code lays out is what
    the built-in class among the bases does.
    """
    built_in: Any = kind
    while not laid_out_by_c(built_in):
        built_in = built_in.__base__
    return built_in.__new__(kind, *args)


@functools.lru_cache(maxsize=256)
def _combined(base: type[Any], kind: type[Any]) -> type[Any]:
    # A StopIteration cannot leave a coroutine: Python replaces it on the way out.
    if issubclass(kind, (StopIteration, StopAsyncIteration)):
        return base
    if issubclass(base, kind):
        return base
    return type(f"{base.__qualname__}[{kind.__qualname__}]", (base, kind), {})


def _state(kind: type[BaseException]) -> list[Any]:
    """Returns what describes the state of instances outside ``__dict__``: errno, slots."""
    return [
        attribute
        for base in kind.__mro__
        for name, attribute in vars(base).items()
        if isinstance(attribute, (types.MemberDescriptorType, types.GetSetDescriptorType))
        and not name.startswith("__")
    ]

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
import sys
import types
import warnings
from typing import Any

__all__ = [
    "BlockingWaitWarning",
    "CallbackError",
    "InvalidStateError",
    "NotAFutureError",
    "callback_error",
    "describe",
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


def warn_that_wait_blocks_a_loop() -> None:
    """Warns, at the line outside this package that led to the wait."""
    package = __name__.partition(".")[0]
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _package_of(frame) == package:
        level, frame = level + 1, frame.f_back
    warnings.warn(
        "wait() on a pending future blocks the event loop that this thread runs; "
        "await the future instead",
        BlockingWaitWarning,
        stacklevel=level,
    )


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
    if isinstance(error, CallbackError) or not isinstance(error, Exception):
        return error
    if isinstance(error, concurrent.futures.CancelledError):
        return error
    dressed = _dress(error)
    dressed.__cause__ = error
    return dressed


def _dress(error: Exception) -> CallbackError:
    try:
        kind: Any = type(error)
        # A constructor written in Python might do anything, and is not called: the
        # memory is laid out by the built-in one, and the state copied.
        built_in = next(base for base in kind.__mro__ if base.__module__ == "builtins")
        dressed: CallbackError = built_in.__new__(_combined(kind), *error.args)
        for name in _members(kind):
            with contextlib.suppress(AttributeError, TypeError):  # unset, or read-only
                setattr(dressed, name, getattr(error, name))
        dressed.__dict__.update(error.__dict__)
    except Exception:
        return CallbackError(*error.args)
    return dressed


@functools.lru_cache(maxsize=256)
def _combined(kind: Any) -> type[CallbackError]:
    # A StopIteration cannot leave a coroutine: Python replaces it on the way out.
    if issubclass(kind, (StopIteration, StopAsyncIteration)):
        return CallbackError
    if issubclass(CallbackError, kind):
        return CallbackError
    return type(f"CallbackError[{kind.__qualname__}]", (CallbackError, kind), {})


def _members(kind: Any) -> list[str]:
    """Returns what instances of ``kind`` keep outside ``__dict__``: errno, or slots."""
    return [
        name
        for base in kind.__mro__
        for name, attribute in vars(base).items()
        if isinstance(attribute, types.MemberDescriptorType)
    ]

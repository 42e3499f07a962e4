"""The C++ future underneath, for consumers in PyTorch's C++.

The thread that completes the future completes it once; rule 4 of ``_completion.py`` says when.
Callbacks of C++ consumers run within that call, with the GIL released.

To C++, a Python error is a value that raises when it is unwrapped. The garbage collector does not
see objects that C++ holds, and a traceback often leads back to the future. So C++ gets a
*placeholder* for the error, and a weak reference to the outcome, which the future keeps. A consumer
that reads the value without unwrapping it gets the placeholder, which RPC and DDP understand.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from .._errors import rebuild_exception, type_and_text
from .._pytorch import CppFuture, set_unwrap_func
from ._outcome import Outcome

_Future: Any = CppFuture
# Creates the C++ future, given its devices. (torch.futures.Future.__init__ would convert the
# devices once more.)
init_in_torch = _Future.__init__
# Completes the C++ future with a value. (Looked up once, as that is slow in pybind11's classes.)
set_value_in_torch = _Future.set_result


def complete_in_torch(future: Any, outcome: Outcome) -> None:
    """Complete the C++ future, unless it is done.

    If the devices take no more events, it fails with the device's error.
    """
    if _Future.done(future):
        return
    if outcome.error is not None:
        _fail(future, outcome, outcome.error)
        return
    try:
        set_value_in_torch(future, outcome.value)
    except Exception as refused:
        if not _Future.done(future):
            _fail(future, outcome, refused)


def _fail(future: Any, outcome: Outcome, error: BaseException) -> None:
    try:
        find = partial(_error_of, weakref.ref(outcome), *type_and_text(error))
        set_unwrap_func(future, partial(_raise_found, find))
        set_value_in_torch(future, _placeholder_of(error, find))
    except BaseException:  # C++ consumers must not wait for ever
        if not _Future.done(future):
            set_value_in_torch(future, None)
        raise


def _placeholder_of(error: BaseException, find: Callable[[], BaseException]) -> object:
    try:
        from .._rpc_errors import ErrorPlaceholder  # here, for programs in which nothing fails
    except ImportError:  # the interpreter exits, or this is a signal handler within that import
        return None
    return ErrorPlaceholder.of(error, find)


def _error_of(ref: weakref.ref[Outcome], kind: type[BaseException], text: str) -> BaseException:
    outcome = ref()
    error = None if outcome is None else outcome.exception()
    return rebuild_exception(kind, text) if error is None else error


def _raise_found(find: Callable[[], BaseException], _placeholder: object) -> NoReturn:
    raise find()

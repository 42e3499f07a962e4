"""Errors on their way through C++, which knows a Python error only as text.

A failed future gives C++ an `ErrorPlaceholder`, which finds the error itself. RPC delivers texts,
which `parse_remote_error` turns into errors again. The first failure of any future imports this.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

from ._cpython import calling_module
from ._errors import RpcError, rpc_error, type_and_text
from ._pytorch import EXTRACTS_TENSORS, remote_exception, this_worker

_RemoteException: Any = remote_exception()


class ErrorPlaceholder(_RemoteException):  # type: ignore[misc]
    """The value that a failed future has in C++, for PyTorch's own consumers.

    RPC sends it to the caller, and raises the error there. DDP expects a tensor, and reads the
    class of the value in the middle of ``backward()``: that raises the error. All others see a
    plain tuple.
    """

    find: Callable[[], BaseException]
    text: Callable[[], str]
    was_made: ClassVar[bool] = False  # whether this process has made one

    @classmethod
    def of(cls, error: BaseException, find: Callable[[], BaseException]) -> ErrorPlaceholder:
        """Make one; ``find`` returns the error, or one like it if that has been freed."""
        kind, text = type_and_text(error)
        self: ErrorPlaceholder = cls(text, _maker_of(kind))
        cls.was_made = True
        self.find = find
        self.text = text.__str__
        worker = this_worker()
        if worker is not None:
            # The error may have been freed when RPC sends it. This keeps the text of its traceback,
            # and no frames.
            trace = traceback.TracebackException.from_exception(error, lookup_lines=False)
            shown = f"On {worker}:\n{_shown(error)}\n"
            self.text = lambda: shown + "".join(trace.format())
        return self

    @property
    def __class__(self) -> type:
        asking = calling_module()
        if asking is None or asking.startswith("torch.autograd"):  # None in autograd's own threads
            raise self.find()
        return ErrorPlaceholder

    @__class__.setter
    def __class__(self, _: type) -> None: ...

    @property
    def msg(self) -> str:
        """The text of the error, and its traceback, as RPC sends them."""
        return self.text().encode("unicode_escape").decode("ascii")  # RPC decodes such escapes

    def __reduce_ex__(self, _protocol: object) -> tuple[Any, ...]:
        if calling_module() == EXTRACTS_TENSORS:
            return str, ()  # that module searches it for tensors, and there are none
        return _RemoteException, (self.msg, self.exception_type)


def _maker_of(kind: type[BaseException]) -> Callable[[str], BaseException]:
    """Return the function that RPC calls with the text at its caller, to make the error there."""
    # That is the class itself if it is a builtin. Any other class may be missing at the caller, or
    # take no text, or not show it.
    builtin: object = vars(builtins).get(kind.__qualname__)
    if issubclass(kind, Exception) and builtin is kind:
        return kind
    return functools.partial(make_at_caller, kind.__module__, kind.__qualname__)


def make_at_caller(module: str, name: str, text: str) -> RpcError:
    """Return an `RpcError`, also of the named type if this process has it."""
    with suppress(Exception):
        importlib.import_module(module)  # as pickle does
    return rpc_error(_exception_type(f"{module}.{name}"), text)


def _shown(error: BaseException) -> str:
    try:
        return repr(error)
    except Exception:
        return f"{type(error).__qualname__}(<its __repr__ raised>)"


# The texts of PyTorch: see torch/distributed/rpc/internal.py.
_TIMED_OUT = "RPCErr:1:"
_LOST = "(this error originated at tensorpipe/"
_REMOTE = "On WorkerInfo("
_NOT_MADE = "Failed to create original exception type"
_WHERE_RPC_RAISED_IT = "\n\nAt:\n  "
_MADE_AT_CALLER = re.compile(r"RpcError(?:\[(?:\w+\.)*(?P<kind>\w+)\])?")
_RAISED = re.compile(r"^(?P<frame> .*\n)?(?P<path>(?:\w+\.)*\w+)(?::|$)", re.MULTILINE)


def parse_remote_error(error: BaseException) -> BaseException:
    """Return an `RpcError` if ``error`` has the text of a failed RPC; else ``error``.

    PyTorch delivers a ValueError or a TypeError as such, and any other error as a RuntimeError. The
    text shows the type and the traceback of the remote error.
    """
    if type(error) in (RuntimeError, ValueError, TypeError) and len(error.args) == 1:
        text = error.args[0]
        if type(text) is str:
            with suppress(Exception):  # anything may be in the text
                return _parse(text) or error
    return error


def parse_fetched_error(error: BaseException) -> BaseException:
    """Do the same for an error that ``RRef.to_here`` raised.

    It has the type of the remote error, if Python can make one of it, and a text without the type.
    Or it is an `RpcError` already.
    """
    if issubclass(type(error), RpcError):
        return error
    text = error.args[0] if len(error.args) == 1 else None
    if type(text) is str and text.startswith((_REMOTE, _NOT_MADE)):
        with suppress(Exception):
            return _parse(f"{type(error).__qualname__}: {text}") or error
    return parse_remote_error(error)


def error_in(value: object) -> BaseException | None:
    """Return the error of a failed future whose `ErrorPlaceholder` is in ``value``, if any.

    TorchScript returns it alone or in a container, other C++ code alone.
    """
    if not ErrorPlaceholder.was_made:
        return None
    seen: set[int] = set()
    found = [value]
    while found:
        thing: Any = found.pop()
        if type(thing) is ErrorPlaceholder:
            return thing.find()
        # Not in longer containers, which no script returns: on a loop that would take too long.
        is_container = type(thing) in (dict, list, tuple) and len(thing) <= 1000
        if is_container and id(thing) not in seen:
            seen.add(id(thing))
            found += thing.values() if type(thing) is dict else thing
    return None


def _parse(whole: str) -> BaseException | None:
    if whole.startswith(_TIMED_OUT):
        return rpc_error(TimeoutError, whole.removeprefix(_TIMED_OUT))
    if _LOST in whole:
        return rpc_error(ConnectionError, whole)
    name, _, text = whole.partition(": ")
    # The __str__ of the error may put some text before it, but not much.
    begin = text.find(_REMOTE, 0, 500)
    if begin < 0:
        return None
    if _NOT_MADE in text[:begin]:
        name = ""
    quoted = text[begin - 1 : begin] in ("'", '"')  # KeyError quotes
    text = text[begin - quoted :]
    text = text.rpartition(_WHERE_RPC_RAISED_IT)[0] or text
    made = _MADE_AT_CALLER.fullmatch(name)
    if made is not None:
        return rpc_error(made["kind"] and _kind(made["kind"], text), text)
    if quoted:
        text = ast.literal_eval(text)
    if not name:
        # The repr of the error is in the second line.
        name = text.split("\n", 2)[1].partition("(")[0]
    return rpc_error(_kind(name, text), text)


def _kind(name: str, text: str) -> type[Exception] | None:
    """Return the type called ``name`` in the last line of the traceback in ``text``."""
    lines = [(bool(match["frame"]), match["path"]) for match in _RAISED.finditer(text)]
    # The text of the error may have lines that resemble it, so prefer the last line below a frame.
    # An error that was never raised has no frames.
    lines.sort(key=lambda line: line[0])
    paths = (path for _, path in reversed(lines) if path.rpartition(".")[2] == name)
    return next(filter(None, map(_exception_type, paths)), None)


def _exception_type(path: str) -> type[Exception] | None:
    found = _imported(path.split(".", 20))
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def _imported(names: list[str]) -> object:
    for end in range(len(names) - 1, 0, -1):
        module = sys.modules.get(".".join(names[:end]))
        if module is not None:
            return _attribute(module, names[end:])
    # A traceback omits the module of a builtin class, and of one in the program itself.
    found = _attribute(builtins, names)
    main = names[1:] if names[0] == "__mp_main__" else names
    return found or _attribute(sys.modules.get("__main__"), main)


def _attribute(found: object, names: list[str]) -> object:
    for name in names:
        found = getattr(found, name, None)
    return found

"""Errors on their way through C++: out of a future that failed, and in from an RPC.

C++ knows an error of Python's as a text, if at all. Outward goes a `StandIn`, which
knows the error itself. Inward come texts, of which `parse_remote_error` makes errors again.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
import traceback
from collections import namedtuple
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ._core import install_stand_in
from ._cpython import calling_module
from ._errors import rpc_error, type_and_text

_RPC = "torch.distributed.rpc.internal"

if TYPE_CHECKING:

    class _RemoteException(NamedTuple):
        msg: str
        exception_type: type[BaseException]

else:
    # What RPC sends of a function that raised, and raises at the caller. Builds of PyTorch
    # without RPC have none.
    _RemoteException = getattr(sys.modules.get(_RPC), "RemoteException", None) or namedtuple(
        "_RemoteException", ("msg", "exception_type")
    )


class StandIn(_RemoteException):
    """What a failed future has in C++ for a value, and PyTorch's own consumers meet.

    RPC sends it to the caller, which raises the error there. DDP expects a tensor, and before
    it refuses this, in the middle of ``backward()``, it asks for its class: that raises the
    error. To all others it is the plain tuple that it is.
    """

    find: Callable[[], BaseException]
    told: Callable[[], str]

    @classmethod
    def of(cls, error: BaseException, find: Callable[[], BaseException]) -> StandIn:
        """Makes one of an error, that ``find`` returns, or if it has gone one like it."""
        kind, text = type_and_text(error)
        self: StandIn = cls(text, kind)
        self.find = find
        worker = this_worker()
        if worker is None:
            self.told = text.__str__
        else:
            # Perhaps nobody keeps the error until it is sent. This keeps no frames.
            trace = traceback.TracebackException.from_exception(error, lookup_lines=False)
            self.told = partial(_remote_text, worker, _shown(error), trace)
        return self

    @property
    def __class__(self) -> type:
        asking = calling_module()
        # No module at all: the thread is autograd's own.
        if asking is None or asking.startswith("torch.autograd"):
            raise self.find()
        return StandIn

    @__class__.setter
    def __class__(self, _: type) -> None: ...

    @property
    def msg(self) -> str:
        """What is sent: the text of the error, and its traceback."""
        # So that what RPC decodes at the other end is the text, whatever is in it.
        return self.told().encode("unicode_escape").decode("ascii")

    def __reduce_ex__(self, _protocol: object) -> tuple[Any, ...]:
        if calling_module() == "torch._jit_internal":
            return str, ()  # it looks for tensors, and there are none
        return _RemoteException, (self.msg, self.exception_type)


def _shown(error: BaseException) -> str:
    try:
        return repr(error)
    except Exception:
        return f"{type(error).__qualname__}(<its __repr__ raised>)"


def _remote_text(worker: object, shown: str, trace: traceback.TracebackException) -> str:
    return f"On {worker}:\n{shown}\n{''.join(trace.format())}"


def this_worker() -> object:
    """Returns what RPC knows this process as; None if it is not initialised."""
    rpc: Any = sys.modules.get("torch.distributed.rpc.api")
    if rpc is None or not rpc._is_current_rpc_agent_set():
        return None
    return rpc._get_current_rpc_agent().get_worker_info()


# How PyTorch tells of it: see torch/distributed/rpc/internal.py.
_TIMED_OUT = "RPCErr:1:"
_LOST = "(this error originated at tensorpipe/"
_REMOTE = "On WorkerInfo("
_NOT_MADE = "Failed to create original exception type"
_WHERE_IT_WAS_MADE_AGAIN = "\n\nAt:\n  "
_RAISED = re.compile(r"^(?P<frame> .*\n)?(?P<path>(?:\w+\.)*\w+)(?::|$)", re.MULTILINE)


def parse_remote_error(error: BaseException) -> BaseException:
    """Returns what was raised in another process, if ``error`` tells of that; else ``error``.

    PyTorch delivers a ValueError as such, and any other error as a RuntimeError, in whose
    text are its type and the remote traceback.
    """
    if type(error) in (RuntimeError, ValueError) and len(error.args) == 1:
        told = error.args[0]
        if type(told) is str:
            with suppress(Exception):  # in what others have written, anything may be
                return _parse(told) or error
    return error


def _parse(told: str) -> BaseException | None:
    if told.startswith(_TIMED_OUT):
        return rpc_error(TimeoutError, told.removeprefix(_TIMED_OUT))
    if _LOST in told:
        return rpc_error(ConnectionError, told)
    name, _, text = told.partition(": ")
    # What the error's own __str__ puts before it is not much.
    begin = text.find(_REMOTE, 0, 500)
    if begin < 0:
        return None
    if _NOT_MADE in text[:begin]:
        name = ""
    quoted = text[begin - 1 : begin] in ("'", '"')  # KeyError quotes
    text = text[begin - quoted :]
    text = text.rpartition(_WHERE_IT_WAS_MADE_AGAIN)[0] or text
    if quoted:
        text = ast.literal_eval(text)
    if not name:
        # The repr of the error is in the second line.
        name = text.split("\n", 2)[1].partition("(")[0]
    return rpc_error(_kind(name, text), text)


def _kind(name: str, text: str) -> type[Exception] | None:
    """Returns the type called ``name`` that a traceback ends with."""
    lines = [(bool(match["frame"]), match["path"]) for match in _RAISED.finditer(text)]
    # The last below a frame, rather than a line of the error's own text; but what was never
    # raised has no frames.
    lines.sort(key=lambda line: line[0])
    for _, path in reversed(lines):
        if path.rpartition(".")[2] != name:
            continue
        kind = _imported(path)
        if isinstance(kind, type) and issubclass(kind, Exception):
            return kind
    return None


def _imported(path: str) -> object:
    names = path.split(".", 20)
    for end in range(len(names) - 1, 0, -1):
        module = sys.modules.get(".".join(names[:end]))
        if module is not None:
            return _attribute(module, names[end:])
    # A traceback leaves out the module of what is built in, or of the program itself.
    found = _attribute(builtins, names)
    if found is None and names[0] == "__mp_main__":
        names = names[1:]
    return found or _attribute(sys.modules.get("__main__"), names)


def _attribute(found: object, names: list[str]) -> object:
    for name in names:
        found = getattr(found, name, None)
    return found


if torch.distributed.is_available():
    install_stand_in(StandIn.of)

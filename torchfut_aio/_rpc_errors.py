"""Errors on their way through C++: out of a future that failed, and in from an RPC.

C++ knows an error of Python's as a text, if at all. Outward goes a `StandIn`, which
knows the error itself. Inward come texts, of which `restored` makes errors again.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
import traceback
from collections import namedtuple
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ._errors import remade

__all__ = ["StandIn", "restored", "this_worker"]

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

    RPC sends it to the caller, which raises the error. Others expect a tensor, say, and
    before they refuse this they ask for its class, which raises the error, too: so what
    ``backward()`` raises is the error that the future of a DDP hook failed with.
    """

    find: Callable[[], BaseException]

    @classmethod
    def of(cls, kind: type[BaseException], text: str, find: Callable[[], BaseException]) -> StandIn:
        """Makes one, for an error of that type and text, that ``find`` returns."""
        self: StandIn = cls(text, kind)
        self.find = find
        return self

    @property
    def __class__(self) -> type:
        # RPC asks, too, before it pickles anything.
        if sys._getframe(1).f_globals.get("__name__") == _RPC:
            return StandIn
        raise self.find()

    @__class__.setter
    def __class__(self, _: type) -> None: ...

    def __reduce_ex__(self, _protocol: object) -> tuple[Any, ...]:
        error = self.find()
        text = f"{error!r}\n{''.join(traceback.format_exception(error))}"
        worker = this_worker()
        if worker is not None:
            text = f"On {worker}:\n{text}"
        # So that what RPC decodes at the other end is this text, whatever is in it.
        return _RemoteException, (
            text.encode("unicode_escape").decode("ascii"),
            self.exception_type,
        )


def this_worker() -> object:
    """Returns what RPC knows this process as; None if it is not initialised."""
    rpc: Any = sys.modules.get("torch.distributed.rpc.api")
    if rpc is None or not rpc._is_current_rpc_agent_set():
        return None
    return rpc._get_current_rpc_agent().get_worker_info()


# How PyTorch tells of it: see torch/distributed/rpc/internal.py.
_TIMED_OUT = "RPCErr:1:"
_NOT_MADE = "Original exception on remote side was "
_WHERE_IT_WAS_MADE_AGAIN = "\n\nAt:\n  "
_RAISED = re.compile(r"^(?P<frame> .*\n)?(?P<path>(?:\w+\.)*\w+)(?::|$)", re.MULTILINE)


def restored(error: BaseException) -> BaseException:
    """Returns what was raised in another process, if ``error`` tells of that; else ``error``.

    PyTorch delivers a ValueError as such, and any other error as a RuntimeError, in whose
    text are its type and the remote traceback.
    """
    if type(error) not in (RuntimeError, ValueError) or len(error.args) != 1:
        return error
    told = str(error.args[0])
    if told.startswith(_TIMED_OUT):
        return TimeoutError(told.removeprefix(_TIMED_OUT))
    name, _, text = told.partition(": ")
    if text.startswith("Failed to create") and _NOT_MADE in text:
        name, text = "", text.partition(_NOT_MADE)[2]
    if not text.lstrip("'\"").startswith("On WorkerInfo("):
        return error
    text = text.rpartition(_WHERE_IT_WAS_MADE_AGAIN)[0] or text
    if text[0] in "'\"":  # KeyError quotes
        try:
            text = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return error
    kind = _kind(name, text)
    if kind is None:
        return error
    made = remade(kind, text)
    try:
        str(made)
    except Exception:  # it needs more than a text
        return error
    return made


def _kind(name: str, text: str) -> type[Exception] | None:
    """Returns the type called ``name``, or any if that is empty, that a traceback ends with."""
    lines = [(bool(match["frame"]), match["path"]) for match in _RAISED.finditer(text)]
    # The last below a frame, rather than a line of the error's own text; but what was never
    # raised has no frames.
    lines.sort(key=lambda line: line[0])
    for _, path in reversed(lines):
        if name not in ("", path.rpartition(".")[2]):
            continue
        kind = _imported(path)
        if isinstance(kind, type) and issubclass(kind, Exception):
            return kind
    return None


def _imported(path: str) -> object:
    module, _, rest = path.rpartition(".")
    if not module:
        return getattr(builtins, path, None)
    while module and module not in sys.modules:
        module, _, name = module.rpartition(".")
        rest = f"{name}.{rest}"
    found: object = sys.modules.get(module)
    for name in rest.split("."):
        found = getattr(found, name, None)
    return found

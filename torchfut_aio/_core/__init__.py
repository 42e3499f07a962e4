"""How a future completes, once, and everybody who follows it is told.

``_outcome.py`` is what a future completes with. ``_completion.py`` is the state machine: who
follows a pending future, and the one way in which it completes. ``_callbacks.py`` runs callbacks
to a bounded depth, ``_then.py`` fills the child of ``then``, and ``_torch_future.py`` is the only
file that touches the C++ future underneath.
"""

from ._callbacks import DoneCallback, FunctionCallback, run_deferred
from ._completion import (
    OUTCOME,
    Completable,
    add_callback,
    add_waiter,
    complete,
    complete_as,
    complete_with_error,
    complete_with_parts,
    complete_with_value,
    devices_of,
    followers,
    has_failed,
    ignore_error,
    is_cancelled,
    is_followed,
    outcome_of,
    remove,
    try_complete_with_error,
    try_complete_with_value,
)
from ._outcome import Outcome
from ._then import ThenCallback
from ._torch_future import init_in_torch, install_stand_in

__all__ = [
    "OUTCOME",
    "Completable",
    "DoneCallback",
    "FunctionCallback",
    "Outcome",
    "ThenCallback",
    "add_callback",
    "add_waiter",
    "complete",
    "complete_as",
    "complete_with_error",
    "complete_with_parts",
    "complete_with_value",
    "devices_of",
    "followers",
    "has_failed",
    "ignore_error",
    "init_in_torch",
    "install_stand_in",
    "is_cancelled",
    "is_followed",
    "outcome_of",
    "remove",
    "run_deferred",
    "try_complete_with_error",
    "try_complete_with_value",
]

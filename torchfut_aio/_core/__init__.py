"""How a future completes, once, and everybody who follows it is told.

``_outcome.py`` is what a future completes with. ``_completion.py`` is the state machine: who
follows a pending future, and the one way in which it completes. ``_callbacks.py`` runs callbacks
to a bounded depth, ``_then.py`` fills the child of ``then``, ``_promise.py`` is what completes a
future from a task, a thread or another library, and ``_torch_future.py`` is the only file that
touches the C++ future underneath.
"""

from collections.abc import Callable
from typing import Any

from .._loops import Waker
from ._callbacks import DoneCallback, FunctionCallback, run_deferred
from ._completion import (
    OUTCOME,
    Completable,
    add_callback,
    add_waiter,
    complete,
    complete_all,
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
    waiters_of,
)
from ._outcome import Outcome, outcome_of_error, outcome_of_value
from ._promise import Promise
from ._then import ThenCallback
from ._torch_future import init_in_torch, install_stand_in

__all__ = [
    "OUTCOME",
    "Completable",
    "DoneCallback",
    "FunctionCallback",
    "Outcome",
    "Promise",
    "ThenCallback",
    "add_callback",
    "add_waiter",
    "complete",
    "complete_all",
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
    "outcome_of_error",
    "outcome_of_value",
    "remove",
    "run_deferred",
    "try_complete_with_error",
    "try_complete_with_value",
    "waiters_of",
]


def replace_add_functions(
    waiter_adder: Callable[[Completable[Any], Any, Waker], bool],
    callback_adder: Callable[[Completable[Any], DoneCallback], None],
) -> None:
    """Has these called in the place of `add_waiter` and `add_callback`, by all who follow.

    So call them as `_core.add_waiter`, never by an imported name. It is for whoever records who
    follows which future; nobody else pays for that.
    """
    global add_waiter, add_callback
    add_waiter = waiter_adder  # type: ignore[assignment]
    add_callback = callback_adder  # type: ignore[assignment]

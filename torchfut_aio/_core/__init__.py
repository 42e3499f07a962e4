"""How a future completes, once, and wakes its waiters.

``_outcome.py`` has the value or error of a future. ``_completion.py`` is the state machine: the
waiters and callbacks of a pending future, and the one way in which it completes. ``_callbacks.py``
runs callbacks to a bounded depth, ``_then.py`` completes the child of ``then``, ``_promise.py``
completes a future from a task, a thread or another library, and ``_torch_future.py`` is the only
file that touches the C++ future underneath.
"""

from ._callbacks import DoneCallback, FunctionCallback, run_deferred
from ._completion import (
    OUTCOME,
    add_callback,
    add_waiter,
    callbacks_of,
    complete_all,
    devices_of,
    has_failed,
    has_waiters,
    ignore_error,
    is_cancelled,
    outcome_of,
    refuse_second,
    remove,
    try_complete,
    try_complete_as,
    try_complete_with_error,
    try_complete_with_parts,
    try_complete_with_value,
    waiters_of,
)
from ._outcome import Outcome, outcome_of_error, outcome_of_value, outcomes_of_results
from ._promise import Promise
from ._then import ThenCallback
from ._torch_future import init_in_torch

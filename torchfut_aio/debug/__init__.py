"""Tools for a program that hangs or lags: what waits for which future, since when.

`pending_futures` lists the pending futures and their waiters. A `Recording` keeps waits and
callbacks while it is on, and saves them as a trace for Perfetto; otherwise it costs nothing.
`set_task_state_checks` switches on a warning for tasks that await with a changed state of torch.
`uses_extension` says whether the hot paths run in C.
"""

from .._extension import uses_extension
from .._loops import Waiter
from .._public import publish
from ..task_state import set_task_state_checks
from ._pending import PendingFuture, PendingStream, pending_futures
from ._recording import Recording

__all__ = [
    "PendingFuture",
    "PendingStream",
    "Recording",
    "Waiter",
    "pending_futures",
    "set_task_state_checks",
    "uses_extension",
]

publish(__name__)

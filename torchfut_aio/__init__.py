"""Futures of PyTorch that can be awaited.

The path of a completion: ``_future.py`` (a setter claims the future, the C++ future is
completed, everybody in the list of waiters is served), ``_callbacks.py`` (callbacks
run), ``_loops/`` (a waiting task is resumed by its loop, a thread by its lock).
``_collect.py`` combines futures, ``_adopt.py`` turns other kinds of future into ours.
"""

from ._adopt import as_future
from ._collect import as_completed, collect_all, gather, wait_all
from ._errors import BlockingWaitWarning, CallbackError, InvalidStateError, NotAFutureError
from ._future import Future

__all__ = [
    "BlockingWaitWarning",
    "CallbackError",
    "Future",
    "InvalidStateError",
    "NotAFutureError",
    "as_completed",
    "as_future",
    "collect_all",
    "gather",
    "wait_all",
]

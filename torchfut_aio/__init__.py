"""Futures of PyTorch that can be awaited.

`Future` is a ``torch.futures.Future`` for ``await`` on asyncio, uvloop and trio.
`as_future` makes one of another kind of future; `gather`, `collect_all`, `wait_all` and
`as_completed` take many.

To read the package, follow a completion: ``_future.py`` (a setter claims the future, all
who wait are served, the C++ future is completed), ``_callbacks.py`` (callbacks run),
``_loops/`` (a waiting task is resumed by its loop, a thread by its lock). Beside these,
``_collect.py`` combines futures, ``_adopt.py`` adopts other kinds, ``_errors.py`` dresses
errors. ``_devices/`` knows of accelerators: of the kernels that fill a value, and when they
are done.
"""

from ._adopt import as_future
from ._collect import as_completed, collect_all, gather, wait_all
from ._devices import PollPolicy, Statistics, set_poll_policy, statistics, synchronize, to_host
from ._errors import BlockingWaitWarning, CallbackError, InvalidStateError, NotAFutureError
from ._future import Future
from ._tasks import start_soon, submit
from ._timeouts import with_timeout

__all__ = [
    "BlockingWaitWarning",
    "CallbackError",
    "Future",
    "InvalidStateError",
    "NotAFutureError",
    "PollPolicy",
    "Statistics",
    "as_completed",
    "as_future",
    "collect_all",
    "gather",
    "set_poll_policy",
    "start_soon",
    "statistics",
    "submit",
    "synchronize",
    "to_host",
    "wait_all",
    "with_timeout",
]

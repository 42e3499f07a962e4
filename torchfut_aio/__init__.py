"""Futures of PyTorch that can be awaited.

`Future` is a ``torch.futures.Future`` for ``await`` on asyncio, uvloop and trio.
`as_future` makes one of another kind of future, `start_soon` of an async function;
`gather`, `collect_all`, `wait_all` and `as_completed` take many. A `Batcher` makes one for each
item that its function is run on. A `ValueStream` is for many values, from threads to tasks.

To read the package, follow a completion: ``_future.py`` (the public methods), ``_core/``
(an outcome claims the future and wakes what waits for it), ``_loops/`` (a waiting task is resumed
by its loop, a thread by its lock). Beside these, ``_to_stdlib.py`` makes copies for asyncio and
concurrent.futures; ``_many.py`` and ``_as_completed.py`` are for many futures, ``_adopt/`` adopts
other kinds, ``_tasks.py`` makes futures of tasks, ``_timeouts.py`` gives futures a deadline.
``_waiters.py`` wakes the tasks and threads that wait for one thing.
``task_state.py`` gives tasks what torch keeps for threads.
``_threads.py`` has every thread. ``_errors.py`` has the package's errors, and
``_rpc_errors.py`` translates errors for C++ and from it. ``_devices/`` knows of accelerators: of
the kernels that fill a value, and when they are done. ``_cpython.py`` has all that is private to
CPython, and ``_pytorch.py`` to PyTorch.

``serving/`` has `Batcher` and `ValueStream`.

``distributed/`` is imported by those who use it: async functions as RPC handlers and as DDP hooks.
So is ``debug/``: who waits for which future, and traces.
"""

from ._adopt import as_future
from ._as_completed import as_completed
from ._devices import (
    PollPolicy,
    PollStatistics,
    get_poll_policy,
    poll_statistics,
    set_poll_policy,
    synchronize,
    to_host,
)
from ._errors import (
    BatcherClosedError,
    BlockingWaitWarning,
    CallbackError,
    CancelledError,
    InvalidStateError,
    NotAFutureError,
    QueueFullError,
    RpcError,
    StreamClosedError,
    TaskStateWarning,
)
from ._future import Future
from ._many import collect_all, gather, set_results, wait_all
from ._public import publish
from ._tasks import start_soon
from ._timeouts import with_timeout
from .serving import Batcher, BatcherStatistics, ValueStream
from .task_state import task_local_state

__version__ = "0.1.0"

__all__ = [
    "Batcher",
    "BatcherClosedError",
    "BatcherStatistics",
    "BlockingWaitWarning",
    "CallbackError",
    "CancelledError",
    "Future",
    "InvalidStateError",
    "NotAFutureError",
    "PollPolicy",
    "PollStatistics",
    "QueueFullError",
    "RpcError",
    "StreamClosedError",
    "TaskStateWarning",
    "ValueStream",
    "as_completed",
    "as_future",
    "collect_all",
    "gather",
    "get_poll_policy",
    "poll_statistics",
    "set_poll_policy",
    "set_results",
    "start_soon",
    "synchronize",
    "task_local_state",
    "to_host",
    "wait_all",
    "with_timeout",
]

publish(__name__)

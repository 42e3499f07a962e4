"""Futures of PyTorch that can be awaited.

`Future` is a ``torch.futures.Future`` for ``await`` on asyncio, uvloop and trio.
`as_future` makes one of another kind of future, and `start_soon` of an async function. `gather`,
`collect_all`, `wait_all` and `as_completed` take many futures. A `Batcher` returns one for each
item, and runs a function on many items at once. A `ValueStream` carries many values from threads
to tasks.

To read the package, follow a completion: ``_future.py`` has the public methods, ``_core/`` stores
the outcome and wakes the waiters, and ``_loops/`` resumes the waiting task. The map in
CONTRIBUTING.md lists the other modules. Import ``distributed`` (async functions as RPC handlers and
DDP hooks) and ``debug`` (the waiters of each future, and traces) explicitly.
"""

from . import _extension
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
from .serving import Batcher, BatcherStatistics, BatchReport, ValueStream
from .task_state import task_local_state

__version__ = "0.1.0"

__all__ = [
    "BatchReport",
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
_extension.install()

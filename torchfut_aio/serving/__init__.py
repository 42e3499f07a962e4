"""Tools for servers, on top of futures: `Batcher` and `ValueStream`.

A `Batcher` (``_batcher.py``) runs a function on many items at once: the queue of
``_batch_queue.py`` makes the batches, and the threads of ``_batch_worker.py`` run them; an async
function runs on the loop of ``_owner_loop.py``. A `ValueStream` (``_stream.py``) carries values
from threads to tasks, such as the tokens of an answer; its state is in ``_stream_state.py``.
"""

from ._batch_worker import BatchReport
from ._batcher import Batcher, BatcherStatistics
from ._stream import ValueStream

__all__ = ["BatchReport", "Batcher", "BatcherStatistics", "ValueStream"]

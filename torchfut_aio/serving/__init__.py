"""Tools for servers, on top of futures: `Batcher` and `ValueStream`.

A `Batcher` (``_batcher.py``) runs a function on many items at once, in the thread of
``_batch_worker.py``; an async function runs on the loop of ``_owner_loop.py``. A `ValueStream`
(``_stream.py``) carries values from threads to tasks, such as the tokens of an answer; its state is
in ``_stream_state.py``.
"""

from ._batcher import Batcher, BatcherStatistics
from ._stream import ValueStream

__all__ = ["Batcher", "BatcherStatistics", "ValueStream"]

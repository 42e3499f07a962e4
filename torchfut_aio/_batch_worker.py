"""The thread of a batcher: it takes what is queued in batches, and completes the futures.

The queue is the worker's ``work``: each future, with its item and when that was submitted. The
batch that runs is in ``batch``. These rules keep every future from being lost:

1. A future stays in ``work`` or ``batch`` until it is done, or whoever submitted it was told that
   it was not. It is put into ``batch`` before it is taken out of ``work``.
2. A thread that begins fails what it finds in ``batch``: the thread before it was interrupted, by
   MemoryError, say. It does not run these items again.
3. No batch begins once ``ended`` is done. Who completes ``ended`` looks at ``work`` afterwards,
   and who submits looks at ``ended`` afterwards: one of them sees the other, and fails what is
   queued.

`Worker` sees to the rest: there is a thread while there is work.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

from ._errors import BatcherClosedError, drop_catching_frame
from ._future import Future, InternalFuture
from ._set_results import set_results
from ._worker import Worker, WorkerThread

_LINGER = 10.0  # seconds for which a thread waits for more; to start one takes a tenth of a ms
_LOOK = 0.1  # seconds after which a thread that waits looks whether the interpreter exits


class BatchWorker(Worker):
    """Runs ``function`` on lists of items, which returns their results in order.

    Attributes:
        batch: The futures and items that are run now.
        closing: Whether the thread is to end when nothing is queued.
        ended: Done when the function will run no more.
        batches, items, rejected, skipped, waited, ran: As in `BatcherStatistics`.
    """

    daemon = False  # the function may block in torch

    def __init__(
        self, function: Callable[[list[Any]], Any], max_batch: int, max_wait: float, name: str
    ) -> None:
        super().__init__(name)
        self.function = function
        self.max_batch = max_batch
        self.max_wait = max_wait
        self.batch: list[tuple[Future[Any], Any]] = []
        self.closing = False
        self.ended: Future[None] = InternalFuture()
        self.batches = self.items = self.rejected = self.skipped = 0
        self.waited = self.ran = 0.0
        self._rings_at: float = 1  # so many in the queue
        self._may_purge_at = 0.0

    # ------------------------------------------------------------ for those who submit and close

    def make_room(self, max_queue: int) -> bool:
        """Drops what has been given up; tells whether fewer than ``max_queue`` wait then."""
        start = time.monotonic()
        if start < self._may_purge_at:
            return False
        waiting = self._waiting(max_queue)
        now = time.monotonic()
        self._may_purge_at = now + 20 * (now - start)  # it takes at most 5% of the time
        return len(waiting) < max_queue

    def fail_queued(self, error: BaseException) -> None:
        """Fails all that is queued."""
        futures = [*self.work]
        _fail(futures, error)
        for future in futures:
            self.work.pop(future, None)

    def begin_to_close(self) -> None:
        """Has the thread end when nothing is queued; then ``ended`` is done."""
        self.closing = True
        try:
            self.ensure_thread()
        except RuntimeError as error:  # no thread can be started, so none is running
            self.abandon(error)
        self.ring()

    def abandon(self, error: BaseException) -> None:
        """Fails all that is pending, and has the function run no more, whatever the thread does."""
        self.closing = True
        self.ended.try_set_result(None)
        self.fail_queued(error)
        self._fail_batch(error)

    def _fail_batch(self, error: BaseException) -> None:
        _fail([future for future, _ in self.batch], error)

    def places(self) -> dict[Future[Any], str]:
        """Return where each of its futures is, in words, from any thread."""
        # In this order: a future is put into ``batch`` before it is taken out of ``work``.
        places = dict.fromkeys([*self.work], f"queued in batcher {self.name}")
        running = f"running in batcher {self.name}"
        return {**places, **{entry[0]: running for entry in [*self.batch]}}

    # ---------------------------------------------------------------------------- as a `Worker`

    def has_to_know(self, _future: Any) -> bool:
        return len(self.work) >= self._rings_at

    def has_work(self) -> bool:
        is_closing = self.closing and not self.ended.done()
        return is_closing or bool(self.batch) or super().has_work()

    def after_fork(self) -> None:
        self.batch = []
        super().after_fork()

    def serve(self, _thread: WorkerThread) -> None:
        if self.batch:
            text = "the thread that ran the batch was interrupted before this future was done"
            self._fail_batch(RuntimeError(text))
            self.batch = []
        while self._take_batch():
            self._run_batch()
        if self.ended.done() or (self.closing and not super().has_work()):
            self.ended.try_set_result(None)
            self.fail_queued(BatcherClosedError("the batcher is closed"))

    def _await_batch(self) -> list[Future[Any]]:
        """Waits until it is time to run what is queued; returns nothing if the thread is to end."""
        give_up = time.monotonic() + _LINGER
        while not self.ended.done():
            # Both first: what is submitted before is seen below, and who submits later rings.
            is_last = self.closing or not threading.main_thread().is_alive()
            self._rings_at = 1
            futures = self._waiting(self.max_batch)
            now = time.monotonic()
            if futures:
                self._rings_at = self.max_batch
                _, submitted = self.work.get(futures[0], (None, now))
                left = submitted + self.max_wait - now
                if left <= 0 or len(futures) == self.max_batch or is_last:
                    return futures
            else:
                left = give_up - now
                if left <= 0 or is_last:
                    return []
            self.rest(min(left, _LOOK))
        return []

    def _waiting(self, at_most: int) -> list[Future[Any]]:
        """Returns those that have waited longest; drops what was given up before them."""
        waiting: list[Future[Any]] = []
        self.new.clear()  # all is in ``work``
        for future in [*self.work]:
            if future.done():
                self.skipped += future in self.work  # first, for whoever sees that it has gone
                self.work.pop(future, None)
            else:
                waiting.append(future)
                if len(waiting) == at_most:
                    break
        return waiting

    def _take_batch(self) -> bool:
        """Waits for a batch; returns False if the thread is to end."""
        futures = self._await_batch()
        self._rings_at = math.inf  # it will look again
        now = time.monotonic()
        for future in futures:
            entry = self.work.get(future)
            if entry is not None:  # it was not withdrawn
                item, submitted = entry
                self.batch.append((future, item))
                self.waited += now - submitted
                self.work.pop(future, None)
        return bool(futures)

    def _run_batch(self) -> None:
        futures = [future for future, _ in self.batch]
        items = [item for _, item in self.batch]
        if not items:
            return
        start = time.monotonic()
        try:
            results = _results_of(self.function, items)
        except BaseException as error:
            results = [drop_catching_frame(error)] * len(futures)
        self.batches += 1
        self.items += len(futures)
        self.ran += time.monotonic() - start
        try:
            set_results(futures, results)
        except BaseException as error:  # there was no memory, or a callback raised it
            self._fail_batch(drop_catching_frame(error))
        self.batch = []


def _results_of(function: Callable[[list[Any]], Any], items: list[Any]) -> list[Any]:
    count = len(items)
    returned = function(items)
    try:
        results = [*returned]
    except TypeError:
        if hasattr(type(returned), "__iter__"):
            raise
        kind = type(returned).__qualname__
        raise TypeError(f"the function of a batcher must return a list, not {kind}") from None
    if len(results) != count:
        raise ValueError(f"the function returned {len(results)} results for {count} items")
    return results


def _fail(futures: list[Future[Any]], error: BaseException) -> None:
    """Fails those of the futures that are not done."""
    set_results(futures, [error] * len(futures))

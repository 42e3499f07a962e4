"""The thread of a batcher: it takes what is queued in batches, and completes the futures.

The queue is the worker's ``work``: each future, with its item and when that was submitted. The
batch that runs is in ``batch``. These rules keep every future from being lost:

1. A future stays in ``work`` or ``batch`` until it is done, or whoever submitted it was told that
   it was not. It is put into ``batch`` before it is taken out of ``work``.
2. A thread that begins fails what it finds in ``batch``: the thread before it was struck, by
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
from collections import deque
from collections.abc import Callable
from typing import Any

from ._errors import BatcherClosedError, drop_catching_frame
from ._future import Future
from ._worker import Worker, WorkerThread, call_contained

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
        self.ended: Future[None] = Future()
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
        for future in [*self.work]:
            if given_up(future) and self.work.pop(future, None):
                self.skipped += 1
        now = time.monotonic()
        self._may_purge_at = now + 20 * (now - start)  # it takes at most 5% of the time
        return len(self.work) < max_queue

    def fail_queued(self, error: BaseException) -> None:
        """Fails all that is queued."""
        for future in [*self.work]:
            complete(future, error)
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
        complete(self.ended, None)
        self.fail_queued(error)
        self._fail_batch(error)

    def _fail_batch(self, error: BaseException) -> None:
        for future, _ in [*self.batch]:
            complete(future, error)

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
            text = "the thread that ran the batch was struck before this future was done"
            self._fail_batch(RuntimeError(text))
            self.batch = []
        queue: deque[Future[Any]] = deque()
        while self._await_batch(queue):
            self._rings_at = math.inf  # it will look again
            self._fill_batch(queue)
            self._run_batch()
        if self.ended.done() or (self.closing and not super().has_work()):
            complete(self.ended, None)
            self.fail_queued(BatcherClosedError("the batcher is closed"))

    def _await_batch(self, queue: deque[Future[Any]]) -> bool:
        """Waits until it is time to run what is queued; returns False if the thread is to end."""
        give_up = time.monotonic() + _LINGER
        while not self.ended.done():
            # Read first: what was submitted before that is seen below.
            is_last = self.closing or not threading.main_thread().is_alive()
            self._take_in(queue)
            self._rings_at = self.max_batch if queue else 1
            if self._take_in(queue):  # whoever submitted before that may not have rung
                continue
            now = time.monotonic()
            if queue:
                _, submitted = self.work.get(queue[0], (None, now))
                left = submitted + self.max_wait - now
                if left <= 0 or len(queue) >= self.max_batch or is_last:
                    return True
            else:
                left = give_up - now
                if left <= 0 or is_last:
                    return False
            self.rest(min(left, _LOOK))
        return False

    def _take_in(self, queue: deque[Future[Any]]) -> bool:
        """Adds what is new to the queue, drops what has gone from its head; tells of the new."""
        new = self.take()
        queue.extend(new)
        while queue and (given_up(queue[0]) or queue[0] not in self.work):
            self.skipped += self.work.pop(queue.popleft(), None) is not None
        return bool(new)

    def _fill_batch(self, queue: deque[Future[Any]]) -> None:
        batch = self.batch
        now = time.monotonic()
        while queue and len(batch) < self.max_batch:
            future = queue.popleft()
            entry = self.work.get(future)
            if entry is None:  # it was withdrawn, or is twice in the queue
                continue
            if given_up(future):
                self.skipped += 1
            else:
                batch.append((future, entry[0]))
                self.waited += now - entry[1]
            self.work.pop(future, None)

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
        complete_all(futures, results)
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


def complete_all(futures: list[Future[Any]], results: list[Any]) -> None:
    """Completes each future with its result, or its error if that is an exception."""
    for future, result in zip(futures, results, strict=True):
        try:
            complete(future, result)
        except BaseException as error:
            call_contained(_complete_or_log, future, error)


def _complete_or_log(future: Future[Any], error: BaseException) -> None:
    if future.done():
        raise error  # a callback raised it
    complete(future, drop_catching_frame(error))


def complete(future: Future[Any], result: object) -> None:
    """Completes a future, unless it is done."""
    if isinstance(result, BaseException):
        future.try_set_exception(result)
    else:
        future.try_set_result(result)


def given_up(future: Future[Any]) -> bool:
    """Tells whether nobody wants the future's result any more."""
    return future.done()

"""The thread of a batcher: it takes what is queued in batches, and completes the futures.

The queue is the worker's ``work``: each future, with its item and when that was submitted. The
thread has the same futures in a line, in order, so that a batch costs what is in it, however long
the queue. The batch that runs is in ``batch``. These rules keep every future from being lost:

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

import inspect
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from threading import get_ident
from typing import Any, Protocol

import torch

from .._arguments import hides_async, listed
from .._errors import BatcherClosedError, drop_catching_frame, one_for_each
from .._future import Future, InternalFuture
from .._many import set_results
from .._worker import Worker, WorkerThread

_LINGER = 10.0  # seconds for which a thread waits for more; to start one takes a tenth of a ms
_LOOK = 0.1  # seconds after which a thread that waits looks whether the interpreter exits


# Where an async function runs, and what that calls: the batch that it was called for.
in_batch: ContextVar[object] = ContextVar("torchfut_aio batch", default=None)


class Tally:
    """A count to which any threads add at once, and lose none: each has a part of its own."""

    def __init__(self) -> None:
        self._parts: dict[int, int] = {}  # by thread

    def add(self, number: int = 1) -> None:
        thread = get_ident()
        self._parts[thread] = self._parts.get(thread, 0) + number

    def total(self) -> int:
        return sum([*self._parts.values()])


class Home(Protocol):
    """Where the batches of an async function run."""

    def run(self, function: Callable[[list[Any]], Any], items: list[Any], batch: object) -> Any:
        """Return what the function does, to the thread of the batcher."""


class BatchWorker(Worker):
    """Runs ``function`` on lists of items, which returns their results in order.

    Attributes:
        home: Where the function runs, if it is async; None before a loop has entered the batcher.
        batch: The futures and items that are run now.
        closing: Whether the thread is to end when nothing is queued.
        ended: Done when the function will run no more.
        batches, items, wait_time, run_time: As in `BatcherStatistics`; counted by the thread
            that serves.
        rejected, skipped: The same, of which any thread adds some.
    """

    daemon = False  # the function may block in torch

    def __init__(
        self, function: Callable[[list[Any]], Any], max_batch_size: int, max_wait: float, name: str
    ) -> None:
        super().__init__(name)
        self.function = function
        self.home: Home | None = None
        self.max_batch_size = max_batch_size
        self.max_wait = max_wait
        self.batch: list[tuple[Future[Any], Any]] = []
        self.closing = False
        self.ended: InternalFuture[None] = InternalFuture()
        self.batches = self.items = 0
        self.rejected, self.skipped = Tally(), Tally()
        self.wait_time = self.run_time = 0.0
        self._rings_at: float = 1  # so many in the queue
        self._may_purge_at = 0.0
        self._line: deque[Future[Any]] = deque()  # of the thread that serves

    # ------------------------------------------------------------ for those who submit and close

    def make_room(self, max_queue_size: float) -> bool:
        """Drop what has been given up; return whether fewer than ``max_queue_size`` wait then."""
        start = time.monotonic()
        if start < self._may_purge_at:
            return False
        for future in [*self.work]:
            self._drop_if_done(future)
        now = time.monotonic()
        self._may_purge_at = now + 20 * (now - start)  # it takes at most 5% of the time
        return len(self.work) < max_queue_size

    def is_inside(self) -> bool:
        """Return whether the function calls, or a callback of a future that it completes."""
        running = bool(self.batch) and in_batch.get() == self._id_of_batch()
        return running or threading.current_thread() in self.threads()

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
        except RecursionError:
            raise
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
        self.home = None  # the loop is the parent's
        if not self.ended.done():
            # The parent's loops wait for the other. To wake them could take a lock that another
            # thread held at the fork.
            self.ended = InternalFuture()
        super().after_fork()

    def serve(self, _thread: WorkerThread) -> None:
        self._line.clear()  # of the thread before; all that is queued is new to this one
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
            futures = self._first_in_line()
            now = time.monotonic()
            if futures:
                self._rings_at = self.max_batch_size
                _, submitted = self.work.get(futures[0], (None, now))
                left = submitted + self.max_wait - now
                if left <= 0 or len(futures) == self.max_batch_size or is_last:
                    return futures
            else:
                left = give_up - now
                if left <= 0 or is_last:
                    return []
            self.rest(min(left, _LOOK))
        return []

    def _first_in_line(self) -> list[Future[Any]]:
        """Return the futures of the next batch as it is now; drop those that were given up."""
        line = self._line
        first: dict[Future[Any], None] = {}  # each once, and a new thread may find one twice
        line.extend(self.take())
        while line and len(first) < self.max_batch_size:
            future = line.popleft()
            # One that was withdrawn is not in the queue.
            if not self._drop_if_done(future) and future in self.work:
                first[future] = None
        line.extendleft(reversed(first))
        return [*first]

    def _drop_if_done(self, future: Future[Any]) -> bool:
        done = future.done()
        if done:
            # First, for a caller that sees that it has gone.
            self.skipped.add(future in self.work)
            self.work.pop(future, None)
        return done

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
                self.wait_time += now - submitted
                self.work.pop(future, None)
        return bool(futures)

    def _run_batch(self) -> None:
        futures = [future for future, _ in self.batch]
        if not futures:
            return
        start = time.monotonic()
        try:
            results = self._results([item for _, item in self.batch])
        except BaseException as error:
            results = one_for_each(drop_catching_frame(error), len(futures))
        self.batches += 1
        self.items += len(futures)
        self.run_time += time.monotonic() - start
        try:
            set_results(futures, results)
        except BaseException as error:  # there was no memory, or a callback raised it
            self._fail_batch(drop_catching_frame(error))
        self.batch = []
        # The frames of an error lead here, so that it would never be freed without the collector.
        del futures, results

    def _results(self, items: list[Any]) -> list[Any]:
        count = len(items)
        if self.home is None:
            returned = self.function(items)
        else:
            returned = self.home.run(self.function, items, self._id_of_batch())
        if inspect.iscoroutine(returned):
            returned.close()
            raise TypeError(hides_async(self.function))
        results = listed(returned, "the function of a batcher must return")
        if len(results) != count:
            raise ValueError(f"the function returned {len(results)} results for {count} items")
        if issubclass(type(returned), torch.Tensor):
            # A row is for one client: to send it would send the storage, with those of all others.
            results = [row.clone() for row in results]
        return results

    def _id_of_batch(self) -> object:
        return id(self), self.batches


def _fail(futures: list[Future[Any]], error: BaseException) -> None:
    """Fail those of the futures that are not done."""
    set_results(futures, one_for_each(error, len(futures)))

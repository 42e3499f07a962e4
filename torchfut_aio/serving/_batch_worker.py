"""The thread of a batcher: it takes queued items in batches, and completes their futures.

The queue is the worker's ``work``: each future, with its item and the time of its submission.
``batch`` is the batch that runs. These rules keep every future from being lost:

1. A future stays in ``work`` or ``batch`` until it is done, unless its submission has raised.
2. A thread that begins fails what it finds in ``batch``: an error has ended the thread before it.
3. No batch begins once ``has_ended`` is True. The thread that sets it fails the queue afterwards. A
   thread that submits queues its future, then reads it. So one of the two fails a late future.
"""

from __future__ import annotations

import inspect
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any

import torch

from .. import _core
from .._arguments import hides_async, listed
from .._devices import Moment
from .._errors import BatcherClosedError, drop_catching_frame, one_for_each
from .._future import Future, InternalFuture
from .._threads import Worker, WorkerThread
from ._owner_loop import OwnerLoop, in_batch

_LINGER = 10.0  # seconds for which an idle thread waits for items
_POLL_INTERVAL = 0.1  # seconds between two checks of whether the interpreter exits


class Tally:
    """A count to which threads add without a lock: each thread adds to a separate part."""

    def __init__(self) -> None:
        self._parts: dict[int, int] = {}  # by thread

    def add(self, number: int = 1) -> None:
        thread = get_ident()
        self._parts[thread] = self._parts.get(thread, 0) + number

    def total(self) -> int:
        return sum([*self._parts.values()])


class BatchWorker(Worker):
    """Runs ``function`` on lists of items, which returns their results in order.

    Attributes:
        owner: The loop that runs the function, if it is async; None before one has entered the
            batcher.
        batch: The futures and items that are run now.
        closing: Whether the thread ends when nothing is queued.
        has_ended: Whether the function will run no more; see rule 3.
        ended: A future that is done when ``has_ended`` is True.
        batches, items, wait_time, run_time: As in `BatcherStatistics`; counted by the thread.
        rejected, skipped: The same, counted by all threads.
    """

    def __init__(
        self, function: Callable[[list[Any]], Any], max_batch_size: int, max_wait: float, name: str
    ) -> None:
        super().__init__(name, daemon=False)  # the function may block in torch
        self.function = function
        self.owner: OwnerLoop | None = None
        self.max_batch_size = max_batch_size
        self.max_wait = max_wait
        self.batch: list[tuple[Future[Any], Any]] = []
        self.closing = self.has_ended = False
        self.ended: InternalFuture[None] = InternalFuture()
        self.batches = self.items = 0
        self.rejected, self.skipped = Tally(), Tally()
        self.wait_time = self.run_time = 0.0
        self._wakes_at: float = 1  # a submission wakes the thread if so many are queued
        self._may_purge_at = 0.0
        # The queued futures in order, for the thread that runs. So a batch takes the same time
        # however many are queued.
        self._line: deque[Future[Any]] = deque()

    # ----------------------------------------------------------------- submitting and closing

    def make_room(self, max_queue_size: float) -> bool:
        """Drop items that were given up; return True if then fewer than ``max_queue_size`` wait."""
        start = time.monotonic()
        if start < self._may_purge_at:
            return False
        for future in [*self.work]:
            self._drop_if_done(future)
        now = time.monotonic()
        self._may_purge_at = now + 20 * (now - start)  # so this takes at most 5% of the time
        return len(self.work) < max_queue_size

    def is_inside(self) -> bool:
        """Return True if the function calls, or a callback of a future that it completes."""
        running = bool(self.batch) and in_batch.get() == self._id_of_batch()
        return running or threading.current_thread() in self.threads()

    def fail_queued(self, error: BaseException) -> None:
        futures = [*self.work]
        _complete(futures, one_for_each(error, len(futures)))
        for future in futures:
            self.work.pop(future, None)

    def begin_to_close(self) -> None:
        """Let the thread end when nothing is queued; ``ended`` is done then."""
        self.closing = True
        try:
            self.ensure_thread()
        except RecursionError:
            raise
        except RuntimeError as error:  # no thread can be started, so none is running
            self.abandon(error)
        self.wake()

    def abandon(self, error: BaseException) -> None:
        """Fail every pending item, and run the function no more, whatever the thread does."""
        self.closing = True
        self.finish()  # *before* the queue fails: rule 3
        self.fail_queued(error)
        self._fail_batch(error)

    def finish(self) -> None:
        self.has_ended = True
        self.ended.try_set_result(None)

    def _fail_batch(self, error: BaseException) -> None:
        futures = [future for future, _ in self.batch]
        _complete(futures, one_for_each(error, len(futures)))

    def places(self) -> dict[Future[Any], str]:
        """Return where each of its futures is, in words, from any thread."""
        # Read `work` *before* `batch`: a future moves from one to the other.
        places = dict.fromkeys([*self.work], f"queued in batcher {self.name}")
        running = f"running in batcher {self.name}"
        return {**places, **{entry[0]: running for entry in [*self.batch]}}

    # ---------------------------------------------------------------------------- as a `Worker`

    def needs_wakeup(self, _future: Any) -> bool:
        return len(self.work) >= self._wakes_at

    def has_work(self) -> bool:
        is_closing = self.closing and not self.ended.done()
        return is_closing or bool(self.batch) or super().has_work()

    def after_fork(self) -> None:
        self.batch = []
        self.owner = None  # the loop is the parent's
        if not self.ended.done():
            self.has_ended = False
            # A new future, as tasks of the parent wait for the old one. To wake them could take a
            # lock that another thread held at the fork.
            self.ended = InternalFuture()
        super().after_fork()

    def run(self, _thread: WorkerThread) -> None:
        self._line.clear()  # take() returns the whole queue to a new thread
        if self.batch:  # rule 2
            text = "the thread that ran the batch was interrupted before this future was done"
            self._fail_batch(RuntimeError(text))
            self.batch = []
        while self._run_next_batch():
            pass
        if self.has_ended or (self.closing and not super().has_work()):
            self.finish()
            self.fail_queued(BatcherClosedError("the batcher is closed"))

    def _next_batch(self) -> list[Future[Any]]:
        """Wait for a batch, and return its futures; return none if the thread should end."""
        line, give_up, is_woken = self._line, time.monotonic() + _LINGER, True
        while not self.has_ended:
            # Both *before* take(), which returns what was submitted until now. Items that come
            # later wake the thread.
            is_last = self.closing or not threading.main_thread().is_alive()
            self._wakes_at = 1
            line.extend(self.take())
            now = time.monotonic()
            left = give_up - now
            if line:
                self._wakes_at = self.max_batch_size
                _, submitted = self.work.get(line[0], (None, now))
                left = submitted + self.max_wait - now
                # Check for futures that are done only if a batch seems due: it takes time.
                if left <= 0 or len(line) >= self.max_batch_size or is_last or not is_woken:
                    futures = self._first_in_line()
                    if not futures:
                        continue
                    _, submitted = self.work.get(futures[0], (None, now))
                    left = submitted + self.max_wait - now
                    if left <= 0 or len(futures) == self.max_batch_size or is_last:
                        return futures
                    line.extendleft(reversed(futures))  # too few are left: put them back
            elif left <= 0 or is_last:
                break
            is_woken = self.rest(min(left, _POLL_INTERVAL))
        return []

    def _first_in_line(self) -> list[Future[Any]]:
        """Take the next batch out of the line. Drop items that were given up."""
        first: dict[Future[Any], None] = {}  # not a list: a new thread may find a future twice
        while self._line and len(first) < self.max_batch_size:
            future = self._line.popleft()
            # One that was withdrawn is not in the queue.
            if not self._drop_if_done(future) and future in self.work:
                first[future] = None
        return [*first]

    def _drop_if_done(self, future: Future[Any]) -> bool:
        done = future.done()
        if done:
            # Count *before* the removal: statistics that no longer show the item as queued must
            # show it as skipped.
            self.skipped.add(future in self.work)
            self.work.pop(future, None)
        return done

    def _run_next_batch(self) -> bool:
        """Wait for a batch and run it. Return False if the thread should end."""
        futures = self._next_batch()
        self._wakes_at = math.inf  # the thread will check the queue before it rests
        start = time.monotonic()
        for future in futures:
            entry = self.work.get(future)
            if entry is not None:  # it was not withdrawn
                item, submitted = entry
                self.wait_time += start - submitted
                self.batch.append((future, item))  # *before* it leaves the queue: rule 1
                self.work.pop(future, None)
        if not self.batch:
            return bool(futures)
        futures, items = map(list, zip(*self.batch, strict=True))
        try:
            results = self._results(items)
        except BaseException as error:
            results = one_for_each(drop_catching_frame(error), len(futures))
        self.batches += 1
        self.items += len(futures)
        self.run_time += time.monotonic() - start
        try:
            _complete(futures, results)
        except BaseException as error:  # a callback raised it, or there was no memory
            self._fail_batch(drop_catching_frame(error))
        self.batch = []  # not earlier: rule 1
        # The frames of an error lead here. If they led back to it, only the garbage collector could
        # free it.
        del future, futures, results
        return True

    def _results(self, items: list[Any]) -> list[Any]:
        count = len(items)
        if self.owner is None:
            returned = self.function(items)
        else:
            returned = self.owner.run(self.function, items, self._id_of_batch())
        if inspect.iscoroutine(returned):
            returned.close()
            raise TypeError(hides_async(self.function))
        results = listed(returned, "the function of a batcher must return")
        if len(results) != count:
            raise ValueError(f"the function returned {len(results)} results for {count} items")
        if issubclass(type(returned), torch.Tensor):
            # A row shares the storage of all rows. If it were sent to its client, the rows of
            # other clients would be sent with it.
            results = [row.clone() for row in results]
        return results

    def _id_of_batch(self) -> object:
        return id(self), self.batches


def _complete(futures: Sequence[Future[Any]], results: Sequence[Any]) -> None:
    """Complete the futures that are pending, each with its value or error."""
    moment = Moment()
    _core.complete_all(futures, [_core.outcome_of_result(each, (), moment) for each in results])

"""The queue of a batcher: it makes the batches, and knows when the batcher has ended.

``items`` maps each queued future to its item and the time of its submission. The workers take turns
in making batches, so batches are made in the order of submission. These rules keep every future
from being lost:

1. A future stays in ``items`` or in the ``batch`` of a worker until it is done, unless its
   submission has raised. To delete it from ``items`` is to decide what happens to it: it is run, or
   it was given up.
2. A thread that begins fails what it finds in the ``batch`` of its worker: an error has ended the
   thread before it.
3. No batch is made once ``has_ended`` is True. The thread that sets it fails the queue afterwards.
   A thread that submits queues its future, then reads it. So one of the two fails a late future.
4. A worker that waits sets ``wakes_at``, then checks for items. A thread that submits queues its
   future, then reads ``wakes_at``.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import _core
from .._arguments import number_checked
from .._cpython import Queue
from .._errors import BatcherClosedError, QueueFullError, drop_catching_frame, one_for_each
from .._future import Future, InternalFuture
from .._threads import LONGEST_REST, is_exiting, program_runs
from .._waiters import first
from ._owner_loop import OwnerLoop

if TYPE_CHECKING:
    from ._batch_worker import BatchWorker

_REST_AT_EXIT = 0.1  # seconds between two checks of whether threads of the program still run

_Entry = tuple[Future[Any], tuple[Any, float]]


class Tally:
    """A count to which threads add without a lock: each thread adds to a separate part."""

    def __init__(self) -> None:
        self._parts: dict[int, int] = {}  # by thread

    def add(self, number: int = 1) -> None:
        thread = get_ident()
        self._parts[thread] = self._parts.get(thread, 0) + number

    def total(self) -> int:
        return sum([*self._parts.values()])


class Limits(NamedTuple):
    """The arguments of a `Batcher` that decide which items form a batch."""

    max_batch_size: int
    max_queue_size: float
    max_wait: float
    cost: Callable[[list[Any]], float] | None
    max_batch_cost: float


class BatchQueue:
    """The items of a batcher that wait for a batch.

    Attributes:
        items: The queued futures in order, each with its item and the time of its submission.
        workers: The workers that run the batches. The first has a thread while an item is queued.
        owner: The loop that runs the function, if it is async; None before one has entered the
            batcher.
        closing: Whether no more items are accepted.
        exiting: Whether the interpreter exits, so that no batch waits for more items.
        has_ended: Whether the function will run no more; see rule 3.
        ended: A future that is done when ``has_ended`` is True.
        ready: A future that is done when each worker has called the initializer, or one failed.
        broken: The error with which an initializer has failed, or None.
        rejected, given_up: As in `BatcherStatistics`.
    """

    def __init__(self, name: str, limits: Limits) -> None:
        self.name = name
        self.limits = limits
        self.workers: list[BatchWorker] = []
        self.closing = self.has_ended = False
        self.rejected, self.given_up = Tally(), Tally()
        self.ended: InternalFuture[None] = InternalFuture()
        self._may_purge_at = 0.0
        self.reset()

    def reset(self) -> None:
        """Empty the queue, for a new process."""
        self.items: dict[Future[Any], tuple[Any, float]] = Queue()
        self.owner: OwnerLoop | None = None  # the loop is the parent's
        self.broken: BaseException | None = None
        self.ready: InternalFuture[None] = InternalFuture()
        self._turn = threading.Lock()  # only workers take it
        self._wakeups: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._wakes_at: float = 1  # a submission wakes the worker if so many are queued
        self.exiting = is_exiting()
        if not self.ended.done():
            self.has_ended = False
            # A new future, as tasks of the parent wait for the old one. To wake them could take a
            # lock that another thread held at the fork.
            self.ended = InternalFuture()

    # ------------------------------------------------------------------------- beginning

    def start(self) -> InternalFuture[None]:
        """Start the threads, and return ``ready``.

        Raises:
            RuntimeError: No thread could be started.
        """
        for worker in self.workers:
            worker.ensure_thread()
        self.check_ready()  # without an initializer, there is nothing to wait for
        return self.ready

    def check_ready(self) -> None:
        """Complete ``ready`` if it is time."""
        if self.broken is not None or all(worker.is_ready for worker in self.workers):
            self.ready.try_set_result(None)

    # ---------------------------------------------------------------------- submitting

    def put(self, future: Future[Any], item: Any) -> None:
        """Queue an item.

        Raises:
            BatcherClosedError, QueueFullError: The item is refused.
            RuntimeError: No thread could be started.
        """
        if self.closing:
            self.check_open()
        items = self.items
        if len(items) >= self.limits.max_queue_size and not self._make_room():
            self.rejected.add()
            raise QueueFullError(f"the queue is full: {self.limits.max_queue_size} items wait")
        try:
            items[future] = (item, time.monotonic())
            worker = self.workers[0]
            if (active := worker.active) is None or not active.is_polling:
                worker.ensure_thread()
            if len(items) >= self._wakes_at and self._wakeups.empty():  # rule 4, and wake()
                self._wakeups.put(None)
        except BaseException:
            items.pop(future, None)
            raise
        if self.has_ended:  # rule 3
            self.fail_queued(BatcherClosedError("the batcher is closed"))

    def check_open(self) -> None:
        """Raise BatcherClosedError if the queue takes no more items."""
        if self.closing:
            raise BatcherClosedError("the batcher is closed and takes no more items")

    def wake(self) -> None:
        """Wake the worker that waits for items."""
        if self._wakeups.empty():  # one is enough: a worker checks for items after it has taken it
            self._wakeups.put(None)

    def give_up(self, future: Future[Any]) -> None:
        """Let the item of ``future`` leave the queue, unless it is there no more."""
        if self.items.pop(future, None) is None:  # rule 1
            return
        outcome = _core.outcome_of(future)
        # Another thread may be failing the queue, as the batcher closes.
        if outcome is None or not isinstance(outcome.error, BatcherClosedError):
            self.given_up.add()

    def _make_room(self) -> bool:
        """Drop items that were given up; return True if then the queue is not full."""
        start = time.monotonic()
        if start < self._may_purge_at:
            return False
        for future in [*self.items]:
            if future.done():
                self.give_up(future)
        now = time.monotonic()
        self._may_purge_at = now + 20 * (now - start)  # so this takes at most 5% of the time
        return len(self.items) < self.limits.max_queue_size

    def oldest(self) -> float | None:
        """Return when the oldest item was submitted. Drop those before it that were given up."""
        while (future := first(self.items)) is not None:
            if future.done():
                self.give_up(future)
            elif (entry := self.items.get(future)) is not None:
                return entry[1]
        return None

    # -------------------------------------------------------------------- making batches

    def fill(self, worker: BatchWorker) -> bool:
        """Wait for a batch and move it to ``worker``; return False if its thread should end."""
        with self._turn:
            self._wait_for_batch(worker)
        if len(self.workers) > 1 and worker.batch and not self.closing and not self.exiting:
            self._start_others()
        return bool(worker.batch)

    def _wait_for_batch(self, worker: BatchWorker) -> None:
        limits = self.limits
        while not self.has_ended and not worker.batch:
            # Both *before* the check for items: those that come later wake the worker.
            is_last = self.closing or self.exiting
            self._wakes_at = 1
            try:
                entries = [*islice(self.items.items(), limits.max_batch_size)]
            except RecursionError:
                raise
            except RuntimeError:  # a finaliser or another thread has just changed it
                continue
            seconds = LONGEST_REST if not self.exiting else _REST_AT_EXIT
            if entries:
                left = entries[0][1][1] + limits.max_wait - time.monotonic()
                count = len(entries)
                if limits.cost is not None:
                    count = self._fitting(entries)
                else:  # with a cost, any further item may fill the batch
                    self._wakes_at = limits.max_batch_size
                is_full = len(entries) == limits.max_batch_size or count < len(entries)
                if left <= 0 or is_full or is_last:
                    if not self._drop_given_up(entries):
                        self._move(entries[:count] or entries[:1], worker)
                    continue
                seconds = min(left, seconds)
            elif self.closing or (self.exiting and not program_runs()):
                break
            del entries  # a rest holds no reference to an item
            with suppress(queue.Empty):
                self._wakeups.get(timeout=seconds if seconds < threading.TIMEOUT_MAX else None)
            self.exiting = is_exiting()
        self._wakes_at = math.inf  # until a worker waits, no submission has to wake one
        if not worker.batch and self.closing and not self.items and not self.runs():
            self.finish()

    def _start_others(self) -> None:
        for worker in self.workers[1:]:
            try:
                worker.ensure_thread()
            except RecursionError:
                raise
            except RuntimeError:  # the workers that have a thread run all batches
                return

    def _drop_given_up(self, entries: Sequence[_Entry]) -> bool:
        """Remove entries whose futures are done; return False if there are none."""
        found = False
        for future, _ in entries:
            if future.done():
                found = True
                self.give_up(future)
        return found

    def _move(self, entries: Sequence[_Entry], worker: BatchWorker) -> None:
        """Move to ``worker`` the entries before the first one that is refused alone."""
        if self.limits.cost is not None:
            entries = self._before_refused(entries) or entries[:1]
            worker.cost, worker.refusal = self._cost(_items(entries))
            if worker.refusal is not None and len(entries) > 1:  # the costs contradict each other
                entries = entries[:1]
                worker.cost, worker.refusal = self._cost(_items(entries))
            if self._drop_given_up(entries):  # the function took time
                return
        worker.began = time.monotonic()
        for future, (item, submitted) in entries:
            worker.batch.append((future, item, submitted))  # *before* it leaves the queue: rule 1
            if self.items.pop(future, None) is None:  # it was given up
                del worker.batch[-1]
        if not worker.batch:
            worker.end_batch()

    def _fitting(self, entries: Sequence[_Entry]) -> int:
        """Return how many of the first entries cost at most as much as a batch may."""
        items = _items(entries)
        if self._cost(items)[1] is None:
            return len(items)
        fitting, refused = 0, len(items)
        while refused - fitting > 1:  # the first `fitting` items fit, the first `refused` do not
            middle = (fitting + refused) // 2
            if self._cost(items[:middle])[1] is None:
                fitting = middle
            else:
                refused = middle
        return fitting

    def _before_refused(self, entries: Sequence[_Entry]) -> Sequence[_Entry]:
        """Return the entries before the first one that would be refused alone."""
        for place, entry in enumerate(entries):
            if self._cost(_items([entry]))[1] is not None:
                return entries[:place]
        return entries

    def _cost(self, items: list[Any]) -> tuple[float | None, BaseException | None]:
        """Return the cost of items, or the error if they cannot form a batch."""
        limits = self.limits
        assert limits.cost is not None
        try:
            cost = number_checked(limits.cost([*items]), "cost() must return a number")
            if cost < 0:
                raise ValueError(f"cost() must not return a negative number, such as {cost:g}")
            if cost > limits.max_batch_cost:
                raise ValueError(
                    f"the item costs {cost:g}, and max_batch_cost is {limits.max_batch_cost:g}"
                )
        except BaseException as error:
            return None, drop_catching_frame(error)
        return cost, None

    # --------------------------------------------------------------------------- ending

    def runs(self) -> bool:
        """Return True if a batch runs, or is being reported."""
        return any(worker.batch for worker in self.workers)

    def has_work(self) -> bool:
        """Return True if the function runs, or will run."""
        return bool(self.items) or any(worker.running() for worker in self.workers)

    def is_inside(self) -> bool:
        """Return True if the function calls, or a callback of a future that it completes."""
        return any(worker.is_inside() for worker in self.workers)

    def fail_queued(self, error: BaseException) -> None:
        """Fail every queued item."""
        futures = [*self.items]
        complete(futures, one_for_each(error, len(futures)))
        for future in futures:
            self.items.pop(future, None)

    def begin_to_close(self) -> None:
        """Let the workers end when nothing is queued; ``ended`` is done then."""
        self.closing = True
        try:
            self.workers[0].ensure_thread()
        except RecursionError:
            raise
        except RuntimeError as error:  # no thread can be started, so none is running
            self.abandon(error)
        self.wake()

    def abandon(self, error: BaseException) -> None:
        """Fail every pending item, and run the function no more, whatever the threads do."""
        self.closing = True
        self.finish()  # *before* the queue fails: rule 3
        self.fail_queued(error)
        for worker in self.workers:
            worker.fail_batch(error)

    def finish(self) -> None:
        self.has_ended = True
        self.ready.try_set_result(None)
        self.ended.try_set_result(None)

    def places(self) -> dict[Future[Any], str]:
        """Return where each of its futures is, in words, from any thread."""
        # Read `items` *before* the batches: a future moves from one to the other.
        places = dict.fromkeys([*self.items], f"queued in batcher {self.name}")
        for worker in self.workers:
            running = f"running in batcher {self.name}"
            places |= {entry[0]: running for entry in [*worker.batch]}
        return places


def _items(entries: Sequence[_Entry]) -> list[Any]:
    return [item for _, (item, _) in entries]


def complete(futures: Sequence[Future[Any]], results: Sequence[Any]) -> None:
    """Complete the futures that are pending, each with its value or error."""
    _core.complete_all(futures, _core.outcomes_of_results(futures, results))

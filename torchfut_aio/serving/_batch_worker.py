"""The workers of a batcher: each runs batches of the queue, in a thread that lives as long."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from .. import _core
from .._arguments import hides_async, listed
from .._errors import BatcherClosedError, drop_catching_frame, one_for_each, own_copy
from .._future import Future
from .._threads import Worker, WorkerThread, call_contained
from ._batch_queue import BatchQueue, complete
from ._owner_loop import in_batch

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchReport(Generic[T]):
    """What is known of a batch that has run.

    Attributes:
        name: The name of the batcher.
        items: The items, in the order in which they were submitted.
        cost: What ``cost`` returned for them; None if the batcher has no such function.
        wait_times: The time that each item had waited, in seconds.
        run_time: The time for which the function ran, in seconds.
        error: The exception with which the batch failed, or None. An exception among the results
            fails one item only, and is not an error of the batch.
    """

    name: str
    items: list[T]
    cost: float | None
    wait_times: list[float]
    run_time: float
    error: BaseException | None


class BatchWorker(Worker):
    """Runs ``function`` on the batches of a queue.

    Attributes:
        number: Its place among the workers of the queue.
        batch: The futures that are run now, each with its item and the time of its submission.
        began: When ``batch`` was made; None once the function has returned.
        cost: The cost of ``batch``; None if the batcher has no such function.
        refusal: Why the only item of ``batch`` is not run, or None.
        is_ready: Whether a thread of the worker has called the initializer.
        batches, items, failed, wait_time, run_time: As in `BatcherStatistics`.
    """

    def __init__(
        self,
        queue: BatchQueue,
        function: Callable[[list[Any]], Any],
        initializer: Callable[[int], object] | None,
        on_batch: Callable[[BatchReport[Any]], object] | None,
    ) -> None:
        super().__init__(queue.name, daemon=False)  # the function may block in torch
        self.queue = queue
        self.number = len(queue.workers)
        self._function = function
        self._initializer = initializer
        self._on_batch = on_batch
        self._initialized: WorkerThread | None = None  # in this thread
        self.is_ready = initializer is None
        self.batch: list[tuple[Future[Any], Any, float]] = []
        self.began: float | None = None
        self.cost: float | None = None
        self.refusal: BaseException | None = None
        self.batches = self.items = self.failed = 0
        self.wait_time = self.run_time = 0.0

    def running(self) -> int:
        """Return the number of items on which the function runs now."""
        return len(self.batch) if self.began is not None else 0

    def is_inside(self) -> bool:
        """Return True if the function calls, or a callback of a future that it completes."""
        running = bool(self.batch) and in_batch.get() == self._id_of_batch()
        return running or threading.current_thread() in self.threads()

    def fail_batch(self, error: BaseException) -> None:
        futures = [entry[0] for entry in [*self.batch]]
        complete(futures, one_for_each(error, len(futures)))

    # ---------------------------------------------------------------------------- as a `Worker`

    def has_work(self) -> bool:
        queue = self.queue
        # A copy locks the dict where there is no GIL, len() does not.
        if bool(self.batch) or bool([*queue.items]):
            return True
        if queue.closing:  # the last worker to run a batch lets the batcher end
            return not queue.ended.done() and not queue.runs()
        return not self.is_ready

    def wake(self) -> None:
        self.queue.wake()

    def after_fork(self) -> None:
        super().after_fork()
        self.batch = []
        self.began = None
        self.is_ready = self._initializer is None
        if self.number == 0:
            self.queue.reset()

    def run(self, thread: WorkerThread) -> None:
        queue = self.queue
        if self.batch:  # rule 2 of the queue
            text = "the thread that ran the batch was interrupted before this future was done"
            self.fail_batch(RuntimeError(text))
            self.end_batch()
        if self._initialized is not thread and not (queue.closing and not queue.items):
            self._initialized = thread
            self._initialize()
        while queue.fill(self):
            self._run_batch()
            self.end_batch()
        if queue.has_ended:
            queue.fail_queued(BatcherClosedError("the batcher is closed"))

    def _initialize(self) -> None:
        if self._initializer is not None:
            try:
                returned: Any = self._initializer(self.number)
                if inspect.iscoroutine(returned):
                    returned.close()
                    raise TypeError(hides_async(self._initializer))
            except BaseException as error:
                self.queue.broken = drop_catching_frame(error)
        self.is_ready = True
        self.queue.check_ready()

    def _run_batch(self) -> None:
        futures, items, submitted = map(list, zip(*self.batch, strict=True))
        start = time.monotonic()
        error = self.refusal
        if self.queue.broken is not None:
            error = own_copy(self.queue.broken)
        runs = error is None
        try:
            results = self._results(items) if error is None else one_for_each(error, len(futures))
        except BaseException as raised:
            error = drop_catching_frame(raised)
            results = one_for_each(error, len(futures))
        run_time = time.monotonic() - start
        if runs:
            self.batches += 1
            self.items += len(futures)
            self.wait_time += len(futures) * start - sum(submitted)
            self.run_time += run_time
        reports = self._on_batch is not None and runs
        # A copy for the report, made now: as clients raise the error, it gets their frames.
        reported = own_copy(error) if reports and error is not None else None
        self.began = None  # before the futures are done: a client may read the statistics then
        try:
            self._complete(futures, results)
        except BaseException as raised:  # a callback raised it, or there was no memory
            self.fail_batch(drop_catching_frame(raised))
        if self._on_batch is not None and reports:
            report = BatchReport(
                name=self.name,
                items=[entry[1] for entry in self.batch],  # the function may have changed `items`
                cost=self.cost,
                wait_times=[start - each for each in submitted],
                run_time=run_time,
                error=reported,
            )
            call_contained(self._on_batch, report)
            del report
        # The frames of an error lead here. If they led back to it, only the garbage collector could
        # free it.
        del futures, items, results, error, reported

    def _complete(self, futures: list[Future[Any]], results: list[Any]) -> None:
        outcomes = _core.outcomes_of_results(futures, results)
        errors = set()
        for place, outcome in enumerate(outcomes):
            if outcome.error is not None:
                self.failed += 1
                if id(outcome.error) in errors:  # returned for several items
                    outcomes[place] = _core.outcome_of_error(own_copy(outcome.error))
                    outcome.mark_retrieved()
                errors.add(id(outcome.error))
        _core.complete_all(futures, outcomes)

    def _results(self, items: list[Any]) -> list[Any]:
        count = len(items)
        owner = self.queue.owner
        if owner is None:
            returned = self._function(items)
        else:
            returned = owner.run(self._function, items, self._id_of_batch())
        if type(returned) is list:
            results = returned
        elif inspect.iscoroutine(returned):
            returned.close()
            raise TypeError(hides_async(self._function))
        else:
            results = listed(returned, "the function of a batcher must return")
        if len(results) != count:
            raise ValueError(f"the function returned {len(results)} results for {count} items")
        if issubclass(type(returned), torch.Tensor):
            # A row shares the storage of all rows. If it were sent to its client, the rows of
            # other clients would be sent with it.
            results = [row.clone() for row in results]
        return results

    def end_batch(self) -> None:
        self.began = self.cost = self.refusal = None
        self.batch = []  # last: rule 1 of the queue

    def _id_of_batch(self) -> object:
        return id(self), self.batches

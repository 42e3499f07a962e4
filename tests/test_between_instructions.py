"""Steps of another thread between any two instructions of this thread.

With a GIL, threads switch only at calls and backward jumps. Without one, another thread may run a
whole step between any two instructions of this one, for example between a check of an attribute and
its use. These tests run such a step at each instruction in turn, on any build. (Steps that overlap
within one instruction are in test_races.py.)
"""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
import time
from contextlib import suppress

import anyio
import pytest

import torchfut_aio
from torchfut_aio import (
    Batcher,
    BatcherClosedError,
    Future,
    InvalidStateError,
    StreamClosedError,
    ValueStream,
    _core,
    _many,
    _timeouts,
    as_completed,
    gather,
    with_timeout,
)
from torchfut_aio._core import Promise
from torchfut_aio._threads import QueueWorker, WorkerThread

from .explorer import interrupts
from .test_stress import every_loop
from .threads import PATIENCE
from .waiting import waiting


def between_instructions(step, *modules):
    """Yield an interrupt for each instruction of the package, or of some of its modules.

    At that point another thread calls ``step.now()``; set `now` before each run.
    """
    errors = []

    def contained():
        try:
            step.now()
        except BaseException as error:
            errors.append(error)

    def do():
        thread = threading.Thread(target=contained)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "it waits for this thread"

    for interrupt in interrupts(*(modules or [torchfut_aio]), do=do, at="instructions"):
        yield interrupt
        assert not errors, (interrupt.where, errors)


class Step:
    """The other thread's step: set `now` before each run."""


@pytest.fixture
def other():
    return Step()


def try_set(fut, value):
    with suppress(InvalidStateError):
        fut.set_result(value)


# ----------------------------------------------------------------------------- futures


def test_first_of_two_setters_wins(other):
    for interrupt in between_instructions(other):
        fut = Future()
        other.now = lambda: try_set(fut, "other")
        with interrupt:
            try_set(fut, "own")
        assert fut.wait(PATIENCE) in ("own", "other")


@pytest.mark.parametrize("others", [0, 2])
def test_callback_added_during_completion_runs_once(other, others):
    for interrupt in between_instructions(other):
        fut, ran = Future(), []
        for _ in range(others):
            fut.add_done_callback(lambda _: None)
        other.now = lambda: fut.set_result(1)
        with interrupt:
            fut.add_done_callback(ran.append)
        if not fut.done():
            fut.set_result(1)
        assert ran == [fut], interrupt


@pytest.mark.parametrize("others", [0, 2])
def test_callback_is_either_run_or_removed(other, others):
    for interrupt in between_instructions(other):
        fut, ran = Future(), []
        for _ in range(others):
            fut.add_done_callback(lambda _: None)
        fut.add_done_callback(ran.append)
        other.now = lambda: fut.set_result(1)
        with interrupt:
            removed = fut.remove_done_callback(ran.append)
        if not fut.done():
            fut.set_result(1)
        assert removed + len(ran) == 1, interrupt


def test_completion_runs_a_callback_added_meanwhile_once(other):
    for interrupt in between_instructions(other):
        fut, ran = Future(), []
        fut.add_done_callback(lambda _: None)
        other.now = lambda: fut.add_done_callback(ran.append)
        with interrupt:
            fut.set_result(1)
        if not ran:
            other.now()
        assert ran == [fut], interrupt


def test_future_can_be_inspected_during_its_completion(other):
    for interrupt in between_instructions(other):
        fut = Future()
        fut.add_done_callback(lambda _: None)
        other.now = lambda: fut.set_result(1)
        with interrupt:
            shown = repr(fut)
            fut.has_waiters()
            fut.done()
        assert shown.startswith(("<Future pending", "<Future done result=1")), interrupt


def test_child_cancelled_during_completion_has_one_outcome(other):
    for interrupt in between_instructions(other):
        fut = Future()
        child = fut.then(lambda _: "value")
        other.now = child.cancel
        with interrupt:
            fut.set_result(1)
        assert child.done()
        assert child.cancelled() or child.value() == "value"


@pytest.mark.parametrize("own", ["keep", "fail", "end"])
@pytest.mark.parametrize("others", ["keep", "fail"])
def test_promise_is_kept_once_by_two_racing_threads(other, own, others):
    arguments = {"keep": ("value",), "fail": (ValueError(),)}
    for interrupt in between_instructions(other, _core):
        fut = Future()
        promise = Promise(fut, "raced")
        other.now = lambda: getattr(promise, others)(*arguments.get(others, ()))
        with interrupt:
            getattr(promise, own)(*arguments.get(own, ()))
        if interrupt.where is not None:
            assert fut.done(), interrupt
            fut.exception()


def test_timeout_racing_a_completion_has_one_outcome(other):
    for interrupt in between_instructions(other, _core, _timeouts):
        fut = Future()
        child = with_timeout(fut, PATIENCE)
        [deadline] = _core.callbacks_of(fut)
        other.now = lambda: deadline.expire()
        with interrupt:
            fut.set_result("value")
        assert isinstance(child.exception(), TimeoutError) or child.value() == "value"
    for interrupt in between_instructions(other, _core, _timeouts):
        fut = Future()
        child = with_timeout(fut, PATIENCE)
        [deadline] = _core.callbacks_of(fut)
        other.now = lambda: fut.set_result("value")
        with interrupt:
            deadline.expire()
        try_set(fut, "value")
        assert isinstance(child.exception(), TimeoutError) or child.value() == "value"


def test_simultaneous_completions_complete_their_gather(other):
    for interrupt in between_instructions(other):
        first, second = Future(), Future()
        both = gather([first, second])
        other.now = lambda: second.set_result(2)
        with interrupt:
            first.set_result(1)
        try_set(second, 2)
        assert both.wait(PATIENCE) == [1, 2], interrupt


def test_simultaneous_failures_fail_their_gather_once(other):
    for interrupt in between_instructions(other, _core, _many):
        first, second = Future(), Future()
        both = gather([first, second])
        other.now = lambda: second.set_exception(ValueError())
        with interrupt:
            first.set_exception(KeyError())
        if not second.done():
            other.now()
        assert isinstance(both.exception(), (KeyError, ValueError))
        first.exception(), second.exception()


def test_as_completed_never_misses_a_concurrent_completion(other):
    for interrupt in between_instructions(other):
        futures = [Future() for _ in range(2)]
        shared = as_completed(futures)
        futures[0].set_result(None)
        other.now = lambda: futures[1].set_result(None)
        with interrupt:
            first = next(shared)
        try_set(futures[1], None)
        assert [first, *shared] == futures, interrupt


def test_as_concurrent_is_cancelled_or_has_the_value(other):
    for interrupt in between_instructions(other):
        fut = Future()
        copy = fut.as_concurrent()
        other.now = copy.cancel
        with interrupt:
            fut.set_result(1)
        assert copy.cancelled() or copy.result() == 1
    for interrupt in between_instructions(other):
        fut, source = Future(), concurrent.futures.Future()
        adopted = torchfut_aio.as_future(source)
        other.now = lambda: adopted.cancel()
        with interrupt:
            source.set_result(1)
        assert adopted.cancelled() or adopted.value() == 1


# ----------------------------------------------------------------------------- streams


def test_a_value_put_during_a_read_is_read_next(other):
    for interrupt in between_instructions(other):
        stream = ValueStream()
        stream.put(1)
        values = iter(stream)
        other.now = lambda: stream.put(2)
        with interrupt:
            assert next(values) == 1
        if interrupt.where is not None:
            assert next(values) == 2, interrupt


@pytest.mark.parametrize("how", ["next", "get"])
def test_two_reads_at_once_read_different_values(other, how):
    for interrupt in between_instructions(other):
        stream, read = ValueStream(max_size=2), []
        own, others = iter(stream), iter(stream)
        stream.put(1), stream.put(2)
        other.now = lambda: read.append(next(others))
        with interrupt:
            read.append(next(own) if how == "next" else stream.get(timeout=PATIENCE))
        if interrupt.where is not None:
            assert sorted(read) == [1, 2], interrupt
            assert (stream.try_put(3), stream.try_put(4), stream.try_put(5)) == (1, 1, 0)


def test_two_puts_at_once_fill_a_stream_to_its_limit(other):
    for interrupt in between_instructions(other):
        stream, accepted = ValueStream(max_size=1), []
        values = iter(stream)
        other.now = lambda: accepted.append(stream.try_put("other"))
        with interrupt:
            accepted.append(stream.try_put("own"))
        assert sum(accepted) == 1 == len(stream)
        next(values)


def test_a_put_during_a_close_is_read_or_refused(other):
    def put(stream, refused):
        try:
            stream.put(1)
        except StreamClosedError:
            refused.append(1)

    for interrupt in between_instructions(other):
        stream, refused = ValueStream(), []
        other.now = lambda: put(stream, refused)
        with interrupt:
            stream.close()
        if interrupt.where is not None:
            assert [*stream] + refused == [1], interrupt
    for interrupt in between_instructions(other):
        stream, refused = ValueStream(), []
        other.now = stream.close
        with interrupt:
            put(stream, refused)
        stream.close()
        assert [*stream] + refused == [1], interrupt


def test_stream_can_be_iterated_while_it_closes(other):
    for interrupt in between_instructions(other):
        stream = ValueStream()
        stream.stop_listening()
        other.now = stream.close
        # The stream lost its reader before it was closed, so values may be missing.
        with interrupt, pytest.raises(StreamClosedError, match="its values were dropped"):
            iter(stream)


@pytest.mark.parametrize("how", ["dropped", "left"])
def test_a_stream_is_left_by_its_last_iterator_only(other, how):
    def leave(listeners):
        if how == "dropped":
            listeners.clear()
        for values in listeners:
            with values:
                pass

    for interrupt in between_instructions(other):
        stream = ValueStream()
        own, others = [stream.listen()], [stream.listen()]
        other.now = lambda: leave(others)
        with interrupt:
            leave(own)
        assert interrupt.where is None or not stream.listening, interrupt
        leave(others)
        assert not stream.listening


def test_get_returns_with_a_put_at_any_step(other):
    def put(stream, puts):
        with suppress(IndexError):  # the other thread was faster, or the timer
            puts.pop()
            stream.put(1)

    for interrupt in between_instructions(other):
        stream, puts, got = ValueStream(), [None], []
        other.now = lambda: put(stream, puts)
        timer = threading.Timer(0.02, put, (stream, puts))
        timer.start()
        began = time.monotonic()
        with interrupt:
            got.append(stream.get(timeout=PATIENCE))
        assert time.monotonic() - began < PATIENCE, interrupt  # it was woken, and did not time out
        timer.cancel()
        timer.join()
        assert got == [1], interrupt
        assert waiting(stream) == (0, 0), interrupt


# ------------------------------------------------- a task about to wait, or about to resume


@every_loop
def test_await_wakes_with_a_completion_at_any_step(other, backend, options, nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()  # the other thread is joined within the loop

    async def main():
        with anyio.fail_after(PATIENCE):
            with interrupt:
                got.append(await fut)

    # The points until the task sleeps. Later, no thread would complete the future.
    for interrupt in itertools.islice(between_instructions(other), 201):
        fut, got = Future(), []
        other.now = lambda: try_set(fut, 1)
        with suppress(TimeoutError):
            timer = threading.Timer(0.02, try_set, (fut, 1))
            timer.start()
            anyio.run(main, backend=backend, backend_options=options)
            timer.join()
        assert got == [1], interrupt


@every_loop
def test_task_reads_a_value_put_at_any_step(other, backend, options, nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()  # the other thread is joined within the loop

    async def main():
        with anyio.fail_after(PATIENCE):
            with interrupt:
                got.extend([value async for value in stream])

    def put():
        with suppress(IndexError):  # the other thread was faster, or the timer
            puts.pop()
            stream.put(1)
            stream.close()

    for interrupt in itertools.islice(between_instructions(other), 201):
        stream, got, puts = ValueStream(), [], [None]
        other.now = put
        timer = threading.Timer(0.02, put)
        timer.start()
        anyio.run(main, backend=backend, backend_options=options)
        timer.join()
        assert got == [1], interrupt


# ----------------------------------------------------------------------- worker threads


class Idle(QueueWorker):
    def run(self, thread):
        pass


def test_a_thread_claims_a_worker_that_another_releases(other):
    for interrupt in between_instructions(other):
        worker = Idle("raced")
        first, second = WorkerThread(worker), WorkerThread(worker)
        assert worker.claim(first)
        other.now = lambda: worker.release(first)
        with interrupt:
            claimed = worker.claim(second)
        worker.release(first)
        assert claimed or worker.claim(second), interrupt


def test_item_submitted_during_close_is_run_or_fails(other):
    def submit(batcher, futures):
        with suppress(BatcherClosedError):
            futures.append(batcher.submit(1))

    for interrupt in between_instructions(other):
        futures = []
        batcher = Batcher(list, max_batch_size=1, max_queue_size=9)
        other.now = batcher.close
        with interrupt:
            submit(batcher, futures)
        batcher.close()
        for fut in futures:
            with suppress(BatcherClosedError):
                assert fut.wait(PATIENCE) == 1

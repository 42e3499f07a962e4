"""Batches by cost, several at once, with an initializer and reports; items that are given up."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import threading
import time
import weakref
from contextlib import suppress

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchfut_aio import (
    BatcherClosedError,
    BatchReport,
    BlockingWaitWarning,
    QueueFullError,
    gather,
)
from torchfut_aio.serving import _batch_queue, _batch_worker, _batcher

from . import explorer, forks
from .batchers import (
    NAME,
    Gated,
    batcher_of,
    double,
    double_soon,
    running_batcher,
    settled,
    threads,
)
from .loops import on_asyncio, on_every_loop
from .threads import PATIENCE, no_thread_starts, running, until
from .waiting import eventually


def flat(lists):
    return [*itertools.chain.from_iterable(lists)]


def with_all_running(gated, count, **options):
    """Return a batcher that runs ``count`` batches of one item each, until they may return."""
    batcher = batcher_of(gated, max_concurrent_batches=count, **options)
    for n in range(count):
        batcher.submit(n)
        until(lambda n=n: batcher.statistics().running == n + 1)
    return batcher


# ------------------------------------------------------------------------- await batcher(item)


@on_every_loop
@pytest.mark.parametrize("function", [double, double_soon])
async def test_awaited_batcher_returns_the_result(function):
    async def one(n):
        results[n] = await batcher(n)

    results = {}
    async with batcher_of(function, max_batch_size=7) as batcher:
        async with anyio.create_task_group() as group:
            for n in range(50):
                group.start_soon(one, n)
        assert await batcher(50) == 100
    assert results == {n: 2 * n for n in range(50)}


@on_every_loop
async def test_batcher_itself_can_be_started_in_a_task_group():
    async with batcher_of() as batcher:
        async with anyio.create_task_group() as group:
            for n in range(3):
                group.start_soon(batcher, n)
        assert batcher.statistics().items == 3


@on_every_loop
async def test_coroutine_submits_its_item_at_its_first_step():
    async with batcher_of() as batcher:
        call = batcher(1)
        await anyio.sleep(0.01)
        assert batcher.statistics().items == 0
        assert await call == 2
        batcher(1).close()  # never started
    assert batcher.statistics().items == 1


@on_every_loop
async def test_item_of_an_expired_scope_leaves_the_queue_at_once(gated):
    batcher, first = running_batcher(gated)
    async with batcher:
        for n in range(1, 51):
            with anyio.move_on_after(0.0001):
                await batcher(n)
            assert batcher.statistics().queued == 0
        assert batcher.statistics().given_up == 50
        gated.may_return.set()
        assert await first == 0
        assert await batcher(5) == 10
    assert gated.batches == [[0], [5]]


@on_asyncio
@pytest.mark.parametrize("how", ["timeout", "wait_for", "cancel"])
async def test_item_of_a_cancelled_task_leaves_the_queue_at_once(gated, how):
    batcher, first = running_batcher(gated)
    async with batcher:
        for n in range(1, 51):
            if how == "cancel":
                task = asyncio.create_task(batcher(n))
                await eventually(lambda: batcher.statistics().queued == 1)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()
            elif how == "wait_for":
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(batcher(n), 0.0001)
            else:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.0001):
                        await batcher(n)
            assert batcher.statistics().queued == 0
        gated.may_return.set()
        assert await first == 0
    assert gated.batches == [[0]]
    assert batcher.statistics().given_up == 50


@on_every_loop
async def test_error_of_an_abandoned_running_item_is_not_logged(gated, caplog):
    gated.error = ValueError("fails")
    batcher = batcher_of(gated)
    with anyio.move_on_after(0.01):
        await batcher(1)
    assert gated.began.is_set()  # too late to give up
    gated.may_return.set()
    await batcher.aclose()
    gc.collect()
    assert not caplog.records
    assert (batcher.statistics().given_up, batcher.statistics().failed) == (0, 1)


@on_every_loop
async def test_closed_coroutine_gives_its_item_up(gated):
    batcher, _first = running_batcher(gated)
    call = batcher(1)
    call.send(None)
    assert batcher.statistics().queued == 1
    call.close()
    assert (batcher.statistics().queued, batcher.statistics().given_up) == (0, 1)
    gated.may_return.set()
    await batcher.aclose()
    assert gated.batches == [[0]]


@on_every_loop
async def test_given_up_items_make_room_at_once(gated):
    batcher, _first = running_batcher(gated, max_batch_size=2, max_queue_size=4)
    async with batcher:
        for _ in range(20):
            with anyio.move_on_after(0.001):
                async with anyio.create_task_group() as group:
                    for n in range(4):
                        group.start_soon(batcher, n)
        statistics = batcher.statistics()
        gated.may_return.set()
    assert (statistics.given_up, statistics.rejected, statistics.queued) == (80, 0, 0)


@on_every_loop
async def test_refused_items_raise_and_count_as_rejected(gated):
    batcher, _first = running_batcher(gated, max_batch_size=1, max_queue_size=1)
    async with batcher:
        batcher.submit(1)
        with pytest.raises(QueueFullError):
            await batcher(2)
        gated.may_return.set()
    with pytest.raises(BatcherClosedError):
        await batcher(3)
    statistics = batcher.statistics()
    assert (statistics.rejected, statistics.given_up) == (1, 0)


@on_every_loop
async def test_awaited_error_is_freed_without_a_collection(gated):
    class Error(Exception):
        pass

    def fails(items):
        raise Error

    async def kept():
        try:
            await batcher(1)
        except Error as error:
            return weakref.ref(error)

    async with batcher_of(fails) as batcher:
        gc.disable()
        try:
            found = await kept()
            await eventually(lambda: batcher.statistics().running == 0)
            await eventually(lambda: found() is None)
        finally:
            gc.enable()


@on_every_loop
async def test_item_given_up_at_any_step_of_its_worker_counts_once():
    def give_up_beside():
        struck.set()
        assert given_up.wait(PATIENCE)

    for interrupt in explorer.interrupts(
        _batch_queue, _batch_worker, thread=NAME, do=give_up_beside
    ):
        batches, struck, given_up = [], threading.Event(), threading.Event()
        batcher = batcher_of(lambda items, batches=batches: batches.append(items) or items)
        with interrupt:
            async with anyio.create_task_group() as group:
                group.start_soon(batcher, 1)
                await eventually(lambda b=batcher, s=struck: s.is_set() or b.statistics().items > 0)
                group.cancel_scope.cancel()
            given_up.set()
            await batcher.aclose()
            await eventually(lambda: not threads())
        statistics = batcher.statistics()
        assert len(flat(batches)) + statistics.given_up == 1, interrupt
        assert statistics.items == len(flat(batches)), interrupt


# ------------------------------------------------------------------------------ initializer


@on_every_loop
async def test_block_begins_when_every_initializer_has_returned():
    numbers = {}

    def initialize(number):
        time.sleep(0.01 * number)
        numbers[threading.get_ident()] = number

    def numbers_of(items):
        return [numbers[threading.get_ident()] for _ in items]

    async with batcher_of(
        numbers_of, initializer=initialize, max_concurrent_batches=3, max_batch_size=1
    ) as batcher:
        assert sorted(numbers.values()) == [0, 1, 2]
        assert {await batcher(n) for n in range(10)} <= {0, 1, 2}
    assert len(numbers) == 3  # each ran once


def test_entry_raises_the_error_of_the_initializer_and_closes():
    def initialize(number):
        if number == 1:
            raise OSError("no such GPU")

    batcher = batcher_of(initializer=initialize, max_concurrent_batches=2)
    with pytest.raises(OSError, match="no such GPU"), batcher:
        pytest.fail("the block must not begin")
    assert batcher.closed
    until(lambda: not threads())


@on_every_loop
async def test_async_entry_raises_the_error_of_the_initializer():
    def initialize(number):
        raise SystemExit("no such GPU")

    batcher = batcher_of(initializer=initialize)
    with pytest.raises(SystemExit, match="no such GPU"):
        async with batcher:
            pytest.fail("the block must not begin")
    assert batcher.closed
    await eventually(lambda: not threads())


def test_futures_get_the_initializer_error_without_a_block():
    def initialize(number):
        raise OSError("no such GPU")

    reports = []
    batcher = batcher_of(initializer=initialize, max_batch_size=2, on_batch=reports.append)
    errors = []
    for _ in range(2):
        futures = settled([batcher.submit(n) for n in range(5)])
        errors += [fut.exception() for fut in futures]
    batcher.close()
    assert [str(each) for each in errors] == ["no such GPU"] * 10
    assert len({id(each) for each in errors}) == 10
    assert not reports
    assert (batcher.statistics().batches, batcher.statistics().failed) == (0, 10)


def test_closed_batcher_cannot_be_entered():
    batcher = batcher_of()
    batcher.close()
    for enter in (batcher.__enter__, lambda: asyncio.run(batcher.__aenter__())):
        with pytest.raises(BatcherClosedError, match="cannot be entered again"):
            enter()


@on_every_loop
async def test_cancelled_entry_can_be_repeated():
    may_return = threading.Event()
    batcher = batcher_of(initializer=lambda number: may_return.wait(PATIENCE))
    with anyio.move_on_after(0.01):
        async with batcher:
            pytest.fail("the block must not begin")
    assert not batcher.closed
    may_return.set()
    async with batcher:
        assert await batcher(1) == 2


def test_entry_ends_when_another_thread_closes_the_batcher():
    may_return = threading.Event()
    batcher = batcher_of(initializer=lambda number: may_return.wait(PATIENCE))

    def close():
        until(lambda: bool(threads()))
        with running(may_return.set):
            batcher.close()

    with running(close), batcher:
        pass
    assert batcher.closed


@on_asyncio
async def test_entry_that_blocks_a_loop_warns(nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()
    batcher = batcher_of(initializer=lambda number: time.sleep(0.05))
    with pytest.warns(BlockingWaitWarning, match="use `async with`") as caught:
        batcher.__enter__()
    assert caught[0].filename == __file__
    await batcher.aclose()


def test_close_of_an_unused_batcher_calls_no_initializer():
    called = []
    batcher = batcher_of(initializer=called.append)
    batcher.close()
    until(lambda: not threads())
    assert not called


def test_initializer_that_returns_a_coroutine_fails_the_entry():
    async def initialize(number):
        pass

    with pytest.raises(TypeError, match="is not `async def`"):
        with batcher_of(initializer=lambda number: initialize(number)):
            pytest.fail("the block must not begin")


# ---------------------------------------------------------------------------- several at once


def test_so_many_batches_run_at_once_in_threads_of_their_own(gated):
    batcher = with_all_running(gated, 3)
    waiting = batcher.submit(3)
    until(lambda: len(threads()) == 3)  # one that lost a race to start may be about to end
    statistics = batcher.statistics()
    assert (statistics.running, statistics.queued) == (3, 1)
    assert repr(batcher).endswith("queued=1/100 running=3>")
    gated.may_return.set()
    assert waiting.wait(PATIENCE) == 6
    batcher.close()
    assert sorted(gated.batches) == [[0], [1], [2], [3]]


@on_every_loop
async def test_so_many_tasks_of_an_async_function_run_at_once():
    began, may_return = [], anyio.Event()

    async def function(items):
        began.append(items)
        await may_return.wait()
        return double(items)

    async with batcher_of(function, max_batch_size=1, max_concurrent_batches=3) as batcher:
        futures = [batcher.submit(n) for n in range(5)]
        await eventually(lambda: len(began) == 3)
        assert batcher.statistics().running == 3
        await anyio.sleep(0.01)
        assert sorted(began) == [[0], [1], [2]]
        may_return.set()
        assert await gather(futures) == [0, 2, 4, 6, 8]


def test_batches_are_made_in_the_order_of_submission():
    batches, lock = [], threading.Lock()

    def on_batch(report):
        with lock:
            batches.append(report)

    with batcher_of(
        max_batch_size=3, max_queue_size=None, max_concurrent_batches=4, on_batch=on_batch
    ) as batcher:
        futures = [batcher.submit(n) for n in range(300)]
        assert [fut.wait(PATIENCE) for fut in futures] == double(range(300))
    for report in batches:
        first = report.items[0]
        assert report.items == [*range(first, first + len(report.items))]
    assert sorted(flat(report.items for report in batches)) == [*range(300)]


@on_every_loop
async def test_slow_batch_does_not_delay_other_workers(gated):
    def function(items):
        return gated(items) if items == ["slow"] else double(items)

    async with batcher_of(function, max_batch_size=1, max_concurrent_batches=2) as batcher:
        slow = batcher.submit("slow")
        await eventually(gated.began.is_set)
        for n in range(20):
            assert await batcher(n) == 2 * n
        assert not slow.done()
        gated.may_return.set()
        assert await slow == "slowslow"


@pytest.mark.parametrize("drain", [True, False])
def test_close_waits_for_every_batch(gated, drain):
    batcher = with_all_running(gated, 3)
    queued = batcher.submit(5)
    closed = threading.Event()

    def close():
        batcher.close(drain=drain)
        closed.set()

    with running(close):
        until(lambda: batcher.closed)
        assert not closed.wait(0.05)
        gated.may_return.set()
    assert queued.done()
    assert batcher.statistics().running == 0
    until(lambda: not threads())


def test_timed_out_close_fails_the_items_of_every_batch(gated):
    batcher = with_all_running(gated, 3)
    futures = [batcher.submit(n) for n in range(5)]
    with pytest.raises(TimeoutError):
        batcher.close(timeout=0.01)
    for fut in futures:
        with pytest.raises(BatcherClosedError):
            fut.value()


def test_dropped_batcher_ends_all_its_threads(gated):
    batcher = with_all_running(gated, 3)
    queued = batcher.submit(5)
    del batcher
    gc.collect()
    gated.may_return.set()
    assert queued.wait(PATIENCE) == 10
    until(lambda: not threads())


@pytest.mark.parametrize("close", [True, False])
def test_function_and_report_can_close_a_batcher_of_workers(close):
    def closes(items):
        if close:
            batcher.close()
        return items

    def on_batch(report):
        batcher.close()

    batcher = batcher_of(closes, max_concurrent_batches=3, on_batch=on_batch)
    assert batcher.submit(1).wait(PATIENCE) == 1
    until(lambda: not threads())
    assert batcher.closed


def test_items_submitted_while_many_workers_close_complete():
    for _ in range(50):
        batcher = batcher_of(max_concurrent_batches=3, max_batch_size=2)
        futures = []

        def submit(batcher=batcher, futures=futures):
            with suppress(BatcherClosedError, QueueFullError):
                while True:
                    futures.append(batcher.submit(1))

        with running(submit, submit):
            until(lambda futures=futures: len(futures) > 2)
            batcher.close()
        for fut in futures:
            with suppress(BatcherClosedError):
                assert fut.wait(PATIENCE) == 2
        until(lambda: not threads())


def test_entry_raises_when_no_thread_can_start():
    batcher = batcher_of(max_concurrent_batches=2)
    with no_thread_starts():
        with pytest.raises(RuntimeError, match="can't start new thread"):
            batcher.__enter__()
    with batcher:
        assert batcher.submit(1).wait(PATIENCE) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_memory_error_in_any_worker_leaves_no_future_pending():
    for interrupt in explorer.interrupts(
        _batcher, _batch_queue, _batch_worker, error=MemoryError, at="calls", thread=NAME
    ):
        with interrupt:
            batcher = batcher_of(
                max_batch_size=1,
                max_concurrent_batches=2,
                cost=sum,
                max_batch_cost=100,
                initializer=lambda number: None,
                on_batch=lambda report: None,
            )
            futures = [batcher.submit(n) for n in range(4)]
            until(lambda futures=futures: all(fut.done() for fut in futures))
            futures.append(batcher.submit(4))
            batcher.close()
            until(lambda: not threads())
        for n, fut in enumerate(futures):
            assert isinstance(fut.exception(), (MemoryError, RuntimeError)) or fut.value() == 2 * n


FORKED = """
import os, warnings
from torchfut_aio import Batcher

warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
numbers = []
batcher = Batcher(
    list, max_batch_size=1, max_queue_size=9, max_concurrent_batches=2, initializer=numbers.append
)
with batcher:
    assert batcher.submit(1).wait(30) == 1
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        assert batcher.submit(2).wait(30) == 2
        assert sorted(numbers) == [0, 1]
    else:
        numbers.clear()
        with batcher:
            assert batcher.submit(3).wait(30) == 3
            assert sorted(numbers) == [0, 1]
        os._exit(0)
"""


def test_forked_child_starts_and_initializes_threads_of_its_own():
    assert forks.output(FORKED) == ""


AT_EXIT = """
import threading, time
from concurrent.futures import ThreadPoolExecutor
from torchfut_aio import Batcher

def double(items):
    time.sleep(0.01)
    return [2 * item for item in items]

batcher = Batcher(
    double, max_batch_size=2, max_queue_size=9, max_wait=3600, max_concurrent_batches=3,
    on_batch=lambda report: print(f"{report.items}\\n", end="", flush=True),
)
for n in range(3):
    batcher.submit(n)
# A thread that the interpreter waits for first, and that waits for a batch of one item.
ThreadPoolExecutor(1).submit(
    lambda: print(f"{batcher.submit(5).wait(60)}\\n", end="", flush=True)  # in one step
)
"""


AFTER_MAIN = """
import threading, time
from torchfut_aio import Batcher

def serve():
    threading.main_thread().join()
    for n in range(5):
        assert batcher.submit(n).wait(60) == n
        time.sleep(0.02)

batcher = Batcher(
    list, max_batch_size=2, max_queue_size=9, initializer=lambda number: print(number, flush=True)
)
threading.Thread(target=serve).start()
"""


def test_threads_stay_while_others_outlive_the_main_thread():
    assert forks.output(AFTER_MAIN).split() == ["0"]


# An interpreter on which the package cannot learn in advance that the exit begins.
WITHOUT_NOTICE = """
import concurrent.futures.thread, threading, time
del threading._register_atexit
from torchfut_aio import Batcher

batcher = Batcher(list, max_batch_size=2, max_queue_size=9, max_wait=3600)
for n in range(3):
    batcher.submit(n).add_done_callback(lambda fut: print(fut.value(), flush=True))
"""


def test_exit_runs_queued_items_where_no_notice_is_given():
    assert forks.output(WITHOUT_NOTICE).split() == ["0", "1", "2"]


def test_exit_runs_queued_items_on_all_workers():
    printed = forks.output(AT_EXIT).splitlines()
    assert sorted(printed)[0] == "10"
    assert sorted(flat(eval(line) for line in printed if line != "10")) == [0, 1, 2, 5]


# ------------------------------------------------------------------------------------- cost


def longest_times_count(items):
    return max(items) * len(items)


def batches_of(items, **options):
    """Return the batches that are made of items that are all queued, and the futures."""
    gated = Gated()
    batcher, _ = running_batcher(gated, **{"max_batch_size": 100, "max_queue_size": None} | options)
    futures = [batcher.submit(item) for item in items]
    gated.may_return.set()
    batcher.close()
    return gated.batches[1:], futures


def test_batch_ends_before_the_item_that_would_cost_too_much():
    batches, _ = batches_of([3, 5, 2, 9, 1, 1], cost=longest_times_count, max_batch_cost=15)
    assert batches == [[3, 5, 2], [9], [1, 1]]


@given(
    items=st.lists(st.integers(0, 12), max_size=30),
    most=st.integers(1, 20),
    size=st.integers(1, 8),
)
def test_batches_are_the_longest_whose_cost_fits(items, most, size):
    expected = []
    for item in items:
        last = [*expected[-1], item] if expected else []
        if item > most:
            continue
        if last and len(last) <= size and longest_times_count(last) <= most:
            expected[-1] = last
        else:
            expected.append([item])
    # An item that is refused ends the batch before it.
    batches, futures = batches_of(
        items, cost=longest_times_count, max_batch_cost=most, max_batch_size=size
    )
    assert flat(batches) == [item for item in items if item <= most]
    for batch in batches:
        assert len(batch) <= size
        assert longest_times_count(batch) <= most
    if not any(item > most for item in items):
        assert batches == expected
    for item, fut in zip(items, futures, strict=True):
        if item <= most:
            assert fut.value() == 2 * item
        else:
            with pytest.raises(ValueError, match=f"the item costs {item}, and max_batch_cost is"):
                fut.value()


def of_bad_items(items):
    for item in items:
        if isinstance(item, BaseException):
            raise item
        if isinstance(item, str):
            return {"nan": math.nan, "none": None, "text": "5", "negative": -1}[item]
    return sum(items)


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (ZeroDivisionError("foo"), ZeroDivisionError, "foo"),
        (KeyboardInterrupt("foo"), KeyboardInterrupt, "foo"),
        ("nan", ValueError, "cost.. must return a number, not NaN"),
        ("none", TypeError, "cost.. must return a number, not None"),
        ("text", TypeError, "cost.. must return a number, not '5'"),
        ("negative", ValueError, "cost.. must not return a negative number"),
        (101, ValueError, "the item costs 101, and max_batch_cost is 100"),
        (math.inf, ValueError, "the item costs inf, and max_batch_cost is 100"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_item_without_a_valid_cost_fails_alone(bad, error, text, place):
    items = [1, 2, 3]
    items.insert(place, bad)
    batches, futures = batches_of(items, cost=of_bad_items, max_batch_cost=100)
    assert flat(batches) == [1, 2, 3]
    with pytest.raises(error, match=text):
        futures.pop(place).value()
    assert [fut.value() for fut in futures] == [2, 4, 6]


def test_negative_cost_of_an_item_hides_no_cost_of_others():
    batches, futures = batches_of([6, -5, 6], cost=sum, max_batch_cost=10)
    assert batches == [[6], [6]]
    assert isinstance(futures[1].exception(), ValueError)


def test_batch_full_by_cost_does_not_wait_for_more_items():
    with batcher_of(cost=sum, max_batch_cost=10, max_wait=math.inf) as batcher:
        futures = [batcher.submit(n) for n in (4, 5)]
        time.sleep(0.01)
        assert not any(fut.done() for fut in futures)
        last = batcher.submit(6)
        assert [fut.wait(PATIENCE) for fut in futures] == [8, 10]
        assert not last.done()
    assert last.value() == 12


def test_refused_item_does_not_wait_for_more_items():
    with batcher_of(cost=sum, max_batch_cost=10, max_wait=math.inf) as batcher:
        with pytest.raises(ValueError, match="costs 11"):
            batcher.submit(11).wait(PATIENCE)
    assert (batcher.statistics().failed, batcher.statistics().batches) == (1, 0)


def test_cost_is_called_in_the_thread_of_the_batcher_only():
    called = set()

    def cost(items):
        called.add(threading.current_thread().name)
        return len(items)

    with batcher_of(cost=cost, max_batch_cost=5) as batcher:
        gather([batcher.submit(n) for n in range(20)]).wait(PATIENCE)
    assert called == {NAME}


def test_cost_is_called_a_few_times_for_each_item():
    called = []

    def cost(items):
        called.append(len(items))
        return len(items)

    count = 2000
    batches_of(range(count), cost=cost, max_batch_cost=64)
    assert len(called) < 3 * count


def test_cost_that_changes_its_list_changes_no_batch():
    def cost(items):
        items.sort()
        most = items[-1] * len(items)
        items.clear()
        return most

    batches, futures = batches_of([9, 1, 1, 1], cost=cost, max_batch_cost=10)
    assert batches == [[9], [1, 1, 1]]
    assert [fut.value() for fut in futures] == [18, 2, 2, 2]


def test_contradicting_costs_of_a_batch_fail_no_item():
    def cost(items):  # of several items: 1 when asked first, and 99 afterwards
        known.append(items)
        return 1 if len(items) == 1 or known.count(items) == 1 else 99

    known = []
    _, futures = batches_of(range(9), cost=cost, max_batch_cost=10)
    assert [fut.value() for fut in futures] == double(range(9))


def test_item_given_up_while_its_cost_is_computed_is_not_run():
    def cost(items):
        assert submitted.wait(PATIENCE)
        futures[0].cancel()
        return 1

    submitted, futures = threading.Event(), []
    with batcher_of(cost=cost, max_batch_cost=10) as batcher:
        futures.append(batcher.submit(1))
        submitted.set()
        until(lambda: batcher.statistics().given_up == 1)
    assert (batcher.statistics().items, batcher.statistics().running_for) == (0, 0)


@on_every_loop
async def test_watchdog_does_not_see_a_batch_whose_items_all_left():
    costs = threading.Event()

    def cost(items):
        costs.set()
        time.sleep(0.05)
        return 1

    async with batcher_of(cost=cost, max_batch_cost=10) as batcher:
        async with anyio.create_task_group() as group:
            group.start_soon(batcher, 1)
            await eventually(costs.is_set)
            group.cancel_scope.cancel()
        await eventually(lambda: rests(batcher))
        assert batcher.statistics().running_for == 0
        assert await batcher(2) == 4


def rests(batcher):
    """Return True if the batcher has nothing to do."""
    statistics = batcher.statistics()
    return statistics.queued == statistics.running == 0 == statistics.running_for


def test_items_that_fail_at_close_are_not_given_up():
    for _ in range(30):
        batcher = batcher_of(max_batch_size=1)
        for n in range(50):
            batcher.submit(n)
        batcher.close(drain=False)
        assert batcher.statistics().given_up == 0


def test_cost_can_submit_to_and_close_its_batcher():
    late = []

    def cost(items):
        if items == [1] and not late:
            late.append(batcher.submit(2))
            batcher.close()
        return 1

    batcher = batcher_of(cost=cost, max_batch_cost=5)
    assert batcher.submit(1).wait(PATIENCE) == 2
    assert late[0].wait(PATIENCE) == 4


# ---------------------------------------------------------------------- reports and statistics


def test_report_describes_the_batch():
    reports = []
    with batcher_of(
        on_batch=reports.append, cost=sum, max_batch_cost=100, max_batch_size=3, max_wait=math.inf
    ) as batcher:
        start = time.monotonic()
        gather([batcher.submit(n) for n in (1, 2, 3)]).wait(PATIENCE)
        until(lambda: bool(reports))
        passed = time.monotonic() - start
    [report] = reports
    assert isinstance(report, BatchReport)
    assert (report.name, report.items, report.cost, report.error) == (NAME, [1, 2, 3], 6, None)
    assert len(report.wait_times) == 3
    assert all(0 <= each <= passed for each in report.wait_times)
    assert report.wait_times == sorted(report.wait_times, reverse=True)
    assert 0 <= report.run_time <= passed
    with pytest.raises(AttributeError):
        report.name = "other"


@on_every_loop
async def test_report_of_a_failed_batch_has_its_error():
    def fails(items):
        items.clear()
        raise OSError("no such peer")

    reports = []
    async with batcher_of(fails, on_batch=reports.append) as batcher:
        with pytest.raises(OSError, match="no such peer"):
            await batcher(1)
    [report] = reports
    assert isinstance(report.error, OSError)
    assert (report.items, report.cost) == ([1], None)


def test_exception_among_the_results_is_no_error_of_the_batch():
    reports = []
    with batcher_of(lambda items: [ValueError()] * len(items), on_batch=reports.append) as batcher:
        assert isinstance(settled([batcher.submit(1)])[0].exception(), ValueError)
    assert reports[0].error is None
    assert batcher.statistics().failed == 1


@pytest.mark.parametrize(
    "error", [ValueError, KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit]
)
def test_report_function_that_raises_harms_nothing(error, caplog):
    def fails(report):
        raise error("in the report")

    initialized = []
    with batcher_of(on_batch=fails, initializer=initialized.append) as batcher:
        for n in range(3):
            assert batcher.submit(n).wait(PATIENCE) == 2 * n
    assert initialized == [0]  # the same thread runs on
    assert len(caplog.records) == (0 if error in (KeyboardInterrupt, SystemExit) else 3)


def test_report_has_an_error_of_its_own():
    def fails(items):
        raise ValueError("foo")

    reports = []
    with batcher_of(fails, on_batch=reports.append) as batcher:
        error = settled([batcher.submit(1)])[0].exception()
    assert reports[0].error is not error
    assert str(reports[0].error) == "foo"


def test_kept_reports_of_failures_keep_no_batcher():
    async def use():
        async with batcher_of(lambda items: 1 / 0, on_batch=reports.append) as batcher:
            with suppress(ZeroDivisionError):
                await batcher(1)
            return weakref.ref(batcher)

    reports = []
    kept = asyncio.run(use())
    gc.collect()
    assert kept() is None


def test_exception_returned_for_several_items_is_copied():
    def same(items):
        return [ValueError("foo")] * len(items)

    with batcher_of(same, max_batch_size=3, max_wait=math.inf) as batcher:
        errors = [fut.exception() for fut in settled([batcher.submit(n) for n in range(3)])]
    assert [str(error) for error in errors] == ["foo"] * 3
    assert len({id(error) for error in errors}) == 3
    assert batcher.statistics().failed == 3


def test_results_do_not_wait_for_the_report():
    may_return = threading.Event()
    batcher = batcher_of(on_batch=lambda report: may_return.wait(PATIENCE))
    assert batcher.submit(1).wait(PATIENCE) == 2
    statistics = batcher.statistics()
    assert (statistics.items, statistics.running, statistics.running_for) == (1, 0, 0)
    may_return.set()
    batcher.close()


def test_close_returns_after_every_report():
    reports = []

    def on_batch(report):
        time.sleep(0.02)
        reports.append(report)

    with batcher_of(on_batch=on_batch, max_concurrent_batches=3, max_batch_size=1) as batcher:
        for n in range(6):
            batcher.submit(n)
    assert len(reports) == 6


def test_batcher_keeps_no_reported_item():
    class Thing:
        pass

    with batcher_of(lambda items: items, on_batch=lambda report: None) as batcher:
        thing = Thing()
        kept = weakref.ref(thing)
        batcher.submit(thing).wait(PATIENCE)
        del thing
        gc.collect()
        until(lambda: kept() is None)


def test_statistics_have_the_two_numbers_of_a_watchdog(gated):
    batcher = batcher_of(gated)
    assert (batcher.statistics().oldest, batcher.statistics().running_for) == (0, 0)
    batcher.submit(0)
    until(gated.began.is_set)
    given_up, _queued = batcher.submit(1), batcher.submit(2)
    before = batcher.statistics()
    assert before.oldest > 0
    time.sleep(0.02)
    given_up.cancel()
    after = batcher.statistics()
    assert after.running_for >= before.running_for + 0.02
    assert 0.02 <= after.oldest < before.oldest + 1
    gated.may_return.set()
    batcher.close()
    assert (batcher.statistics().oldest, batcher.statistics().running_for) == (0, 0)


def test_counts_add_up_under_load():
    def function(items):
        return [ValueError() if item % 7 == 0 else item for item in items]

    async def client(number):
        for n in range(100):
            with suppress(ValueError, TimeoutError, QueueFullError):
                async with asyncio.timeout(0.0005 if n % 3 else None):
                    await batcher(n)

    async def clients():
        await asyncio.gather(*[client(number) for number in range(10)])

    with batcher_of(
        function, max_concurrent_batches=3, max_batch_size=4, max_queue_size=8
    ) as batcher:
        with running(lambda: asyncio.run(clients()), lambda: asyncio.run(clients())):
            pass
    statistics = batcher.statistics()
    assert statistics.items + statistics.given_up + statistics.rejected == 2000
    assert (statistics.queued, statistics.running) == (0, 0)
    assert 0 < statistics.failed < statistics.items


# -------------------------------------------------------------------------------- arguments


async def async_function(*args):
    pass


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"cost": sum}, TypeError, "needed together: max_batch_cost is missing"),
        ({"max_batch_cost": 5}, TypeError, "needed together: cost is missing"),
        ({"cost": sum, "max_batch_cost": 0}, ValueError, "max_batch_cost must be positive, not 0"),
        ({"cost": sum, "max_batch_cost": math.nan}, ValueError, "must be a number, not NaN"),
        ({"cost": sum, "max_batch_cost": "5"}, TypeError, "must be a number, not '5'"),
        ({"cost": 5, "max_batch_cost": 5}, TypeError, "cost must be a function or None, not int"),
        ({"cost": async_function, "max_batch_cost": 5}, TypeError, "cost .*async function"),
        ({"max_concurrent_batches": 0}, ValueError, "max_concurrent_batches must be positive"),
        ({"max_concurrent_batches": None}, TypeError, "max_concurrent_batches must be an int"),
        ({"initializer": 5}, TypeError, "initializer must be a function or None"),
        ({"initializer": async_function}, TypeError, "initializer .*async function"),
        ({"on_batch": async_function}, TypeError, "on_batch .*async function"),
        (
            {"function": async_function, "initializer": print},
            TypeError,
            "an initializer is for threads, and an async function runs in tasks",
        ),
    ],
)
def test_batcher_refuses_invalid_options(options, error, text):
    with pytest.raises(error, match=text):
        batcher_of(**options)


# ----------------------------------------------------------------- interrupts at every point


def test_interrupted_entry_of_several_workers_can_be_repeated():
    for interrupt in explorer.interrupts(_batcher, _batch_queue):
        batcher = batcher_of(max_concurrent_batches=2)
        with interrupt:
            batcher.__enter__()
        with batcher:
            assert batcher.submit(1).wait(PATIENCE) == 2, interrupt
        until(lambda: not threads())


def test_interrupted_await_gives_its_item_up():
    async def main():
        for interrupt in explorer.interrupts(_batcher, _batch_queue):
            gated = Gated()
            batcher, first = running_batcher(gated)
            call = batcher(1)
            with interrupt:
                with suppress(StopIteration):
                    call.send(None)
                call.close()
            call.close()
            assert batcher.statistics().queued == 0, interrupt
            gated.may_return.set()
            assert await first == 0
            await batcher.aclose()
            assert gated.batches == [[0]]

    asyncio.run(main())

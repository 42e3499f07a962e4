"""Batches: every future completes, whatever function, thread, loop and caller do."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import copy
import dataclasses
import functools
import gc
import linecache
import math
import pathlib
import pickle
import sys
import threading
import time
import weakref
from contextlib import AsyncExitStack, suppress
from unittest.mock import Mock

import anyio
import anyio.lowlevel
import pytest
import torch
import trio

from torchfut_aio import (
    Batcher,
    BatcherClosedError,
    BlockingWaitWarning,
    Future,
    QueueFullError,
    _loops,
    _threads,
    as_future,
    gather,
)
from torchfut_aio.serving import _batch_queue, _batch_worker, _batcher, _owner_loop

from . import explorer, forks
from .accelerator import being_filled
from .batchers import (
    NAME,
    batcher_of,
    double,
    double_soon,
    give_up,
    running_batcher,
    settled,
    threads,
)
from .loops import on_asyncio, on_every_loop
from .meanings import LISTS, NOT_LISTS
from .threads import PATIENCE, alongside, no_thread_starts, running, until
from .waiting import Reader, eventually, polled

# --------------------------------------------------------------------------------- batches


@on_every_loop
@pytest.mark.parametrize("function", [double, double_soon])
async def test_item_gets_its_own_result_in_any_batch(function):
    with anyio.fail_after(PATIENCE):
        async with batcher_of(function, max_batch_size=7) as batcher:
            futures = [batcher.submit(n) for n in range(100)]
            assert await gather(futures) == [2 * n for n in range(100)]
            statistics = batcher.statistics()
    assert statistics.items == 100
    assert 100 / 7 <= statistics.batches <= 100
    assert statistics.mean_batch_size == 100 / statistics.batches


@on_every_loop
async def test_many_tasks_and_threads_submit_to_one_batcher():
    def submit_and_wait():
        for n in range(50):
            assert batcher.submit(n).wait(PATIENCE) == 2 * n

    async def submit_and_await():
        for n in range(50):
            assert await batcher.submit(n) == 2 * n

    with anyio.fail_after(PATIENCE):
        async with batcher_of() as batcher:
            async with alongside(submit_and_wait, submit_and_wait):
                async with anyio.create_task_group() as group:
                    for _ in range(10):
                        group.start_soon(submit_and_await)
            assert batcher.statistics().items == 600


def test_batch_starts_as_soon_as_it_is_full():
    with batcher_of(max_batch_size=3, max_wait=math.inf) as batcher:
        futures = [batcher.submit(n) for n in range(3)]
        assert [fut.wait(PATIENCE) for fut in futures] == [0, 2, 4]
        futures = [batcher.submit(n) for n in range(6)]
        assert [fut.wait(PATIENCE) for fut in futures] == [0, 2, 4, 6, 8, 10]
        last = batcher.submit(1)
        assert not last.done()  # the batch is not full
    assert last.value() == 2
    assert batcher.statistics().batches == 4


def test_partial_batch_starts_after_max_wait():
    with batcher_of(max_wait=0.05) as batcher:
        start = time.monotonic()
        assert batcher.submit(1).wait(PATIENCE) == 2
        assert time.monotonic() - start >= 0.05
        statistics = batcher.statistics()
    assert statistics.batches == 1
    assert statistics.wait_time >= 0.05


def test_items_submitted_during_a_batch_form_the_next_batch(gated):
    batcher, first = running_batcher(gated)
    with batcher:
        others = [batcher.submit(n) for n in range(1, 6)]
        assert (batcher.statistics().queued, batcher.statistics().running) == (5, 1)
        gated.may_return.set()
        assert gather([first, *others]).wait(PATIENCE) == [0, 2, 4, 6, 8, 10]
    assert gated.batches == [[0], [1, 2, 3, 4, 5]]
    statistics = batcher.statistics()
    assert (statistics.queued, statistics.running) == (0, 0)
    assert (statistics.batches, statistics.items, statistics.mean_batch_size) == (2, 6, 3)
    assert statistics.run_time > 0


def test_thread_stays_from_the_entry_to_the_close():
    def thread_of(items):
        return [threading.get_ident() for _ in items]

    with batcher_of(thread_of) as batcher:
        [thread] = threads()  # before the first item
        for _ in range(3):
            assert batcher.submit(1).wait(PATIENCE) == thread.ident
            until(lambda: batcher.statistics().running == 0)
    until(lambda: not threads())


@on_every_loop
async def test_thread_starts_when_the_block_is_entered():
    async with batcher_of():
        assert len(threads()) == 1
    await eventually(lambda: not threads())


def test_thread_sleeps_while_nothing_is_queued():
    with batcher_of() as batcher:
        assert batcher.submit(1).wait(PATIENCE) == 2
        [thread] = threads()
        until(lambda: sleeps(thread))
        before = switches(thread)
        time.sleep(0.5)
        assert switches(thread) == before


def sleeps(thread):
    return _status(thread)["State"].startswith("S")


def switches(thread):
    return int(_status(thread)["voluntary_ctxt_switches"])


def _status(thread):
    lines = pathlib.Path(f"/proc/self/task/{thread.native_id}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines)


def test_batch_results_can_be_rows_of_a_tensor():
    with batcher_of(lambda items: 2 * torch.tensor(items)) as batcher:
        results = gather([batcher.submit(n) for n in range(3)]).wait(PATIENCE)
    assert torch.equal(torch.stack(results), torch.tensor([0, 2, 4]))


@pytest.mark.device
@on_every_loop
async def test_awaited_results_are_ready_when_their_kernels_are_done(accelerator):
    def fills(items):
        return being_filled(accelerator, value=7)  # two rows

    with anyio.fail_after(PATIENCE):
        async with batcher_of(fills, max_batch_size=2, max_wait=math.inf) as batcher:
            futures = [batcher.submit(n) for n in range(2)]
            reader = Reader(gather(futures))
            async with anyio.create_task_group() as group:
                group.start_soon(reader)
                await eventually(lambda: all(fut.done() for fut in futures))
                await polled()
                assert reader.outcome is None
                accelerator.wake()
            assert [row.item() for row in reader.outcome] == [7, 7]


@on_asyncio
async def test_loop_is_woken_once_per_batch(gated, monkeypatch):
    batcher = batcher_of(gated, max_batch_size=64, max_wait=math.inf)
    tasks = [asyncio.ensure_future(batcher.submit(n)) for n in range(64)]
    await eventually(gated.began.is_set)
    ours, asked = _loops.current_asyncio(), []
    call_soon = type(ours).call_soon

    def counted(self, function):
        asked.append(self)
        return call_soon(self, function)

    monkeypatch.setattr(type(ours), "call_soon", counted)
    gated.may_return.set()
    assert await asyncio.gather(*tasks) == [2 * n for n in range(64)]
    assert asked == [ours]
    await batcher.aclose()


def test_batcher_keeps_no_delivered_item_or_result():
    class Thing:
        pass

    with batcher_of(lambda items: [Thing() for _ in items]) as batcher:
        item = Thing()
        kept = [weakref.ref(item)]
        fut = batcher.submit(item)
        kept += [weakref.ref(fut.wait(PATIENCE)), weakref.ref(fut)]
        del item, fut
        gc.collect()
        until(lambda: [ref() for ref in kept] == [None] * 3)


# ---------------------------------------------------------------------------------- errors


@on_every_loop
async def test_function_error_fails_its_whole_batch_and_no_other(gated):
    gated.error = ValueError("no such model")
    batcher, first = running_batcher(gated)
    async with batcher:
        others = [batcher.submit(n) for n in range(3)]
        gated.may_return.set()
        for fut in [first, *others]:
            with pytest.raises(ValueError, match="no such model"):
                await fut
        gated.error = None
        assert await batcher.submit(5) == 10


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, StopIteration])
def test_batcher_survives_any_error_of_its_function(error):
    def fails_first(items):
        if items == ["first"]:
            raise error
        return items

    with batcher_of(fails_first) as batcher:
        first = batcher.submit("first")
        with pytest.raises(error):
            first.wait(PATIENCE)
        assert batcher.submit("second").wait(PATIENCE) == "second"


def test_exception_among_the_results_fails_only_its_item():
    def inverse(items):
        return [1 / item if item else ZeroDivisionError("of 0") for item in items]

    with batcher_of(inverse, max_batch_size=3, max_wait=math.inf) as batcher:
        one, zero, two = (batcher.submit(n) for n in (1, 0, 2))
        assert (one.wait(PATIENCE), two.wait(PATIENCE)) == (1, 0.5)
        with pytest.raises(ZeroDivisionError, match="of 0"):
            zero.wait(PATIENCE)


@pytest.mark.parametrize(
    ("result", "error", "text"),
    [
        ([1], ValueError, "returned 1 results for 2 items"),
        ([1, 2, 3], ValueError, "returned 3 results for 2 items"),
    ],
)
def test_wrong_number_of_results_fails_the_batch(result, error, text):
    with batcher_of(lambda items: result, max_batch_size=2, max_wait=math.inf) as batcher:
        for fut in [batcher.submit(n) for n in range(2)]:
            with pytest.raises(error, match=text):
                fut.wait(PATIENCE)


@pytest.mark.parametrize(("values", "name"), NOT_LISTS)
@pytest.mark.parametrize("items", [1, 2, 3])
def test_ambiguous_result_type_fails_the_batch(values, name, items):
    with batcher_of(lambda items: values, max_batch_size=items, max_wait=math.inf) as batcher:
        for fut in [batcher.submit(n) for n in range(items)]:
            with pytest.raises(TypeError, match=f"must return a list, not an? {name}"):
                fut.wait(PATIENCE)


@pytest.mark.parametrize("values", LISTS)
def test_batch_results_can_be_sequences_and_arrays(values):
    with batcher_of(lambda items: values, max_batch_size=2, max_wait=math.inf) as batcher:
        assert [int(fut.wait(PATIENCE)) for fut in [batcher.submit(n) for n in range(2)]] == [1, 2]


def test_row_of_a_result_tensor_keeps_no_other_rows():
    with batcher_of(
        lambda items: torch.stack(items), max_batch_size=4, max_wait=math.inf
    ) as batcher:
        futures = [batcher.submit(torch.full((10,), float(n))) for n in range(4)]
        for n, fut in enumerate(futures):
            row = fut.wait(PATIENCE)
            assert torch.tensor([]).set_(row.untyped_storage()).unique().tolist() == [n]


class Proxy:
    """A value with an exception class as ``__class__``, like a mock or a framework's proxy."""

    @property
    def __class__(self):
        return ValueError


def test_value_that_poses_as_an_exception_is_a_result():
    proxies = [Proxy(), Mock(spec=ValueError)]
    with batcher_of(lambda items: proxies, max_batch_size=2, max_wait=math.inf) as batcher:
        futures = [batcher.submit(n) for n in range(2)]
        assert [fut.wait(PATIENCE) for fut in futures] == proxies


class NeedsTwo(Exception):
    def __init__(self, one, two):
        super().__init__(one)


class Changes(Exception):
    def __init__(self, text):
        super().__init__(f"[{text}]")


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


def noted(error):
    error.__cause__ = KeyError("why")
    error.__notes__ = ["first"]
    return error


def fails_with(error):
    def function(items):
        raise error

    return function


@pytest.mark.parametrize(
    "error",
    [
        noted(ValueError("foo", 5)),
        noted(OSError(2, "foo", "path")),
        KeyboardInterrupt(),
        ExceptionGroup("both", [ValueError(1), KeyError(2)]),
        torch.OutOfMemoryError("foo"),
        NeedsTwo(1, 2),
        Changes("foo"),
        Frozen(5),
    ],
    ids=lambda error: type(error).__name__,
)
def test_items_of_a_failed_batch_get_separate_errors(error):
    with batcher_of(fails_with(error), max_batch_size=3, max_wait=math.inf) as batcher:
        errors = [fut.exception() for fut in settled([batcher.submit(n) for n in range(3)])]
    assert len({id(each) for each in errors}) == 3
    for each in errors:
        assert type(each) is type(error)
        assert each.args == error.args
        assert str(each) == str(error)
        assert each.__cause__ is error.__cause__
        assert each.__traceback__ is not None
        each.__dict__.setdefault("__notes__", []).append("mine")
        assert each.__notes__.count("mine") == 1


def test_undrained_items_get_separate_errors(gated):
    batcher, first = running_batcher(gated)
    queued = [batcher.submit(n) for n in range(3)]
    with running(lambda: batcher.close(drain=False)):
        settled(queued)
        gated.may_return.set()
    assert first.wait(PATIENCE) == 0
    assert len({id(fut.exception()) for fut in queued}) == 3


def test_raising_callback_does_not_affect_other_items(gated, caplog):
    def raises(fut):
        raise KeyboardInterrupt

    batcher, first = running_batcher(gated)
    first.add_done_callback(raises)
    others = [batcher.submit(n) for n in range(1, 4)]
    others[0].add_done_callback(raises)
    gated.may_return.set()
    assert gather([first, *others]).wait(PATIENCE) == [0, 2, 4, 6]
    batcher.close()


# ------------------------------------------------------------- full queues, cancellation


@on_every_loop
async def test_full_queue_raises_queue_full_error(gated):
    batcher, first = running_batcher(gated, max_batch_size=2, max_queue_size=4)
    async with batcher:
        queued = [batcher.submit(n) for n in range(4)]
        for _ in range(3):
            with pytest.raises(QueueFullError, match="4 items wait"):
                batcher.submit(5)
        gated.may_return.set()
        assert await gather([first, *queued]) == [0, 0, 2, 4, 6]
        assert await batcher.submit(7) == 14
    assert batcher.statistics().rejected == 3
    assert batcher.statistics().items == 6


def test_cancelled_items_are_not_run(gated):
    batcher, first = running_batcher(gated, max_batch_size=2)
    queued = [batcher.submit(n) for n in range(1, 7)]
    for fut in queued[::2]:
        give_up(fut)
    give_up(first)  # too late: the function is already running
    gated.may_return.set()
    batcher.close()
    assert [fut.wait(PATIENCE) for fut in queued[1::2]] == [4, 8, 12]
    assert gated.batches == [[0], [2, 4], [6]]
    assert batcher.statistics().given_up == 3


def submitted_when_there_is_room(batcher, item):
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            return batcher.submit(item)
        except QueueFullError:  # the batcher looks for room at most 5% of the time
            assert time.monotonic() < give_up


def test_cancelled_item_makes_room_while_the_function_hangs(gated):
    batcher, _first = running_batcher(gated, max_batch_size=2, max_queue_size=4)
    queued = [batcher.submit(n) for n in range(4)]
    with pytest.raises(QueueFullError):
        batcher.submit(5)
    give_up(queued[1])
    last = submitted_when_there_is_room(batcher, 5)
    with pytest.raises(QueueFullError):
        batcher.submit(6)
    gated.may_return.set()
    batcher.close()
    assert last.value() == 10
    assert gated.batches == [[0], [0, 2], [3, 5]]


def test_batch_of_only_cancelled_items_is_not_run(gated):
    batcher, _first = running_batcher(gated)
    for n in range(20):
        give_up(batcher.submit(n))
    gated.may_return.set()
    batcher.close()
    assert gated.batches == [[0]]
    assert batcher.statistics().given_up == 20


@on_every_loop
async def test_cancelled_client_does_not_affect_other_clients(gated):
    batcher, _first = running_batcher(gated)
    async with batcher:
        stays, leaves = batcher.submit(1), batcher.submit(2)
        with anyio.move_on_after(0.01):
            await leaves
        give_up(leaves)
        gated.may_return.set()
        assert await stays == 2


# ---------------------------------------------------------------------------------- closing


@on_every_loop
@pytest.mark.parametrize("function", [double, double_soon])
async def test_leaving_the_block_drains_the_queue(function):
    async with batcher_of(
        function, max_batch_size=4, max_wait=math.inf, max_queue_size=200
    ) as batcher:
        futures = [batcher.submit(n) for n in range(101)]
    assert [fut.value() for fut in futures] == [2 * n for n in range(101)]
    with pytest.raises(BatcherClosedError):
        batcher.submit(5)


@on_every_loop
async def test_close_without_drain_fails_queued_items(gated):
    batcher, first = running_batcher(gated)
    queued = [batcher.submit(n) for n in range(3)]
    async with anyio.create_task_group() as group:
        group.start_soon(functools.partial(batcher.aclose, drain=False))
        for fut in queued:
            with pytest.raises(BatcherClosedError):
                await fut
        assert not first.done()
        gated.may_return.set()
    assert first.value() == 0
    assert gated.batches == [[0]]


def test_error_in_the_block_closes_the_batcher_without_drain(gated):
    batcher, first = running_batcher(gated)
    queued = batcher.submit(1)
    queued.add_done_callback(lambda fut: gated.may_return.set())
    with pytest.raises(ZeroDivisionError), batcher:
        raise ZeroDivisionError
    assert first.value() == 0
    with pytest.raises(BatcherClosedError):
        queued.value()


def test_close_timeout_fails_all_items_of_a_hanging_function(gated):
    batcher, first = running_batcher(gated)
    queued = batcher.submit(1)
    with pytest.raises(TimeoutError, match="did not return within"):
        batcher.close(timeout=0.01)
    for fut in (first, queued):
        with pytest.raises(BatcherClosedError, match="did not return in time"):
            fut.value()
    batcher.close()  # returns at once
    gated.may_return.set()
    until(lambda: not threads())
    assert gated.batches == [[0]]


@on_every_loop
async def test_aclose_timeout_fails_all_items_of_a_hanging_function(gated):
    batcher, first = running_batcher(gated)
    queued = batcher.submit(1)
    with pytest.raises(TimeoutError, match="did not return within"):
        await batcher.aclose(timeout=0.01)
    for fut in (first, queued):
        with pytest.raises(BatcherClosedError, match="did not return in time"):
            await fut


@on_every_loop
async def test_a_cancelled_close_can_be_repeated(gated):
    batcher, first = running_batcher(gated)
    with anyio.move_on_after(0.01):
        await batcher.aclose()
    with pytest.raises(BatcherClosedError):
        batcher.submit(1)
    gated.may_return.set()
    await batcher.aclose()
    assert first.value() == 0


def test_close_of_an_idle_or_closed_batcher_returns_at_once():
    batcher = batcher_of()
    for _ in range(3):
        batcher.close()
    with batcher_of() as batcher:
        batcher.submit(1)
        batcher.close()
    until(lambda: not threads())


def test_function_and_callbacks_can_close_the_batcher():
    def closes(items):
        batcher.close()
        return items

    batcher = batcher_of(closes)
    assert batcher.submit(1).wait(PATIENCE) == 1
    until(lambda: not threads())

    batcher = batcher_of()
    child = batcher.submit(1).then(lambda fut: batcher.close())
    assert child.wait(PATIENCE) is None
    until(lambda: not threads())


@on_every_loop
async def test_close_on_a_loop_warns_that_it_blocks(gated, nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()
    batcher, first = running_batcher(gated)
    with pytest.warns(BlockingWaitWarning) as caught:
        async with alongside(lambda: gated.may_return.set()):
            batcher.close()
    assert first.value() == 0
    (warning,) = caught
    assert "await aclose()" in str(warning.message)
    assert warning.filename == __file__
    batcher.close()  # the thread has ended, so this does not block


def test_close_takes_drain_only_by_keyword():
    with batcher_of() as batcher:
        for close in (batcher.close, batcher.aclose):
            with pytest.raises(TypeError, match="positional argument"):
                close(10)
        assert batcher.submit(1).wait(PATIENCE) == 2


def test_item_submitted_during_close_completes_or_is_refused():
    for _ in range(50):
        batcher = batcher_of()
        futures = []

        def submit(batcher=batcher, futures=futures):
            try:
                while True:
                    futures.append(batcher.submit(1))
            except (BatcherClosedError, QueueFullError):
                pass

        with running(submit, submit):
            until(lambda futures=futures: len(futures) > 2)
            batcher.close(drain=False)
        for fut in futures:
            with suppress(BatcherClosedError):
                assert fut.wait(PATIENCE) == 2
        until(lambda: not threads())


def test_dropped_batcher_runs_queued_items_and_ends_its_thread(gated):
    batcher, first = running_batcher(gated)
    queued = [batcher.submit(n) for n in range(20)]
    del batcher
    gc.collect()
    gated.may_return.set()
    assert first.wait(PATIENCE) == 0
    assert [fut.wait(PATIENCE) for fut in queued] == [2 * n for n in range(20)]
    until(lambda: not threads())


# ---------------------------------------------------------------------------- async functions


@on_every_loop
async def test_an_async_function_runs_on_the_loop_that_entered():
    async def thread_of(items):
        await anyio.lowlevel.checkpoint()
        return [threading.get_ident() for _ in items]

    async with batcher_of(thread_of) as batcher:
        assert await batcher.submit(1) == threading.get_ident()


@on_every_loop
@pytest.mark.parametrize("kind", ["partial", "method", "callable"])
async def test_every_kind_of_async_function_is_recognised(kind):
    class Doubles:
        async def double(self, items):
            return double(items)

        async def __call__(self, items):
            return double(items)

    doubles = Doubles()
    function = {
        "partial": functools.partial(double_soon),
        "method": doubles.double,
        "callable": doubles,
    }[kind]
    async with batcher_of(function) as batcher:
        assert await batcher.submit(4) == 8


@on_every_loop
async def test_async_function_error_fails_its_batch():
    async def fails(items):
        await anyio.lowlevel.checkpoint()
        raise OSError("no such peer")

    async with batcher_of(fails) as batcher:
        for _ in range(2):
            with pytest.raises(OSError, match="no such peer"):
                await batcher.submit(1)


@on_every_loop
async def test_async_batcher_must_be_entered_exactly_once():
    batcher = batcher_of(double_soon)
    with pytest.raises(RuntimeError, match="async with"):
        batcher.submit(1)
    with pytest.raises(RuntimeError, match="async with"):
        batcher.__enter__()
    async with batcher:
        with pytest.raises(RuntimeError, match="already"):
            await batcher.__aenter__()
        with pytest.raises(RuntimeError, match="aclose"):
            batcher.close()
        assert await batcher.submit(1) == 2


@on_asyncio
async def test_cancelled_async_function_fails_only_its_batch():
    tasks = []

    async def hangs(items):
        tasks.append(asyncio.current_task())
        if items == ["hang"]:
            await asyncio.sleep(PATIENCE)
        return items

    async with batcher_of(hangs) as batcher:
        fut = batcher.submit("hang")
        await eventually(lambda: bool(tasks))
        tasks[0].cancel()
        with pytest.raises(BaseException, match="cancelled"):
            await asyncio.wait_for(asyncio.shield(fut.as_asyncio()), PATIENCE)
        assert await batcher.submit("go on") == "go on"


def runs_on(backend, main):
    options = {"asyncio": {}, "uvloop": {"backend_options": {"use_uvloop": True}}}
    name = "trio" if backend == "trio" else "asyncio"
    return anyio.run(main, backend=name, **options.get(backend, {}))


@pytest.mark.parametrize("backend", ["asyncio", "uvloop", "trio"])
def test_loop_end_fails_pending_items_and_leaves_no_task(backend, caplog):
    began = threading.Event()

    async def hangs(items):
        began.set()
        await anyio.sleep_forever()

    batcher = batcher_of(hangs)

    async def main():
        await batcher.__aenter__()
        fut = batcher.submit(1)
        await eventually(began.is_set)
        return fut, batcher.submit(2)

    for fut in runs_on(backend, main):
        with pytest.raises((BaseException, RuntimeError), match=r"cancelled|ended|closed"):
            fut.wait(PATIENCE)
    with pytest.raises((BaseException, RuntimeError), match=r"cancelled|ended|closed"):
        batcher.submit(3).wait(PATIENCE)
    batcher.close()
    gc.collect()  # asyncio logs a task that is collected before its end
    assert not caplog.records


@pytest.fixture
def two_loops():
    """Two event loops in this thread; only one runs at a time."""
    loops = [asyncio.new_event_loop() for _ in range(2)]
    yield [loop.run_until_complete for loop in loops]
    for loop in loops:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def submitted(batcher, item):
    return await batcher.submit(item)


async def awaited(fut):
    return await fut


def test_async_batcher_refuses_another_loop_of_its_thread(two_loops):
    home, other = two_loops
    batcher = batcher_of(double_soon)
    home(batcher.__aenter__())
    assert home(submitted(batcher, 1)) == 2
    with pytest.raises(RuntimeError, match="while this thread runs another loop"):
        other(submitted(batcher, 2))
    assert batcher.statistics().queued == 0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # other threads may still submit
        pending = pool.submit(batcher.submit, 3).result(PATIENCE)
    for wait in (lambda: other(awaited(pending)), lambda: other(in_gather(pending))):
        with pytest.raises(RuntimeError, match="while this thread runs another loop"):
            wait()
    with pytest.raises(RuntimeError, match="while this thread runs another loop"):
        other(batcher.aclose())
    assert home(awaited(pending)) == 6
    assert home(submitted(batcher, 4)) == 8
    home(batcher.aclose())


async def in_gather(fut):
    return await gather([fut])


async def as_asyncio(fut):
    return await fut.as_asyncio()


def test_derived_futures_refuse_another_loop_of_the_thread(two_loops):
    home, other = two_loops
    batcher = batcher_of(double_soon)
    home(batcher.__aenter__())
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pending = pool.submit(batcher.submit, 3).result(PATIENCE)
    child, gathered = pending.then(lambda fut: fut.value() + 1), gather([pending])
    for wait in (awaited(child), awaited(gathered), as_asyncio(pending)):
        with pytest.raises(RuntimeError, match="while this thread runs another loop"):
            other(wait)
    for fut in (pending, child, gathered):
        with pytest.raises(RuntimeError, match="would block the thread of the event loop"):
            fut.wait()
    assert home(awaited(child)) == 7
    assert gathered.wait() == [6]
    home(batcher.aclose())


@on_asyncio
@pytest.mark.filterwarnings("ignore:It looks like Trio's signal handling")
async def test_trio_run_inside_a_task_cannot_wait_for_the_outer_loop():
    async def on_trio():
        with pytest.raises(RuntimeError, match="while this thread runs another loop"):
            batcher.submit(1)
        with pytest.raises(RuntimeError, match="while this thread runs another"):
            await as_future(source)

    source = asyncio.get_running_loop().create_future()
    async with batcher_of(double_soon) as batcher:
        trio.run(on_trio)
        assert await batcher.submit(1) == 2


class Odd(BaseException):
    pass


@on_every_loop
@pytest.mark.parametrize(
    "error",
    [
        Odd("foo"),
        BaseExceptionGroup("foo", [KeyboardInterrupt()]),
        SystemExit("foo"),
        asyncio.CancelledError("foo"),
        GeneratorExit("foo"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_async_function_error_does_not_end_the_loop(error, caplog):
    async def function(items):
        if items == ["bad"]:
            raise error
        return items

    async with batcher_of(function) as batcher:
        with anyio.fail_after(PATIENCE):
            bad = batcher.submit("bad")
            await eventually(bad.done)
            cancelled = (asyncio.CancelledError, GeneratorExit)
            expected = concurrent.futures.CancelledError if isinstance(error, cancelled) else None
            assert isinstance(bad.exception(), expected or type(error))
            assert await batcher.submit("good") == "good"
    assert not caplog.records


class Slotted(Exception):
    __slots__ = ("reason",)


def test_copies_of_an_error_keep_its_slots():
    error = Slotted("foo")
    error.reason = "bar"
    with batcher_of(fails_with(error), max_batch_size=2, max_wait=math.inf) as batcher:
        errors = [fut.exception() for fut in settled([batcher.submit(n) for n in range(2)])]
    assert errors[0] is not errors[1]
    assert [each.reason for each in errors] == ["bar", "bar"]


def test_close_of_an_idle_batcher_succeeds_with_zero_timeout():
    for _ in range(20):
        batcher = batcher_of()
        assert batcher.submit(1).wait(PATIENCE) == 2
        until(lambda batcher=batcher: batcher.statistics().running == 0)
        batcher.close(timeout=0)
        with pytest.raises(BatcherClosedError):
            batcher.submit(1)
        until(lambda: not threads())


@on_asyncio
async def test_dropped_async_batcher_leaves_no_task(collected):
    before = asyncio.all_tasks()
    for used in (False, True):
        batcher = batcher_of(double_soon)
        await batcher.__aenter__()
        if used:
            assert await batcher.submit(1) == 2
        del batcher
        collected()
        await eventually(lambda: asyncio.all_tasks() == before)


FORKED = """
import asyncio, os, sys, threading, trio, uvloop, warnings
from torchfut_aio import Batcher

warnings.simplefilter("ignore")

async def double(items):
    return [2 * item for item in items]

async def in_child(batcher):
    assert batcher.statistics().running == batcher.statistics().queued == 0
    try:
        batcher.submit(1)
    except RuntimeError as error:
        print(error)
    async with batcher:
        print(await batcher.submit(5))

def serve_in_child(batcher):
    code = 1
    try:
        asyncio.run(in_child(batcher))
        sys.stdout.flush()
        code = 0
    finally:
        os._exit(code)

async def main():
    async with Batcher(double, max_batch_size=2, max_queue_size=100) as batcher:
        assert await batcher.submit(1) == 2
        pid = os.fork()
        if not pid:
            # In a thread: this one is in the midst of the parent's loop.
            # It runs asyncio, as uvloop's loops do not outlive a fork in the midst of one.
            thread = threading.Thread(target=serve_in_child, args=(batcher,))
            thread.start()
            thread.join()
        assert os.waitpid(pid, 0)[1] == 0
        assert await batcher.submit(2) == 4
"""


RUN = {
    "asyncio": "asyncio.run(main())",
    "uvloop": "uvloop.run(main())",
    "trio": "trio.run(main)",
}


@pytest.mark.parametrize("loop", RUN)
def test_forked_child_must_enter_an_async_batcher_again(loop):
    done = forks.run(FORKED + RUN[loop], filters="ignore")
    assert done.returncode == 0, done.stderr  # asyncio logs that the child drops the parent's task
    error, result = done.stdout.splitlines()
    assert "a process that was forked has to enter it again" in error
    assert result == "10"


def test_close_in_a_forked_child_does_not_wake_its_parent():
    program = """
import os
from torchfut_aio import Batcher

batcher = Batcher(list, max_batch_size=1, max_queue_size=1)
ended = batcher._queue.ended  # for which a loop waits that has entered a batcher
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
    batcher.close()
    assert ended.done()
else:
    batcher.close()
    os._exit(ended.done())
"""
    assert forks.output(program, filters="ignore") == ""


def test_close_refuses_to_wait_for_a_loop_of_its_own_thread(two_loops):
    home, _ = two_loops
    batcher = batcher_of(double_soon)
    home(batcher.__aenter__())
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pending = pool.submit(batcher.submit, 3).result(PATIENCE)
    with pytest.raises(RuntimeError, match="await aclose"):
        batcher.close()
    assert home(awaited(pending)) == 6
    until(lambda: batcher.statistics().running == 0)
    batcher.close()


@on_every_loop
@pytest.mark.parametrize("drain", [True, False])
@pytest.mark.parametrize("options", [{}, {"timeout": PATIENCE}])
async def test_async_function_can_close_its_batcher(drain, options):
    async def in_child():
        await batcher.aclose(drain=drain, **options)

    async def closes(items):
        await batcher.aclose(drain=drain, **options)
        batcher.close(drain=drain)
        async with anyio.create_task_group() as tg:
            tg.start_soon(in_child)
        return items

    batcher = batcher_of(closes)
    async with batcher:
        with anyio.fail_after(PATIENCE):
            assert await batcher.submit(1) == 1
    assert batcher.statistics().running == 0


@on_asyncio
async def test_aclose_in_a_task_that_outlives_its_batch_waits():
    tasks, may_end = [], anyio.Event()

    async def function(items):
        if items == ["first"]:
            tasks.append(asyncio.create_task(batcher.aclose()))
        else:
            await may_end.wait()
        return items

    async with batcher_of(function, max_batch_size=1) as batcher:
        first, second = batcher.submit("first"), batcher.submit("second")
        await first
        await eventually(lambda: batcher.statistics().running == 1)
        tasks.append(asyncio.create_task(batcher.aclose()))
        await asyncio.sleep(0)
        assert not tasks[1].done()
        may_end.set()
        assert await second == "second"
        await asyncio.gather(*tasks)


def test_function_can_close_its_batcher_from_a_new_loop():
    def closes(items):
        asyncio.run(batcher.aclose())
        return items

    batcher = batcher_of(closes)
    assert batcher.submit(1).wait(PATIENCE) == 1
    until(lambda: not threads())


@on_asyncio
async def test_cancelling_all_tasks_fails_later_items(caplog):
    batcher = batcher_of(double_soon)
    await batcher.__aenter__()
    assert await batcher.submit(1) == 2
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.wait(others)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the program has cancelled all tasks"):
            await batcher.submit(2)
    async with batcher:  # entering it again restores it
        assert await batcher.submit(3) == 6


def test_batcher_can_be_entered_again_by_the_next_loop(two_loops):
    batcher = batcher_of(double_soon)
    asyncio.run(batcher.__aenter__())
    for run in two_loops[:1]:
        run(batcher.__aenter__())
        assert run(submitted(batcher, 2)) == 4
        run(batcher.aclose())


@torch.inference_mode()
async def hidden(items):
    return items


class Hidden:
    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, items):
        return self.function(items)


@pytest.mark.parametrize("function", [hidden, Hidden(double_soon)], ids=["torch", "object"])
def test_error_names_the_decorator_hiding_an_async_function(function):
    with pytest.raises(TypeError, match=r"decorator such as .*inference_mode"):
        batcher_of(function)


def test_returned_coroutine_fails_the_batch():
    with batcher_of(lambda items: double_soon(items)) as batcher:
        with pytest.raises(TypeError, match=r"<lambda> is not `async def`.* pass the async"):
            batcher.submit(1).wait(PATIENCE)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in finalisers
def test_an_interrupted_entry_can_be_repeated():
    async def main():
        for interrupt in explorer.interrupts(_batcher, _owner_loop, _loops):
            batcher = batcher_of(double_soon)
            entry = batcher.__aenter__()
            with interrupt:
                await entry
            if interrupt.raised:
                await batcher.__aenter__()
            async with AsyncExitStack() as stack:
                stack.push_async_exit(batcher)
                assert await batcher.submit(1) == 2, interrupt

    asyncio.run(main())


# ------------------------------------------------------------------- threads and processes


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_batcher_cannot_be_copied_or_pickled(copied):
    with batcher_of() as batcher:
        with pytest.raises(TypeError, match="Batcher cannot be pickled or copied"):
            copied(batcher)
        assert batcher.submit(1).wait(PATIENCE) == 2


def test_batch_does_not_run_in_the_context_of_a_caller():
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("a caller's")
    with batcher_of(lambda items: [variable.get() for _ in items]) as batcher:
        assert batcher.submit(1).wait(PATIENCE) == "none"


async def closed(batcher, how, timeout):  # noqa: ASYNC109
    closing = getattr(batcher, how)(timeout=timeout)
    if closing is not None:
        await closing


@pytest.mark.parametrize("close", ["close", "aclose"])
@pytest.mark.parametrize(("timeout", "error"), [(math.nan, ValueError), ("1", TypeError)])
def test_invalid_timeout_does_not_close_the_batcher(close, timeout, error):
    with batcher_of() as batcher:
        with pytest.raises(error, match="timeout must be a number"):
            asyncio.run(closed(batcher, close, timeout))
        assert batcher.submit(1).wait(PATIENCE) == 2


def test_cost_of_a_batch_does_not_grow_with_the_queue(gated, monkeypatch):
    calls = []

    def counted(future, done=Future.done):
        if threading.current_thread().name == NAME:
            calls.append(None)
        return done(future)

    monkeypatch.setattr(Future, "done", counted)
    costs = []
    for items in (100, 1000):
        gated.may_return.clear()
        batcher = batcher_of(gated, max_queue_size=items)
        futures = [batcher.submit(n) for n in range(items)]
        calls.clear()
        gated.may_return.set()
        batcher.close()
        assert [fut.value() for fut in futures] == double(range(items))
        costs.append(len(calls) / items)
    assert costs[1] <= 1.5 * costs[0]


def test_submit_raises_when_no_thread_can_start():
    batcher = batcher_of()
    with no_thread_starts():
        with pytest.raises(RuntimeError, match="can't start new thread"):
            batcher.submit(1)
        assert batcher.statistics().queued == 0
    assert batcher.submit(2).wait(PATIENCE) == 4
    batcher.close()


def test_close_returns_when_no_thread_can_start():
    batcher = batcher_of()
    with no_thread_starts():
        batcher.close()
    with pytest.raises(BatcherClosedError):
        batcher.submit(1)


# Importing torch takes seconds, so one interpreter imports it, and forks itself for each promise. A
# fork that reaches the end of the program exits like any interpreter.
PROGRAM = """
import atexit, os, sys, time, warnings
from torchfut_aio import Batcher

def double(items):
    time.sleep(0.01)
    return [2 * item for item in items]

def queued_at_exit():
    for n in range(5):
        batcher.submit(n).add_done_callback(lambda fut: print(fut.value(), flush=True))

def idle_at_exit():
    assert [batcher.submit(n) for n in range(2)][1].wait(30) == 2
    # The interpreter waits for threads before it calls what is registered here.
    atexit.register(lambda end: print(time.monotonic() - end), time.monotonic())

def forked():
    warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
    pending = batcher.submit(1)
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        batcher.submit(5)
        print(pending.wait(30))
    else:
        print(batcher.statistics().queued)
        print([batcher.submit(n) for n in (6, 7)][1].wait(30), flush=True)
        os._exit(0)

batcher = Batcher(double, max_batch_size=2, max_wait=3600, max_queue_size=100)
for each in (queued_at_exit, idle_at_exit, forked):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        print(flush=True)
    else:
        each()
        break
"""


def test_exit_completes_queued_items_and_fork_starts_afresh():
    queued, waited, forked = forks.output(PROGRAM).strip().split("\n\n")
    assert queued.split() == ["0", "2", "4", "6", "8"]
    assert float(waited) < 5
    assert forked.split() == ["0", "14", "2"]


# ----------------------------------------------------------------- interrupts at every point


@pytest.mark.parametrize(
    ("error", "at"), [(KeyboardInterrupt, "signals"), (MemoryError, "calls")], ids=["^C", "memory"]
)
def test_interrupted_submit_loses_at_most_its_own_item(error, at):
    modules = _batcher, _batch_queue, _batch_worker, _threads
    for interrupt in explorer.interrupts(*modules, error=error, at=at):
        batcher = batcher_of()
        before = batcher.submit(1)
        with interrupt:
            batcher.submit(2)
        assert before.wait(PATIENCE) == 2, interrupt
        assert batcher.submit(3).wait(PATIENCE) == 6, interrupt
        batcher.close()
        assert batcher.statistics().queued == 0, interrupt
        until(lambda: not threads())


@pytest.mark.parametrize("drain", [True, False])
def test_interrupted_close_can_be_repeated(drain):
    for interrupt in explorer.interrupts(_batcher, _batch_queue, _batch_worker, _threads):
        batcher = batcher_of(max_wait=math.inf)
        futures = [batcher.submit(n) for n in range(3)]
        with interrupt:
            batcher.close(drain=drain)
        batcher.close(drain=drain)
        assert all(fut.done() for fut in futures), interrupt
        assert not drain or [fut.value() for fut in futures] == [0, 2, 4], interrupt
        until(lambda: not threads())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_memory_error_in_the_thread_leaves_no_future_pending():
    for interrupt in explorer.interrupts(
        _batcher, _batch_queue, _batch_worker, error=MemoryError, at="calls", thread=NAME
    ):
        with interrupt:
            batcher = batcher_of(max_batch_size=2)
            futures = [batcher.submit(n) for n in range(4)]
            give_up(batcher.submit("given up"))
            until(lambda futures=futures: all(fut.done() for fut in futures))
            futures.append(batcher.submit(4))
            batcher.close()
            until(lambda: not threads())
        for n, fut in enumerate(futures):
            assert isinstance(fut.exception(), (MemoryError, RuntimeError)) or fut.value() == 2 * n


def rests():
    """Return True if the thread waits for items, so it takes no step before one comes."""
    [thread] = threads()
    frame = sys._current_frames().get(thread.ident)
    return frame is not None and "wakeups.get(" in linecache.getline(
        frame.f_code.co_filename, frame.f_lineno
    )


@pytest.mark.parametrize("closes", [False, True])
def test_item_submitted_at_any_step_of_the_thread_is_run(closes):
    def submit():
        was_open = not batcher.closed
        try:
            late.append((was_open, batcher.submit(5)))
        except BatcherClosedError:
            assert not was_open
        if closes:
            batcher.close()

    def submit_beside():
        if closes:  # which waits for the interrupted thread
            beside.append(threading.Thread(target=submit))
            beside[0].start()
            until(lambda: batcher.closed)
        else:
            with running(submit):
                pass
        struck.set()

    for interrupt in explorer.interrupts(
        _batch_queue, _batch_worker, thread=NAME, do=submit_beside
    ):
        batcher, late, beside, struck = batcher_of(), [], [], threading.Event()
        with interrupt:
            assert batcher.submit(1).wait(PATIENCE) == 2, interrupt
            until(lambda: struck.is_set() or rests())
            batcher.close()
            until(lambda: not threads())
        for thread in beside:
            thread.join(PATIENCE)
            assert not thread.is_alive(), interrupt
        for was_open, fut in late:
            if was_open or fut.exception() is None:
                assert fut.wait(PATIENCE) == 10, interrupt
            else:
                assert isinstance(fut.exception(), BatcherClosedError), interrupt


# ------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_batch_size": 0}, ValueError, "max_batch_size must be positive, not 0"),
        ({"max_batch_size": 2.0}, TypeError, "max_batch_size must be an int, not float"),
        (
            {"max_queue_size": 7},
            ValueError,
            "max_queue_size must be at least max_batch_size, which is 8; not 7",
        ),
        ({"max_queue_size": "9"}, TypeError, "max_queue_size must be an int or None, not str"),
        ({"max_wait": "1"}, TypeError, "max_wait must be a number of seconds"),
        ({"max_wait": None}, TypeError, "max_wait must be a number of seconds"),
        ({"name": 3}, TypeError, "name must be a str or None, not int"),
        ({"function": None}, TypeError, "takes a function of a list of items, not NoneType"),
    ],
)
def test_batcher_refuses_invalid_arguments(options, error, text):
    with pytest.raises(error, match=text):
        batcher_of(**options)


def test_queue_without_a_limit_accepts_every_item():
    with batcher_of(max_queue_size=None) as batcher:
        futures = [batcher.submit(n) for n in range(10_000)]
        assert futures[-1].wait(PATIENCE) == 2 * 9_999


def test_a_batcher_shows_its_name_and_state():
    started, may_go_on = threading.Event(), threading.Event()

    def slow(items):
        started.set()
        assert may_go_on.wait(PATIENCE)
        return items

    for limit, shown in ((100, "2/100"), (None, "2")):
        started.clear()
        with batcher_of(slow, max_batch_size=1, max_queue_size=limit) as batcher:
            batcher.submit(0)
            assert started.wait(PATIENCE)
            for n in range(2):
                batcher.submit(n)
            assert repr(batcher) == f"<Batcher {NAME!r} open queued={shown} running=1>"
            assert batcher.name == NAME
            assert not batcher.closed
            may_go_on.set()
        assert batcher.closed
        assert " closed queued=0" in repr(batcher)
        may_go_on.clear()


def test_the_thread_is_named_after_the_function_by_default():
    def name(items):
        return [threading.current_thread().name for _ in items]

    with Batcher(name, max_batch_size=1, max_queue_size=1) as batcher:
        assert batcher.submit(1).wait(PATIENCE).startswith("torchfut_aio batcher of test_the_")
    with batcher_of(name) as batcher:
        assert batcher.submit(1).wait(PATIENCE) == NAME


@on_every_loop
async def test_future_of_an_async_batcher_has_the_usual_repr():
    async with batcher_of(double_soon) as batcher:
        fut = batcher.submit(2)
        assert repr(fut).startswith("<Future pending")
        assert await fut == 4


def test_submit_returns_a_regular_future():
    with batcher_of() as batcher:
        fut = batcher.submit(2)
        assert isinstance(fut, Future)
        assert fut.then(lambda fut: fut.value() + 1).wait(PATIENCE) == 5

"""Nothing leaks: memory stays flat, and cycles are collected."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import logging
import tracemalloc
import weakref

import anyio
import pytest

from torchfut_aio import Future, as_future, gather

from .loops import on_every_loop
from .threads import running


class Growth:
    """Bytes allocated by Python within the block and not freed."""

    def __enter__(self):
        gc.collect()
        tracemalloc.start()
        self.before, _ = tracemalloc.get_traced_memory()
        return self

    def __exit__(self, *error):
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.bytes = after - self.before


@on_every_loop
async def test_timed_out_awaits_on_a_pending_future_keep_memory_flat():
    fut = Future()

    async def time_out(n):
        for _ in range(n):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await fut

    await time_out(100)
    with Growth() as growth:
        await time_out(2_000)
    assert repr(fut) == "<Future pending waiters=0 callbacks=0>"
    assert growth.bytes < 20_000


def test_timed_out_awaits_of_many_tasks_keep_memory_flat():
    fut = Future()

    async def main():
        async def value():
            return await fut

        async def round_of(n):
            tasks = [asyncio.ensure_future(value()) for _ in range(n)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

        await round_of(1000)
        with Growth() as growth:
            for _ in range(20):
                await round_of(1000)
        return growth.bytes

    # A waiter left behind by each wait would take several times as much.
    assert asyncio.run(main()) < 400_000
    assert repr(fut) == "<Future pending waiters=0 callbacks=0>"


def test_timed_out_waits_in_threads_keep_memory_flat():
    fut = Future()

    def time_out(n):
        for _ in range(n):
            with pytest.raises(TimeoutError):
                fut.wait(timeout=0)

    time_out(10)
    with Growth() as growth:
        time_out(2_000)
    assert growth.bytes < 20_000


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def test_futures_made_awaited_and_dropped_keep_memory_flat(nothing_blocks_a_loop, survivors):
    nothing_blocks_a_loop.deactivate()  # BlockBuster makes this ten times slower

    async def value(fut):
        return await fut

    async def rounds_of_5000(n):
        for _ in range(n):
            futures = [Future() for _ in range(5_000)]
            tasks = [asyncio.ensure_future(value(fut)) for fut in futures]
            await asyncio.sleep(0)
            setting = asyncio.to_thread(lambda: [fut.set_result(None) for fut in futures])
            await asyncio.gather(setting, *tasks)

    asyncio.run(rounds_of_5000(10))
    before = resident()  # includes C++ allocations
    asyncio.run(rounds_of_5000(30))
    assert resident() - before < 150_000 * 27  # an allocation of malloc() takes at least 32 bytes


@pytest.fixture
def survivors(monkeypatch):
    """A function that calls ``make``, collects garbage, and returns the objects that survive."""
    # Finalisers log errors, and pytest keeps log records. From CPython 3.15 on, the collector
    # clears weak references only after it has called the finalisers.
    monkeypatch.setattr(logging.getLogger("torchfut_aio.unretrieved"), "disabled", True)

    def survivors(make):
        refs = [weakref.ref(thing) for thing in make()]
        gc.collect()
        return [ref() for ref in refs if ref() is not None]

    return survivors


def test_pending_future_with_a_cyclic_callback_is_collected(survivors):
    def make():
        fut = Future()
        fut.add_done_callback(lambda f: fut)
        child = fut.then(lambda f: (fut, child))
        both = gather([fut, child])
        both.then(lambda f: (both, fut))
        return fut, child, both

    assert survivors(make) == []


def test_pending_future_of_an_abandoned_coroutine_is_collected(survivors):
    def make():
        fut = Future()

        async def main():
            fut.awaited_by = asyncio.ensure_future(value(fut))
            await asyncio.sleep(0)
            fut.awaited_by.cancel()

        async def value(fut):
            await fut

        asyncio.run(main())
        return [fut]

    assert survivors(make) == []


@pytest.mark.parametrize("read", [True, False])
def test_future_with_a_cyclic_error_is_collected(read, survivors):
    def make():
        fut = Future()
        try:
            raise ValueError(fut)
        except ValueError as error:
            fut.set_exception(error)  # a cycle: traceback, this frame, future
        if read:
            with pytest.raises(ValueError, match="Future"):
                fut.wait()
        return [fut]

    assert survivors(make) == []


def test_a_failed_chain_and_adopted_future_are_collected(survivors):
    def make():
        fut, source = Future(), concurrent.futures.Future()
        adopted = as_future(source)
        child = fut.then(lambda f: (f, child, adopted)[9])
        fut.set_result(None)
        source.set_exception(ValueError(adopted))
        with pytest.raises(ValueError, match="Future"):
            adopted.wait()
        return fut, child

    assert survivors(make) == []


def test_reading_an_error_creates_no_reference_cycle():
    fut = Future()
    fut.set_exception(ValueError("foo"))
    ref = weakref.ref(fut)
    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            fut.wait()
        del fut
        assert ref() is None
    finally:
        gc.enable()


def test_child_of_a_raising_callback_is_freed_without_collector():
    fut = Future()
    ref = weakref.ref(fut.then(lambda _: 1 / 0))
    gc.disable()
    try:
        fut.set_result(1)
        assert ref() is None
    finally:
        gc.enable()


def test_done_future_keeps_neither_callbacks_nor_waiters():
    class Thing:
        def __call__(self, fut):
            return None

    fut = Future()
    thing = Thing()
    ref = weakref.ref(thing)
    fut.add_done_callback(thing)
    fut.then(thing)
    with running(fut.wait):
        fut.set_result(None)
    del thing
    gc.collect()
    assert ref() is None

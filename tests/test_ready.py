"""Await means ready: the value is set, and the kernels that fill it are done."""

from __future__ import annotations

import asyncio

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch

from torchfut_aio import (
    Future,
    _as_completed,
    _to_stdlib,
    as_completed,
    as_future,
    collect_all,
    gather,
    poll_statistics,
    set_results,
    synchronize,
    to_host,
)
from torchfut_aio._devices import _readiness, _watcher

from .accelerator import (
    FIRST,
    NEW,
    SECOND,
    being_filled,
    completed_on,
    current_stream,
    declared_or_not,
    ends_soon,
    read_on_current_stream,
    several_devices,
)
from .explorer import interrupts
from .loops import on_asyncio, on_every_loop
from .threads import PATIENCE, alongside, running, until
from .waiting import Reader, eventually, pending, polled

pytestmark = pytest.mark.device


def failed_on(stream, accelerator):
    """Return a done future whose value is on ``stream``, after a kernel that failed."""
    with stream:
        accelerator.fail("the kernel failed")
    fut = completed_on(stream, accelerator, None)  # outside: a stream of torch 2.7 does not nest
    accelerator.wake()
    return fut


# ------------------------------------------------------------------------------- await


@on_every_loop
@declared_or_not
async def test_await_waits_for_the_kernels_without_blocking_the_loop(
    accelerator, producer, devices
):
    fut = Future(devices=devices)
    reader = Reader(fut)
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await anyio.wait_all_tasks_blocked()
        with producer:
            fut.set_result(being_filled(accelerator))
        await polled()
        assert fut.done()
        assert reader.outcome is None
        accelerator.wake()
    assert producer.query()
    assert reader.outcome is fut.value()
    assert reader.outcome.tolist() == NEW


@on_every_loop
@declared_or_not
async def test_await_never_blocks_on_the_device(accelerator, producer, devices):
    fut = Future(devices=devices)
    with producer:
        tensor = being_filled(accelerator)
        accelerator.reset_counters()
        fut.set_result(tensor)
    reader = Reader(fut)
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await polled()
        accelerator.wake()
    assert accelerator.counters()["synchronizations"] == 0
    assert reader.outcome is tensor


@on_every_loop
@declared_or_not
async def test_only_kernels_enqueued_before_the_completion_are_awaited(
    accelerator, producer, devices
):
    fut = Future(devices=devices)
    with producer:
        fut.set_result(torch.full((2,), 7.0, device=FIRST))
        accelerator.sleep(PATIENCE)
    assert (await fut) is fut.value()
    assert not producer.query()


@on_every_loop
@declared_or_not
async def test_kernels_of_other_streams_are_not_awaited(accelerator, producer, consumer, devices):
    slow, quick = completed_on(producer, accelerator, devices), Future(devices=devices)
    with consumer:
        quick.set_result(torch.full((2,), 7.0, device=FIRST))
    reader = Reader(slow)
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await pending(1)
        assert (await quick).tolist() == NEW
        assert reader.outcome is None
        accelerator.wake()


@on_every_loop
@declared_or_not
async def test_awaiting_again_returns_at_once(accelerator, producer, devices):
    fut = completed_on(producer, accelerator, devices)
    accelerator.wake()
    await fut
    before = poll_statistics()
    assert (await fut).tolist() == NEW
    assert poll_statistics() == before


@on_every_loop
@declared_or_not
async def test_many_tasks_can_await_one_value(accelerator, producer, devices):
    fut = completed_on(producer, accelerator, devices)
    readers = [Reader(fut) for _ in range(20)]
    async with anyio.create_task_group() as tg:
        for reader in readers:
            tg.start_soon(reader)
        await pending(20)
        accelerator.wake()
    assert all(reader.outcome is fut.value() for reader in readers)


@on_every_loop
@several_devices
@pytest.mark.parametrize("devices", [[FIRST, SECOND], None], ids=["declared", "undeclared"])
async def test_value_on_several_devices_is_ready_when_all_parts_are(accelerator, devices):
    fut = Future(devices=devices)
    with torch.Stream(FIRST) as first:
        one = being_filled(accelerator, FIRST)
        accelerator.wake()
        first.synchronize()
    with torch.Stream(SECOND), first:
        fut.set_result({"a": one, "b": [being_filled(accelerator, SECOND)]})
    reader = Reader(fut)
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await polled()
        assert reader.outcome is None
        accelerator.wake()
    assert reader.outcome["b"][0].tolist() == NEW


@on_every_loop
@declared_or_not
async def test_an_error_is_raised_without_waiting_for_any_kernel(accelerator, producer, devices):
    fut = Future(devices=devices)
    with producer:
        being_filled(accelerator)
        fut.set_exception(ValueError("foo"))
    with pytest.raises(ValueError, match="foo"):
        await fut
    assert not producer.query()


@on_every_loop
@declared_or_not
async def test_awaited_value_can_be_used_on_the_current_streams(
    accelerator, producer, consumer, devices
):
    fut = completed_on(producer, accelerator, devices)
    accelerator.wake()
    tensor = await fut
    with consumer:
        copy = read_on_current_stream(tensor)
        consumer.synchronize()
    assert copy.tolist() == NEW


@on_every_loop
@declared_or_not
async def test_cancelled_await_leaves_the_device_future_unchanged(accelerator, producer, devices):
    fut = completed_on(producer, accelerator, devices)
    with anyio.move_on_after(0.01) as scope:
        await fut
    assert scope.cancelled_caught
    polls = poll_statistics().polls
    assert poll_statistics().pending == 0
    await anyio.sleep(0.01)
    assert poll_statistics().polls == polls
    accelerator.wake()
    assert (await fut).tolist() == NEW


@declared_or_not
def test_loops_in_several_threads_can_await_one_value(accelerator, producer, devices):
    fut = completed_on(producer, accelerator, devices)
    values = []

    async def read():
        values.append(await fut)

    def on(backend):
        return lambda: anyio.run(read, backend=backend)

    with running(on("asyncio"), on("asyncio"), on("trio"), on("trio")):
        until(lambda: poll_statistics().pending == 4)
        assert not values
        accelerator.wake()
    assert [value.tolist() for value in values] == [NEW] * 4


# ---------------------------------------------------------------------- stream_ordered


@on_every_loop
@declared_or_not
async def test_stream_ordered_orders_the_stream_without_waiting(accelerator, producer, devices):
    fut, current = Future(devices=devices), torch.Stream(FIRST)
    before = torch.accelerator.current_stream()
    copies = []

    async def read():
        torch.accelerator.set_stream(current)
        tensor = await fut.stream_ordered()
        copies.append(read_on_current_stream(tensor))

    try:
        async with anyio.create_task_group() as tg:
            tg.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            with producer:
                fut.set_result(being_filled(accelerator))
    finally:
        torch.accelerator.set_stream(before)
    assert not producer.query()
    assert not current.query()
    assert poll_statistics().queries == 0
    accelerator.wake()
    await synchronize(current)
    assert copies[0].tolist() == NEW


@on_every_loop
async def test_stream_ordered_returns_the_value_or_raises_the_error(accelerator):
    fut, failed = Future(), Future()
    fut.set_result(5)
    failed.set_exception(ValueError("foo"))
    assert await fut.stream_ordered() == 5
    with pytest.raises(ValueError, match="foo"):
        await failed.stream_ordered()


# ------------------------------------------------------------------------- combinations


@on_every_loop
@declared_or_not
@pytest.mark.parametrize("combine", [gather, collect_all])
async def test_a_combined_future_is_ready_when_its_parts_are(accelerator, devices, combine):
    futures = [Future(devices=devices) for _ in range(3)]
    combined = combine(futures)
    for fut in futures:
        with torch.Stream(FIRST):
            fut.set_result(being_filled(accelerator))
    assert combined.done()
    reader = Reader(combined)
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await polled()
        assert reader.outcome is None
        accelerator.wake()
    values = [f.value() for f in futures]
    assert [v.tolist() for v in values] == [NEW] * 3
    expected = futures if combine is collect_all else values
    assert all(got is want for got, want in zip(reader.outcome, expected))


@on_every_loop
@declared_or_not
async def test_combined_future_ignores_unrelated_work_of_its_setter(accelerator, producer, devices):
    on_device, on_host = Future(devices=devices), Future()
    combined = gather([on_device, on_host])
    with producer:
        on_device.set_result(torch.full((2,), 7.0, device=FIRST))
    with torch.Stream(FIRST) as busy:
        accelerator.sleep(PATIENCE)
        on_host.set_result("text")
    with anyio.fail_after(PATIENCE / 2):
        assert [str(part) for part in await combined][1] == "text"
    assert not busy.query()


@on_every_loop
@declared_or_not
async def test_combining_futures_does_not_order_unrelated_streams(accelerator, producer, devices):
    one = completed_on(producer, accelerator, devices)

    def combined_beside_an_idle_stream():
        for _ in range(20):
            other = Future(devices=devices)
            combined = gather([one, other])
            with torch.Stream(FIRST) as bystander:
                other.set_result(torch.ones(2, device=FIRST))
            if ends_soon(bystander):
                return combined
        raise AssertionError("each stream waits for the one that is held up")

    combined = await anyio.to_thread.run_sync(combined_beside_an_idle_stream)
    assert not producer.query()
    accelerator.wake()
    assert (await combined)[0].tolist() == NEW


@on_every_loop
@declared_or_not
async def test_child_is_ready_when_work_of_its_callback_is_done(accelerator, producer, devices):
    fut = Future(devices=devices)
    child = fut.then(lambda f: f.value().clone())
    with producer:
        fut.set_result(being_filled(accelerator))
    reader = Reader(child)
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await polled()
        assert reader.outcome is None
        accelerator.wake()
    assert reader.outcome.tolist() == NEW


@on_every_loop
@declared_or_not
async def test_as_completed_in_a_task_yields_in_order_of_readiness(
    accelerator, producer, consumer, devices
):
    slow, quick, late = completed_on(producer, accelerator, devices), Future(), Future()
    completed = as_completed([slow, quick, late])
    with consumer:
        quick.set_result(torch.full((2,), 7.0, device=FIRST))
    assert await anext(completed) is quick
    assert not producer.query()
    reader = Reader(anext(completed))
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await polled()
        late.set_result("text")
    assert reader.outcome is late
    accelerator.wake()
    assert [fut.value().tolist() async for fut in completed] == [NEW]
    assert poll_statistics().pending == 0


@declared_or_not
def test_as_completed_in_a_thread_orders_the_current_streams(
    accelerator, producer, consumer, devices
):
    fut = completed_on(producer, accelerator, devices)
    with consumer:
        [copy] = [read_on_current_stream(fut.value()) for fut in as_completed([fut])]
    assert not producer.query()
    accelerator.wake()
    consumer.synchronize()
    assert copy.tolist() == NEW


@on_every_loop
async def test_as_completed_times_out_on_kernels_without_leaks(accelerator, producer):
    fut = completed_on(producer, accelerator, None)
    with pytest.raises(TimeoutError, match=r"not done within 0\.01 s: 1;"):
        await anext(as_completed([fut], timeout=0.01))
    accelerator.wake()
    assert (await fut).tolist() == NEW
    await eventually(lambda: poll_statistics().pending == 0)


@on_every_loop
async def test_cancelled_as_completed_can_be_resumed_in_a_thread(accelerator, producer):
    fut = completed_on(producer, accelerator, None)
    completed = as_completed([fut])
    with anyio.move_on_after(0.01):
        await anext(completed)
    assert await anyio.to_thread.run_sync(next, completed) is fut
    assert not producer.query()


def test_as_completed_can_be_resumed_on_another_loop(accelerator, producer):
    futures = [completed_on(producer, accelerator, None) for _ in range(2)]
    completed = as_completed(futures)

    async def give_up():
        with anyio.move_on_after(0.01):
            await anext(completed)

    async def read():
        return [fut async for fut in completed]

    anyio.run(give_up)
    accelerator.wake()
    assert anyio.run(read) == futures


@pytest.mark.parametrize(("error", "at"), [(KeyboardInterrupt, "signals"), (MemoryError, "calls")])
@pytest.mark.parametrize("where", ["task", "thread"])
def test_interrupted_as_completed_yields_the_remaining_futures(
    accelerator, producer, error, at, where
):
    value = torch.ones(1, device=FIRST)

    async def read(completed):
        return [fut async for fut in completed]

    for interrupt in interrupts(_as_completed, error=error, at=at, every=3):
        futures, got = [Future() for _ in range(3)], []
        completed = as_completed(futures)
        with producer:
            set_results(futures[:2], [value, value])
        futures[2].set_result(1)

        async def first(completed=completed, got=got):
            # Not a return value: the loop may be interrupted after the task has ended.
            got.append(await anext(completed))

        with interrupt:
            if where == "thread":
                got.append(next(completed))
            else:
                asyncio.run(first())
        rest = list(completed) if where == "thread" else asyncio.run(read(completed))
        assert len({*got, *rest}) == len(got + rest) == 3


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_as_completed_raises_if_streams_cannot_be_ordered(
    accelerator, producer, monkeypatch, error
):
    def fails(readiness):
        raise error

    fut = completed_on(producer, accelerator, None)
    completed = as_completed([fut])
    with monkeypatch.context() as patch:
        patch.setattr(_readiness.Readiness, "wait", fails)
        with pytest.raises(error):
            next(completed)
    assert next(completed) is fut
    accelerator.wake()


@on_every_loop
async def test_as_completed_yields_a_future_with_a_failed_kernel(accelerator, producer):
    done = await anext(as_completed([failed_on(producer, accelerator)]))
    with pytest.raises(RuntimeError, match="the kernel failed"):
        await done


@on_every_loop
@declared_or_not
async def test_adopted_torch_future_is_ready_with_its_kernels(accelerator, producer, devices):
    source = torch.futures.Future(devices=devices)
    fut = as_future(source)
    with producer:
        source.set_result([being_filled(accelerator)])
    reader = Reader(fut)
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await polled()
        assert reader.outcome is None
        accelerator.wake()
    assert reader.outcome[0].tolist() == NEW


@on_asyncio
@declared_or_not
async def test_as_asyncio_completes_when_the_value_is_ready(accelerator, producer, devices):
    pending_one = Future(devices=devices)
    done_one = completed_on(producer, accelerator, devices)
    targets = [pending_one.as_asyncio(), done_one.as_asyncio()]
    with producer:
        pending_one.set_result(being_filled(accelerator))
    await polled()
    assert not any(target.done() for target in targets)
    accelerator.wake()
    values = await asyncio.gather(*targets)
    assert [value.tolist() for value in values] == [NEW, NEW]


@on_asyncio
async def test_cancelled_as_asyncio_leaves_no_wait_in_the_watcher(accelerator, producer):
    target = completed_on(producer, accelerator, None).as_asyncio()
    assert poll_statistics().pending == 1
    target.cancel()
    await asyncio.sleep(0)
    assert poll_statistics().pending == 0


@on_asyncio
async def test_interrupted_as_asyncio_leaves_no_wait_after_the_kernels(accelerator, producer):
    fut = completed_on(producer, accelerator, None)
    await asyncio.sleep(0)
    for interrupt in interrupts(_to_stdlib, _readiness, _watcher):
        target = asyncio.get_running_loop().create_future()
        with interrupt:
            _to_stdlib.copy_when_ready(fut, target)
    accelerator.wake()
    assert (await target).tolist() == NEW
    await eventually(lambda: poll_statistics().pending == 0)


# ------------------------------------------------------------------------------ failure


@on_every_loop
@declared_or_not
async def test_failed_kernel_fails_only_awaits_on_its_stream(
    accelerator, producer, consumer, devices
):
    early = completed_on(producer, accelerator, devices)
    with producer:
        accelerator.fail("the kernel failed")
    late = completed_on(producer, accelerator, devices)
    latest = completed_on(producer, accelerator, devices)
    other = completed_on(consumer, accelerator, devices)
    waits = [early, late, latest, other, gather([other, late]), synchronize(producer)]
    readers = [Reader(wait) for wait in waits]
    async with anyio.create_task_group() as tg:
        for reader in readers:
            tg.start_soon(reader)
        await pending(len(waits))
        accelerator.wake()
    outcomes = [reader.outcome for reader in readers]
    assert outcomes[0].tolist() == outcomes[3].tolist() == NEW
    for error in outcomes[1], outcomes[2], outcomes[4], outcomes[5]:
        assert isinstance(error, RuntimeError)
        assert "the kernel failed" in str(error)
    # The future has its value. Each use of the value raises the stream's error.
    assert late.done()
    assert late.exception() is None
    with pytest.raises(RuntimeError, match="the kernel failed"):
        await late
    with producer, pytest.raises(RuntimeError, match="the kernel failed"):
        await to_host(late.value())
    assert poll_statistics().pending == 0


@on_asyncio
async def test_a_failed_kernel_reaches_as_asyncio(accelerator, producer):
    fut = failed_on(producer, accelerator)
    first = fut.as_asyncio()
    with pytest.raises(RuntimeError, match="the kernel failed"):
        await first
    second = fut.as_asyncio()
    with pytest.raises(RuntimeError, match="the kernel failed"):
        await second


# -------------------------------------------------------------------- under some load


@on_every_loop
async def test_awaits_on_many_streams_each_resume_with_their_kernel(
    accelerator,
):
    streams = [torch.Stream(FIRST) for _ in range(6)]
    outcomes = []

    async def read(fut, n):
        outcomes.append((n, (await fut)[0].item()))

    def produce(futures):
        for n, fut in futures:
            with streams[n % 6]:
                tensor = torch.zeros(1, device=FIRST)
                accelerator.fill_after(tensor, n, 0.0001)
                fut.set_result([tensor])

    futures = [(n, Future()) for n in range(600)]
    async with alongside(lambda: produce(futures[::2]), lambda: produce(futures[1::2])):
        async with anyio.create_task_group() as tg:
            for n, fut in futures:
                tg.start_soon(read, *([fut, n]))
    assert sorted(outcomes) == [(n, float(n)) for n in range(600)]
    assert poll_statistics().pending == 0


@on_every_loop
async def test_randomly_cancelled_awaits_do_not_affect_others(accelerator):
    stream = torch.Stream(FIRST)
    resumed, given_up = [], []

    async def read(fut, seconds):
        with anyio.move_on_after(seconds) as scope:
            resumed.append(await fut)
        if scope.cancelled_caught:
            given_up.append(fut)

    for _ in range(10):
        accelerator.reset()
        resumed.clear()
        given_up.clear()
        # The zeros are written before the first kernel holds the stream up.
        tensors, futures = torch.zeros(20, 2, device=FIRST).unbind(), []
        current_stream().synchronize()
        with stream:
            for tensor in tensors:
                accelerator.fill_after(tensor, 7, PATIENCE)
                futures.append(Future())
                futures[-1].set_result(tensor)
        async with anyio.create_task_group() as tg:
            for n, fut in enumerate(futures):
                tg.start_soon(read, fut, n / 10_000 if n % 2 else PATIENCE)
            while len(given_up) < 10:
                await anyio.lowlevel.checkpoint()
            await pending(10)
            accelerator.wake()
        assert [value.tolist() for value in resumed] == [NEW] * 10
        assert poll_statistics().pending == 0

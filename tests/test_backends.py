"""Promises on devices with the limits and habits of PyTorch's other backends.

The switches of the simulated device emulate them; ``simulated_device/__init__.py`` says which
backend each switch stands for.
"""

from __future__ import annotations

import anyio
import pytest
import torch

from torchfut_aio import (
    Future,
    PollPolicy,
    as_future,
    collect_all,
    set_poll_policy,
    synchronize,
    to_host,
)
from torchfut_aio._devices import devices_in_use, record_event

from . import test_devices, test_ready
from .accelerator import (
    DEVICE,
    FIRST,
    NEW,
    SECOND,
    being_filled,
    completed_on,
    current_stream,
    declared_or_not,
    simulated_only,
)
from .loops import on_every_loop
from .threads import running
from .waiting import Reader, pending

pytestmark = [pytest.mark.device, simulated_only]


# ------------------------------------- tests of other files, with events like openreg's

BORROWED = {
    name: test
    for module in (test_devices, test_ready)
    for name, test in vars(module).items()
    if name.startswith("test_") and callable(test)
}
globals().update(BORROWED)


@pytest.fixture
def accelerator(accelerator, request):
    if request.function.__name__ in BORROWED:
        accelerator.keep_first_recordings()
    return accelerator


@pytest.fixture
def blocking_policy():
    before = set_poll_policy(PollPolicy(blocking=True))
    yield
    set_poll_policy(before)


# ------------------------------------------------------------------------ no events at all


@declared_or_not
def test_value_is_returned_unchanged_without_events(accelerator, producer, devices):
    accelerator.take_events_away()
    fut, seen = Future(devices=devices), []
    fut.add_done_callback(seen.append)
    child = fut.then(lambda f: f.value())
    with producer:
        fut.set_result(tensor := being_filled(accelerator))
    assert fut.wait() is child.wait() is tensor
    assert collect_all([fut, child]).wait() == [fut, child]
    assert seen == [fut]


@on_every_loop
@declared_or_not
async def test_await_without_events_waits_without_blocking_the_loop(accelerator, producer, devices):
    accelerator.take_events_away()
    fut = completed_on(producer, accelerator, devices)
    reader, copy = Reader(fut), Reader(to_host(fut.value()))
    stream = Reader(synchronize(producer))
    async with anyio.create_task_group() as tg:
        for task in (reader, stream):
            tg.start_soon(task)
        await pending(2)
        assert reader.outcome is None
        assert not producer.query()
        accelerator.wake()
    assert producer.query()
    assert reader.outcome is fut.value()
    assert reader.outcome.tolist() == NEW
    await copy()
    assert copy.outcome.tolist() == NEW


@on_every_loop
async def test_failed_kernel_fails_its_await_without_events(accelerator, producer):
    accelerator.take_events_away()
    with producer:
        accelerator.fail("the kernel failed")
        fut = Future()
        fut.set_result(torch.ones(1, device=FIRST))
    with pytest.raises(RuntimeError, match="the kernel failed"):
        await fut


@on_every_loop
async def test_values_are_copied_and_combined_without_new_streams(accelerator):
    accelerator.take_new_streams_away()
    futs = [completed_on(current_stream(), accelerator, None) for _ in range(2)]
    accelerator.wake()
    assert [f.value().tolist() for f in await collect_all(futs)] == [NEW, NEW]
    assert (await to_host(futs[0].value())).tolist() == NEW


# ------------------------------------------------------------ streams cannot be ordered


@on_every_loop
@declared_or_not
async def test_unorderable_torch_future_fails_its_adopted_future(accelerator, producer, devices):
    source = torch.futures.Future(devices=devices)
    with producer:
        source.set_result(torch.ones(1, device=FIRST))
    accelerator.refuse_events()
    fut = as_future(source)
    with pytest.raises(RuntimeError, match="the device is lost"):
        await fut


# ------------------------------------------------------- event classes, where threads block


@on_every_loop
@pytest.mark.parametrize("backend", ["xpu", "mps", "cuda before 2026"])
@declared_or_not
async def test_blocking_policy_supports_any_event_class(
    accelerator, producer, blocking_policy, devices, backend
):
    accelerator.take_event_class_of(backend)
    fut = completed_on(producer, accelerator, devices)
    reader = Reader(fut)
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await pending(1)
        assert not producer.query()
        accelerator.wake()
    assert reader.outcome.tolist() == NEW


def test_blocking_policy_records_device_events_on_device_streams(accelerator, blocking_policy):
    accelerator.take_event_class_of("cuda before 2026")
    recorded = record_event(torch.Stream(SECOND))
    assert type(recorded.event) is accelerator.Event
    assert recorded.event.device == torch.device(SECOND)


# -------------------------------------------------------------------------------- contexts


def in_thread(body):
    """Run ``body`` in a new thread, in which the first device is current."""
    done = []
    with running(lambda: done.append(body())):
        pass
    return done[0]


@pytest.fixture(params=[False, True], ids=["polled", "blocked for"])
def either_policy(request):
    before = set_poll_policy(PollPolicy(blocking=request.param))
    yield
    set_poll_policy(before)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_loop_in_a_thread_creates_no_context_on_unused_devices(accelerator, either_policy, backend):
    stream, own = torch.Stream(SECOND), torch.Event(DEVICE)
    with stream:
        fut = Future()
        fut.set_result(being_filled(accelerator, SECOND))
        own.record(stream)
    torch.accelerator.set_device_index(0)

    async def main():
        async with anyio.create_task_group() as tg:
            tg.start_soon(Reader(fut))
            tg.start_soon(Reader(as_future(own)))
            tg.start_soon(Reader(synchronize(own)))
            tg.start_soon(Reader(synchronize(SECOND)))
            await pending(2)
            accelerator.wake()
        copy = await to_host(fut.value())
        await synchronize(stream)
        return copy.tolist(), torch.accelerator.current_device_index()

    def body():
        accelerator.count_contexts()
        torch.accelerator.set_device_index(0)
        return anyio.run(main, backend=backend)

    assert in_thread(body) == (NEW, 0)
    assert accelerator.has_context(1)
    assert not accelerator.has_context(0)
    assert devices_in_use() == [torch.device(SECOND)]

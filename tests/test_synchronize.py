"""Awaiting the device: synchronize, to_host, and events and streams as futures."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import threading
import types
from typing import NamedTuple

import anyio
import anyio.lowlevel
import pytest
import torch

from torchfut_aio import (
    BlockingWaitWarning,
    Future,
    PollPolicy,
    _threads,
    as_future,
    gather,
    poll_statistics,
    set_poll_policy,
    synchronize,
    to_host,
)
from torchfut_aio._devices import _background
from torchfut_aio._threads import BlockingThread

from . import explorer
from .accelerator import DEVICE, FIRST, NEW, being_filled, needs, simulated_only
from .loops import on_every_loop
from .threads import PATIENCE, no_thread_starts, running, until, worker_named
from .waiting import Reader, pending, polled

pytestmark = pytest.mark.device


def recorded(stream):
    event = torch.Event(DEVICE)
    event.record(stream)
    return event


targets = pytest.mark.parametrize(
    "target_of",
    [recorded, lambda stream: stream, lambda stream: FIRST, lambda stream: torch.device(FIRST)],
    ids=["event", "stream", "device name", "device"],
)


# -------------------------------------------------------------------------- synchronize


@on_every_loop
@targets
async def test_synchronize_waits_without_blocking_the_loop(accelerator, producer, target_of):
    with producer:
        tensor = being_filled(accelerator)
    reader = Reader(synchronize(target_of(producer)))
    reader.outcome = "pending"
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        for _ in range(10):
            await anyio.sleep(0.001)
        assert reader.outcome == "pending"
        accelerator.wake()
    assert reader.outcome is None
    assert tensor.tolist() == NEW


@on_every_loop
async def test_synchronize_waits_for_the_current_stream_by_default(accelerator, producer):
    before = torch.accelerator.current_stream()
    torch.accelerator.set_stream(producer)
    try:
        accelerator.sleep(PATIENCE)
        reader = Reader(synchronize())
        async with anyio.create_task_group() as tg:
            tg.start_soon(reader)
            await pending(1)
            accelerator.wake()
    finally:
        torch.accelerator.set_stream(before)
    assert producer.query()


@on_every_loop
async def test_synchronize_ignores_work_enqueued_later(accelerator, producer):
    with producer:
        accelerator.sleep(PATIENCE)
    reader = Reader(synchronize(producer))
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await pending(1)
        accelerator.wake()
        with producer:
            accelerator.sleep(PATIENCE)
    assert not producer.query()


@on_every_loop
async def test_synchronize_returns_at_once_if_the_work_is_done(accelerator, producer):
    event = recorded(producer)
    event.synchronize()
    for target in (event, torch.Event(DEVICE), "cpu"):
        assert await synchronize(target) is None
    assert poll_statistics().polls == 0
    # An event that is recorded now completes a moment later, even on an idle GPU.
    for target in (producer, None):
        assert await synchronize(target) is None


@on_every_loop
@targets
async def test_synchronize_raises_the_error_of_a_failed_kernel(accelerator, producer, target_of):
    with producer:
        accelerator.fail("the kernel failed")
        accelerator.sleep(0)
    with pytest.raises(RuntimeError, match="the kernel failed"):
        await synchronize(target_of(producer))


@on_every_loop
@targets
async def test_synchronize_can_be_cancelled(accelerator, producer, target_of):
    with producer:
        accelerator.sleep(PATIENCE)
    target = target_of(producer)
    with anyio.move_on_after(0.01) as scope:
        await synchronize(target)
    assert scope.cancelled_caught
    assert poll_statistics().pending == 0
    accelerator.wake()


@on_every_loop
async def test_synchronize_refuses_other_objects(accelerator):
    for target, kind in ((Future(), "Future"), (torch.ones(2), "Tensor"), (object(), "object")):
        with pytest.raises(TypeError, match=f"torch.Event, a torch.Stream.*{kind}"):
            await synchronize(target)


# ------------------------------------------------------------------------------ to_host


class Point(NamedTuple):
    x: object
    y: object


@dataclasses.dataclass(frozen=True)
class Frozen:
    name: str
    tensor: torch.Tensor


@dataclasses.dataclass
class Slotted:
    __slots__ = ("name", "tensor")
    name: str
    tensor: torch.Tensor


def filled(value=7.0):
    return torch.full((2,), value, device=FIRST)


@on_every_loop
async def test_to_host_waits_for_kernels_and_copy_without_blocking(accelerator, producer):
    before = torch.accelerator.current_stream()
    torch.accelerator.set_stream(producer)
    try:
        tensor = being_filled(accelerator)
        accelerator.reset_counters()
        reader = Reader(to_host({"a": [tensor]}))
        async with anyio.create_task_group() as tg:
            tg.start_soon(reader)
            await polled()
            accelerator.wake()
    finally:
        torch.accelerator.set_stream(before)
    copy = reader.outcome["a"][0]
    assert copy.tolist() == NEW
    assert copy.is_pinned()
    assert accelerator.counters()["synchronizations"] == 0


@on_every_loop
async def test_to_host_and_later_kernels_do_not_wait_for_each_other(accelerator, producer):
    before = torch.accelerator.current_stream()
    torch.accelerator.set_stream(producer)
    try:
        reader = Reader(to_host(filled()))
        async with anyio.create_task_group() as tg:
            tg.start_soon(reader)
            await anyio.lowlevel.checkpoint()
            accelerator.sleep(PATIENCE)
    finally:
        torch.accelerator.set_stream(before)
    assert reader.outcome.tolist() == NEW
    assert not producer.query()


@on_every_loop
@pytest.mark.parametrize(
    "pack",
    [
        lambda t: t,
        lambda t: [t, 5],
        lambda t: (None, [t]),
        lambda t: {"a": {"b": t}},
        lambda t: Point("x", t),
        lambda t: collections.OrderedDict(a=t),
        lambda t: collections.defaultdict(list, a=[t]),
        lambda t: collections.deque([t], maxlen=3),
        lambda t: Frozen("first", t),
        lambda t: Slotted("first", t),
        lambda t: torch.return_types.max((t, t)),
    ],
)
async def test_to_host_keeps_the_structure_and_moves_the_tensors(accelerator, pack):
    value = pack(filled())
    copy = await to_host(value)
    expected = pack(torch.tensor(NEW))
    assert type(copy) is type(value)
    for got, want in zip(leaves(copy), leaves(expected)):
        if isinstance(want, torch.Tensor):
            assert got.device.type == "cpu"
            assert got.tolist() == NEW
        else:
            assert got == want
    assert all(t.device.type != "cpu" for t in leaves(value) if isinstance(t, torch.Tensor))


def leaves(thing):
    if isinstance(thing, dict):
        return [leaf for part in thing.items() for leaf in leaves(part)]
    if isinstance(thing, (list, tuple, collections.deque)):
        return [leaf for part in thing for leaf in leaves(part)]
    if isinstance(thing, (Frozen, Slotted)):
        return [thing.name, thing.tensor]
    return [thing]


@on_every_loop
async def test_to_host_returns_host_only_objects_unchanged(accelerator):
    host, other, text = torch.ones(2), object(), ["text"]
    value = {"host": host, "other": other, "text": text, "device": filled()}
    copy = await to_host(value)
    assert copy is not value
    assert (copy["host"], copy["other"], copy["text"]) == (host, other, text)
    assert copy["host"] is host
    assert copy["text"] is text
    holder = types.SimpleNamespace(tensor=host)
    for kept in (value["text"], host, other, None, 5, {"a": [host]}, holder):
        assert await to_host(kept) is kept


@on_every_loop
async def test_to_host_copies_a_shared_container_once(accelerator):
    tensor = filled()
    inner = [tensor, tensor]
    value = {"a": inner, "b": inner, "t": (tensor,)}
    copy = await to_host(value)
    assert copy["a"] is copy["b"]
    assert copy["a"][0] is copy["a"][1] is copy["t"][0]


@on_every_loop
async def test_to_host_matches_cpu_in_dtype_shape_strides_and_grad(accelerator):
    given = [
        torch.zeros(0, device=FIRST),
        torch.full((), 3, dtype=torch.int64, device=FIRST),
        torch.full((2, 3), 7.0, device=FIRST).t(),
        torch.full((4,), 7.0, dtype=torch.float16, device=FIRST)[1::2],
        torch.nn.Parameter(filled()),
    ]
    for tensor in given:
        copy, expected = await to_host(tensor), tensor.cpu()
        assert (copy.dtype, copy.shape, copy.stride()) == (
            expected.dtype,
            expected.shape,
            expected.stride(),
        )
        assert copy.tolist() == expected.tolist()
        assert copy.requires_grad == expected.requires_grad
        assert type(copy) is type(expected)


@on_every_loop
async def test_to_host_can_be_cancelled(accelerator, producer):
    before = torch.accelerator.current_stream()
    torch.accelerator.set_stream(producer)
    try:
        tensor = being_filled(accelerator)
        with anyio.move_on_after(0.01) as scope:
            await to_host(tensor)
        assert scope.cancelled_caught
        assert poll_statistics().pending == 0
        accelerator.wake()
        assert (await to_host(tensor)).tolist() == NEW
    finally:
        torch.accelerator.set_stream(before)


# ---------------------------------------------------------- events and streams, adopted


sources = pytest.mark.parametrize(
    "source_of", [recorded, lambda stream: stream], ids=["event", "stream"]
)


@on_every_loop
@sources
async def test_an_adopted_event_completes_when_it_is_reached(accelerator, producer, source_of):
    with producer:
        accelerator.sleep(PATIENCE)
    fut = as_future(source_of(producer))
    for _ in range(10):
        await anyio.sleep(0.001)
    assert not fut.done()
    accelerator.wake()
    assert await fut is None


@sources
def test_adopted_event_completes_without_a_running_loop(accelerator, producer, source_of):
    with producer:
        accelerator.sleep(PATIENCE)
    fut = as_future(source_of(producer))
    done = fut.then(lambda f: "done")
    with pytest.raises(TimeoutError):
        fut.wait(0.01)
    accelerator.wake()
    assert done.wait(PATIENCE) == "done"


def test_watcher_thread_ends_with_the_last_event(accelerator, producer):
    for _ in range(20):
        with producer:
            accelerator.sleep(PATIENCE)
        futures = [as_future(recorded(producer)) for _ in range(50)]
        assert len(watchers()) == 1
        accelerator.wake()
        assert gather(futures).wait(PATIENCE) == [None] * 50
        until(lambda: not watchers())


def watchers():
    return [t for t in threading.enumerate() if t.name == "torchfut_aio watcher"]


def test_threads_adopting_first_at_once_share_a_watcher_thread(accelerator, producer):
    watcher = worker_named("torchfut_aio watcher")
    for _ in range(30):
        with producer:
            accelerator.sleep(PATIENCE)
        futures = []
        with running(*[lambda: futures.append(as_future(recorded(producer)))] * 4):
            pass
        until(lambda: watchers() == watcher.threads())
        assert len(watchers()) == 1
        assert watcher.end(PATIENCE)  # another thread takes over
        more = as_future(recorded(producer))
        accelerator.wake()
        assert gather([*futures, more]).wait(PATIENCE) == [None] * 5
        until(lambda: not watchers())


def test_interrupted_adoption_leaves_nothing_and_harms_no_other(accelerator, producer):
    for interrupt in explorer.interrupts(_background, _threads):
        with producer:
            accelerator.sleep(PATIENCE)
        with interrupt:
            fut = as_future(producer)
        assert not interrupt.where or interrupt.raised, interrupt
        other = as_future(recorded(producer))
        accelerator.wake()
        assert other.wait(PATIENCE) is None, interrupt
        assert interrupt.where or fut.wait(PATIENCE) is None
        until(lambda: not watchers())
        assert not worker_named("torchfut_aio watcher").work, interrupt


def test_failed_thread_start_leaves_no_notification_behind(accelerator, producer):
    blocker = BlockingThread("torchfut_aio blocker")
    with producer:
        accelerator.sleep(PATIENCE)
    with no_thread_starts():
        with pytest.raises(RuntimeError, match="can't start new thread"):
            as_future(producer)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            blocker.submit(print, accelerator.wake)
    assert not worker_named("torchfut_aio watcher").work
    assert not blocker.work
    accelerator.wake()
    assert as_future(producer).wait(PATIENCE) is None


@on_every_loop
@sources
async def test_an_adopted_event_that_failed_fails_the_future(accelerator, producer, source_of):
    with producer:
        accelerator.sleep(PATIENCE)
        accelerator.fail("the kernel failed")
    futures = [as_future(source_of(producer)) for _ in range(3)]
    accelerator.wake()
    for fut in futures:
        with pytest.raises(RuntimeError, match="the kernel failed"):
            await fut
    with pytest.raises(RuntimeError, match="the kernel failed"):
        await as_future(source_of(producer))


@on_every_loop
async def test_adopted_event_that_is_already_reached_is_done(accelerator, producer):
    event = recorded(producer)
    event.synchronize()
    assert as_future(event).done()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_adopted_event_completes_even_if_its_loop_has_closed(accelerator, producer, backend):
    async def adopt():
        return as_future(recorded(producer))

    with producer:
        accelerator.sleep(PATIENCE)
    fut = anyio.run(adopt, backend=backend)
    accelerator.wake()
    assert fut.wait(PATIENCE) is None


@on_every_loop
async def test_adopted_event_can_be_completed_by_others(accelerator, producer):
    with producer:
        accelerator.sleep(PATIENCE)
    fut = as_future(producer)
    fut.set_exception(ValueError("foo"))
    accelerator.wake()
    await as_future(producer)
    with pytest.raises(ValueError, match="foo"):
        await fut


@pytest.mark.parametrize("blocking", [False, True])
def test_threads_without_a_loop_can_adopt_events_at_once(accelerator, producer, blocking):
    done = []

    def adopt():
        for _ in range(100):
            done.append(as_future(recorded(producer)).wait(PATIENCE))

    def work():
        for _ in range(300):
            with torch.Stream(FIRST):
                accelerator.sleep(0.0001)

    before = set_poll_policy(PollPolicy(blocking=blocking))
    try:
        with running(adopt, adopt, work):
            pass
    finally:
        set_poll_policy(before)
    assert done == [None] * 200


# ------------------------------------------------------------------------- odd values


@on_every_loop
async def test_synchronize_and_to_host_wait_for_work_before_the_call(accelerator, producer):
    with producer:
        waiting, copying = synchronize(producer), to_host(torch.full((2,), 7.0, device=FIRST))
        accelerator.sleep(PATIENCE)
    await waiting
    assert (await copying).tolist() == NEW
    assert not producer.query()


@on_every_loop
async def test_to_host_on_one_stream_does_not_delay_other_streams(accelerator, producer, consumer):
    with producer:
        slow = to_host(being_filled(accelerator))
    with anyio.move_on_after(0.01):
        await slow
    with consumer:
        quick = to_host(torch.full((2,), 7.0, device=FIRST))
    assert (await quick).tolist() == NEW
    assert not producer.query()


@on_every_loop
async def test_to_host_copies_sparse_tensors(accelerator):
    needs(accelerator, "sparse tensors")
    with torch.sparse.check_sparse_tensor_invariants(False):
        sparse = torch.sparse_coo_tensor([[0, 1], [1, 0]], [3.0, 4.0], (2, 2)).to(FIRST)
        copy = await to_host({"a": sparse})
    assert copy["a"].to_dense().tolist() == [[0, 3], [4, 0]]


class Unreadable(collections.UserDict):
    def values(self):
        raise OSError("the file is closed")


def test_unreadable_value_still_completes_its_future(accelerator):
    fut = Future()
    child = fut.then(lambda f: Unreadable())
    fut.set_result(Unreadable())
    assert type(fut.wait()) is type(child.wait()) is Unreadable


@simulated_only
def test_futures_fail_on_a_device_that_refuses_events(accelerator, producer):
    errors, futures = [], [Future() for _ in range(3)]
    done = [Future(), Future()]
    with producer:
        for fut in done:
            fut.set_result(filled())
    child, combined = futures[1].then(lambda f: value), gather([*done, futures[2]])
    torch.accelerator.synchronize()

    def wait():
        with pytest.raises(RuntimeError, match="the device is lost") as caught:
            futures[0].wait(PATIENCE)
        errors.append(caught.value)

    with running(wait):
        until(lambda: "waiters=1" in repr(futures[0]))
        value = filled()
        torch.accelerator.synchronize()
        accelerator.refuse_events()
        futures[0].set_result(value)
        futures[1].set_result(None)
        futures[2].set_result("text")
    assert errors == [futures[0].exception()]
    assert torch._C.Future.done(futures[0])
    for fut in (child, combined):
        with pytest.raises(RuntimeError, match="the device is lost"):
            fut.wait(PATIENCE)


@on_every_loop
async def test_waits_for_a_device_share_one_thread(accelerator, producer):
    def blockers():
        return [t for t in threading.enumerate() if t.name == "torchfut_aio blocker"]

    with producer:
        accelerator.sleep(PATIENCE)
    torch.zeros(1, device=FIRST)
    for _ in range(30):
        with anyio.move_on_after(0.001):
            await synchronize(FIRST)
    readers = [Reader(synchronize(FIRST)) for _ in range(30)]
    async with anyio.create_task_group() as tg:
        for reader in readers:
            reader.outcome = "pending"
            tg.start_soon(reader)
        await anyio.sleep(0.01)
        assert len(blockers()) == 1
        accelerator.wake()
    assert [reader.outcome for reader in readers] == [None] * 30
    with anyio.fail_after(PATIENCE):
        while blockers():  # noqa: ASYNC110
            await anyio.sleep(0.01)


def test_blocking_wait_for_an_adopted_event_on_its_loop_returns(accelerator, nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()

    async def main():
        stream = torch.Stream(FIRST)
        with stream:
            accelerator.sleep(10 * PATIENCE)
        fut = as_future(stream)

        def wake():
            until(lambda: "waiters=1" in repr(fut))
            accelerator.wake()

        with running(wake), pytest.warns(BlockingWaitWarning):
            return fut.wait(PATIENCE)

    assert asyncio.run(main()) is None

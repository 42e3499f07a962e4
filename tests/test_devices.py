"""Values on an accelerator: each promise about streams in torch's documentation.

On the simulated device of this folder, where a kernel runs until the test wakes it. So
"while kernels run" is a fact here, and a copy made too early has the old value.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import shutil

import anyio
import pytest
import torch

from torchfut_aio import CallbackError, Future, InvalidStateError, collect_all, gather, wait_all

from .threads import PATIENCE, running, until

OLD, NEW = [0.0, 0.0], [7.0, 7.0]

# The same holds for a future that was told its devices and one that was not.
told_or_not = pytest.mark.parametrize("devices", [["sim:0"], None], ids=["declared", "undeclared"])
either_way = pytest.mark.parametrize("method", ["add_done_callback", "then"])


@pytest.fixture(scope="session")
def simulated_device():
    """Builds the device, unless that has been done before, and registers it."""
    if not shutil.which(os.environ.get("CXX", "c++")) and "CI" not in os.environ:
        pytest.skip("there is no C++ compiler to build the simulated device with")
    return importlib.import_module("tests.simulated_device")


@pytest.fixture
def sim(simulated_device):
    """The simulated device, at rest."""
    simulated_device.reset_counters()
    yield simulated_device
    simulated_device.reset()


@pytest.fixture
def producer(sim):
    return torch.Stream("sim:0")


@pytest.fixture
def consumer(sim):
    return torch.Stream("sim:0")


def being_filled(sim, device="sim:0", value=7):
    """A tensor of zeros, and a kernel on the current stream that fills it once woken."""
    tensor = torch.zeros(2, device=device)
    torch.accelerator.current_stream(device).synchronize()
    sim.fill_after(tensor, value, PATIENCE)
    return tensor


def completed_on(producer, sim, devices):
    fut = Future(devices=devices)
    with producer:
        fut.set_result(being_filled(sim))
    return fut


def read_on_current_stream(tensor):
    """Enqueues a copy to the host, which has the value that is there when its turn comes."""
    return tensor.to("cpu", non_blocking=True)


def current_stream(device="sim:0"):
    return torch.accelerator.current_stream(device)


# ------------------------------------------------- what the other tests take for granted


def test_who_reads_before_the_kernels_are_done_gets_the_old_value(sim, producer, consumer):
    with producer:
        tensor = being_filled(sim)
    with consumer:
        assert tensor.tolist() == OLD
        consumer.wait_event(producer.record_event())
        copy = read_on_current_stream(tensor)
    assert not producer.query()
    assert not consumer.query()
    sim.wake()
    consumer.synchronize()
    assert copy.tolist() == NEW


def test_torchs_own_future_does_on_this_device_what_it_does_on_a_gpu(sim, producer, consumer):
    fut = torch.futures.Future(devices=["sim:0"])
    streams = []
    fut.add_done_callback(lambda f: streams.append(current_stream()))
    with producer:
        fut.set_result(being_filled(sim))
    with consumer:
        copy = read_on_current_stream(fut.wait())
    assert not producer.query()
    sim.wake()
    consumer.synchronize()
    assert copy.tolist() == NEW
    assert streams
    assert streams[0] not in (producer, consumer, current_stream())


def test_a_failed_kernel_is_an_error_for_whoever_synchronises_with_it(sim, producer, consumer):
    early, late = torch.Event("sim"), torch.Event("sim")
    early.record(producer)
    with producer:
        sim.fail("the kernel failed")
    late.record(producer)
    for look in (late.synchronize, late.query, producer.synchronize, producer.query):
        with pytest.raises(RuntimeError, match="the kernel failed"):
            look()
    assert early.query()
    assert consumer.query()
    sim.reset()
    assert late.query()


# -------------------------------------------------------------- set_result, done, value


@told_or_not
def test_a_future_may_be_completed_while_the_kernels_run_and_is_done_then(sim, producer, devices):
    fut = completed_on(producer, sim, devices)
    assert not producer.query()
    assert fut.done()
    assert torch._C.Future.done(fut)
    assert not producer.query()


@told_or_not
def test_value_returns_the_very_tensor_and_synchronises_nothing(sim, producer, consumer, devices):
    fut = completed_on(producer, sim, devices)
    with consumer:
        assert fut.value() is fut.value()
        assert fut.value().tolist() == OLD
    assert not producer.query()


@told_or_not
def test_no_method_of_a_future_blocks_until_the_device_is_done(sim, producer, consumer, devices):
    fut, seen = Future(devices=devices), []
    child = fut.then(lambda f: f.wait().clone())
    with producer:
        tensor = being_filled(sim)
        sim.reset_counters()
        fut.set_result(tensor)
    with consumer:
        fut.add_done_callback(lambda f: seen.append(f.wait().clone()))
        seen += [fut.wait(), fut.value(), child.wait(), child.value(), repr(fut)]
    assert sim.counters()["synchronizations"] == 0
    assert not producer.query()


# --------------------------------------------------------------------------------- wait


@told_or_not
def test_wait_returns_while_the_kernels_run_and_orders_the_current_stream_after_them(
    sim, producer, consumer, devices
):
    fut = completed_on(producer, sim, devices)
    with consumer:
        copy = read_on_current_stream(fut.wait())
    assert not producer.query()
    assert not consumer.query()
    sim.wake()
    consumer.synchronize()
    assert copy.tolist() == NEW


@told_or_not
def test_wait_orders_no_stream_but_the_current_one(sim, producer, consumer, devices):
    fut = completed_on(producer, sim, devices)
    with consumer:
        fut.wait()
    assert fut.value().tolist() == OLD
    assert not producer.query()


@told_or_not
def test_each_waiting_thread_has_its_own_streams_ordered(sim, producer, devices):
    fut, copies = Future(devices=devices), []

    def wait():
        with torch.Stream("sim:0") as stream:
            copy = read_on_current_stream(fut.wait(PATIENCE))
            assert not producer.query()
            copies.append((stream, copy))

    with running(wait, wait):
        until(lambda: "waiters=2" in repr(fut))
        with producer:
            fut.set_result(being_filled(sim))
    sim.wake()
    for stream, copy in copies:
        stream.synchronize()
        assert copy.tolist() == NEW
    assert len(copies) == 2


@told_or_not
def test_what_is_enqueued_after_the_completion_is_not_waited_for(sim, producer, consumer, devices):
    fut = Future(devices=devices)
    with producer:
        fut.set_result(torch.full((2,), 7.0, device="sim:0"))
        sim.sleep(PATIENCE)
    with consumer:
        assert fut.wait().tolist() == NEW
    assert not producer.query()


@told_or_not
def test_the_streams_of_the_thread_that_completes_are_the_ones_that_count(
    sim, producer, consumer, devices
):
    fut = Future(devices=devices)

    def complete():
        with producer:
            fut.set_result(being_filled(sim))

    with running(complete):
        pass
    with consumer:
        copy = read_on_current_stream(fut.wait())
        sim.wake()
        consumer.synchronize()
    assert copy.tolist() == NEW


@told_or_not
def test_a_value_without_device_tensors_is_handed_out_as_it_is(sim, devices):
    for value in (None, 5, "text", torch.ones(2), {"a": [torch.ones(2)]}, []):
        fut = Future(devices=devices)
        fut.set_result(value)
        assert fut.wait() is value
        assert fut.then(lambda f: f.value()).wait() is value


@told_or_not
def test_an_error_is_raised_as_itself_and_synchronises_nothing(sim, devices):
    fut, error, seen = Future(devices=devices), ValueError("foo"), []
    fut.add_done_callback(lambda f: seen.append(f.exception()))
    fut.set_exception(error)
    for read in (fut.wait, fut.value):
        with pytest.raises(ValueError, match="foo") as caught:
            read()
        assert caught.value is error
    assert seen == [error]
    assert fut.exception() is error


# ------------------------------------------------------------------- tensors in values


class Slotted:
    __slots__ = ("tensor",)

    def __init__(self, tensor):
        self.tensor = tensor


@dataclasses.dataclass
class Batch:
    name: str
    tensor: torch.Tensor


@told_or_not
@pytest.mark.parametrize(
    ("packed", "unpacked"),
    [
        (lambda t: [t, 5], lambda v: v[0]),
        (lambda t: (None, [t]), lambda v: v[1][0]),
        (lambda t: {"a": {"b": t}}, lambda v: v["a"]["b"]),
        (lambda t: [{"a": (t,)}, "text"], lambda v: v[0]["a"][0]),
        (lambda t: Batch("first", t), lambda v: v.tensor),
        (Slotted, lambda v: v.tensor),
        (lambda t: t[1:], lambda v: torch.cat([v, v])),
        (torch.nn.Parameter, lambda v: v.detach()),
    ],
    ids=["list", "tuple", "dict", "nested", "dataclass", "slots", "view", "parameter"],
)
def test_tensors_are_found_wherever_they_are_in_the_value(
    sim, producer, consumer, devices, packed, unpacked
):
    fut = Future(devices=devices)
    with producer:
        value = packed(being_filled(sim))
        fut.set_result(value)
    with consumer:
        assert fut.wait() is value
        assert not producer.query()
        late = torch.Event("sim")
        late.record()
        assert not late.query()  # the stream waits, whatever the value looks like
        sim.wake()
        assert unpacked(value).tolist() == NEW


@pytest.mark.parametrize("devices", [["sim:0", "sim:1"], None], ids=["declared", "undeclared"])
def test_tensors_on_several_devices_are_all_synchronised(sim, devices):
    fut, seen = Future(devices=devices), []

    def callback(f):
        streams = [current_stream(d) for d in (0, 1)]
        copies = [read_on_current_stream(t) for t in f.value()["both"]]
        seen.append((streams, copies))

    fut.add_done_callback(callback)
    producers = [torch.Stream(f"sim:{n}") for n in (0, 1)]
    with producers[0], producers[1]:
        fut.set_result({"both": [being_filled(sim, "sim:0"), being_filled(sim, "sim:1")]})
    consumers = [torch.Stream(f"sim:{n}") for n in (0, 1)]
    with consumers[0], consumers[1]:
        copies = [read_on_current_stream(t) for t in fut.wait()["both"]]
    seen.append((consumers, copies))
    assert not producers[0].query()
    assert not producers[1].query()
    sim.wake()
    assert len(seen) == 2
    for streams, copies in seen:
        for stream, before in zip(streams, producers):
            assert stream != before
            stream.synchronize()
        assert [copy.tolist() for copy in copies] == [NEW, NEW]


# ---------------------------------------------------------------------------- callbacks


@told_or_not
@either_way
@pytest.mark.parametrize("added", ["before", "after"])
def test_a_callback_runs_on_a_dedicated_stream_that_is_ordered_after_the_kernels(
    sim, producer, devices, method, added
):
    seen, fut, default = [], Future(devices=devices), current_stream()

    def callback(f):
        assert not producer.query()  # it runs before the kernels are done
        seen.append((current_stream(), read_on_current_stream(f.value())))

    with producer:
        tensor = being_filled(sim)
        if added == "before":
            getattr(fut, method)(callback)
        fut.set_result(tensor)
        if added == "after":
            getattr(fut, method)(callback)
        assert current_stream() == producer
    sim.wake()
    [(stream, copy)] = seen
    assert stream not in (producer, default)
    stream.synchronize()
    assert copy.tolist() == NEW


@told_or_not
def test_each_callback_has_a_stream_of_its_own(sim, producer, devices):
    fut, streams = Future(devices=devices), []
    for _ in range(3):
        fut.add_done_callback(lambda f: streams.append(current_stream()))
    with producer:
        fut.set_result(being_filled(sim))
    assert len({stream.stream_id for stream in streams}) == 3


@told_or_not
def test_a_callback_may_wait_for_its_future_and_for_others(sim, producer, devices):
    other = Future(devices=devices)
    with torch.Stream("sim:0"):
        other.set_result(being_filled(sim, value=8))
    fut = Future(devices=devices)
    both = fut.then(lambda f: [read_on_current_stream(t) for t in (f.wait(), other.wait())])
    with producer:
        fut.set_result(being_filled(sim))
    assert both.done()
    sim.wake()
    torch.accelerator.synchronize()
    assert [copy.tolist() for copy in both.value()] == [NEW, [8.0, 8.0]]


@told_or_not
def test_a_callback_that_raises_leaves_the_streams_and_the_other_callbacks_alone(
    sim, producer, devices, caplog
):
    def raises(f):
        raise ValueError("the culprit")

    fut, seen = Future(devices=devices), []
    fut.add_done_callback(raises)
    child = fut.then(raises)
    fut.add_done_callback(lambda f: seen.append(read_on_current_stream(f.value())))
    with producer, caplog.at_level(logging.ERROR, logger="torchfut_aio"):
        fut.set_result(being_filled(sim))
        assert current_stream() == producer
    assert "the culprit" in caplog.text
    with pytest.raises(CallbackError, match="the culprit") as caught:
        child.wait()
    assert isinstance(caught.value, ValueError)
    sim.wake()
    torch.accelerator.synchronize()
    assert [copy.tolist() for copy in seen] == [NEW]


@told_or_not
@either_way
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_in_a_callback_reaches_the_setter_after_the_others_have_run(
    sim, producer, consumer, devices, method, interrupt
):
    def raises(f):
        raise interrupt

    fut, seen = Future(devices=devices), []
    child = getattr(fut, method)(raises)
    fut.add_done_callback(seen.append)
    with producer:
        tensor = being_filled(sim)
        if child is None:
            with pytest.raises(interrupt):
                fut.set_result(tensor)
        else:
            fut.set_result(tensor)
            assert type(child.exception()) is interrupt
        assert current_stream() == producer
    assert seen == [fut]
    with consumer:
        copy = read_on_current_stream(fut.wait())
        sim.wake()
        consumer.synchronize()
    assert copy.tolist() == NEW


@told_or_not
def test_a_callback_of_a_torch_consumer_may_read_and_wait_for_the_future(sim, producer, devices):
    fut, seen = Future(devices=devices), []
    combined = torch.futures.collect_all([fut])
    combined.add_done_callback(lambda f: seen.append((fut.done(), fut.wait(timeout=0))))
    with producer:
        tensor = being_filled(sim)
        fut.set_result(tensor)
    assert seen == [(True, tensor)]


# ------------------------------------------------------------------------------- chains


@told_or_not
def test_what_a_then_callback_returns_may_still_be_being_filled(sim, producer, consumer, devices):
    fut = Future(devices=devices)
    child = fut.then(lambda f: being_filled(sim, value=8))
    with producer:
        fut.set_result(torch.ones(2, device="sim:0"))
    with consumer:
        assert child.value().tolist() == OLD
        copy = read_on_current_stream(child.wait())
        assert not consumer.query()
        sim.wake()
        consumer.synchronize()
    assert copy.tolist() == [8.0, 8.0]


def test_children_inherit_the_devices(sim):
    class Ours(Future):
        pass

    fut = Ours(devices=["sim:0"])
    grandchild = fut.then(lambda f: None).then(lambda f: torch.ones(2, device="sim:0"))
    stranger = fut.then(lambda f: torch.ones(2, device="sim:1"))
    assert type(grandchild) is Ours
    assert "devices=[sim:0]" in repr(grandchild)
    fut.set_result(None)
    assert grandchild.wait().tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"sim:1.*sim:0"):
        stranger.wait()


def test_a_callback_may_use_devices_that_its_parent_did_not(sim):
    fut, streams = Future(devices=["sim:0", "sim:1"]), []

    def callback(f):
        streams.append(current_stream(1))
        return being_filled(sim, "sim:1")

    child = fut.then(callback)
    fut.set_result(torch.ones(2, device="sim:0"))
    assert streams[0] != current_stream(1)
    with torch.Stream("sim:1") as consumer:
        copy = read_on_current_stream(child.wait())
        assert not consumer.query()
        sim.wake()
        consumer.synchronize()
    assert copy.tolist() == NEW


@told_or_not
def test_a_chain_of_a_thousand_runs_while_the_kernels_run_and_in_their_order(
    sim, producer, consumer, devices
):
    fut = last = Future(devices=devices)
    links = []
    for n in range(1000):
        last = last.then(lambda f, n=n: (links.append(n), f.value().clone())[1])
    with producer:
        fut.set_result(being_filled(sim))
    assert links == list(range(1000))
    assert not producer.query()
    with consumer:
        copy = read_on_current_stream(last.wait())
        sim.wake()
        consumer.synchronize()
    assert copy.tolist() == NEW


@pytest.mark.parametrize("devices", [["sim:0", "sim:1"], None], ids=["declared", "undeclared"])
@pytest.mark.parametrize("combine", [gather, wait_all, collect_all])
def test_combined_futures_order_the_current_streams_as_their_parts_do(
    sim, consumer, devices, combine
):
    futures = [Future(devices=devices) for _ in range(3)]
    waiting = None if combine is wait_all else combine(futures)
    for fut, device in zip(futures, ["sim:0", "sim:1", "sim:0"]):
        with torch.Stream(device):
            fut.set_result(being_filled(sim, device))
    with consumer, torch.Stream("sim:1") as other:
        values = wait_all(futures) if waiting is None else waiting.wait()
        if combine is collect_all:
            values = [fut.wait() for fut in values]
        copies = [read_on_current_stream(value) for value in values]
        assert not consumer.query()
        assert not other.query()
        sim.wake()
        consumer.synchronize()
        other.synchronize()
    assert [copy.tolist() for copy in copies] == [NEW] * 3


# -------------------------------------------------------------------- declaring devices


@pytest.mark.parametrize(
    "devices",
    [
        ["sim:0"],
        [0],
        ["sim:0", 0, "sim:0"],
        ("sim:1", "sim:0"),
        iter(["sim:0"]),
        {"sim:0": None},
    ],
    ids=["string", "index", "duplicates", "unsorted", "iterator", "dict"],
)
def test_devices_are_given_in_any_form_and_order(sim, producer, consumer, devices):
    fut = completed_on(producer, sim, devices)
    with consumer:
        copy = read_on_current_stream(fut.wait())
        sim.wake()
        consumer.synchronize()
    assert copy.tolist() == NEW


def test_devices_may_be_torch_devices(sim):
    fut = Future(devices=[torch.device("sim", 1), torch.device("sim:0")])
    assert "devices=[sim:1, sim:0]" in repr(fut)
    fut.set_result(torch.ones(2, device="sim:1"))
    assert fut.wait().tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (["sim"], "Expected devices to have indices"),
        (["sim:0", "cpu:0"], "same type"),
        (["no-such-device:0"], "no-such-device"),
    ],
)
def test_devices_that_make_no_sense_are_refused_when_the_future_is_made(sim, devices, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        Future(devices=devices)


@pytest.mark.parametrize("value", [lambda t: t, lambda t: {"a": [t]}], ids=["tensor", "nested"])
def test_a_value_on_an_undeclared_device_fails_the_future_and_nobody_is_left_waiting(sim, value):
    fut, seen, errors = Future(devices=["sim:0"]), [], []

    def wait():
        with pytest.raises(ValueError, match=r"sim:1.*sim:0") as caught:
            fut.wait(PATIENCE)
        errors.append(caught.value)

    fut.add_done_callback(lambda f: seen.append(f.exception()))
    child = fut.then(lambda f: f.value())
    with running(wait):
        until(lambda: "waiters=1" in repr(fut))
        fut.set_result(value(torch.ones(2, device="sim:1")))
    assert fut.done()
    assert torch._C.Future.done(fut)
    error = fut.exception()
    assert errors == seen == [error]
    for read in (fut.wait, fut.value):
        with pytest.raises(ValueError, match=r"sim:1.*sim:0") as caught:
            read()
        assert caught.value is error
    assert child.exception().__cause__ is error
    with pytest.raises(InvalidStateError):
        fut.set_result(None)


def test_values_that_only_some_declared_devices_for_are_gathered(sim, producer, consumer):
    declared, other, host = Future(devices=["sim:0"]), Future(), Future()
    combined = gather([declared, other, host])
    with producer:
        declared.set_result(being_filled(sim))
    with torch.Stream("sim:1"):
        other.set_result(being_filled(sim, "sim:1"))
    host.set_result(lambda: "what no pickle can carry")
    with consumer:
        first, second, third = combined.wait()
        copy = read_on_current_stream(first)
    with torch.Stream("sim:1") as stream:
        combined.wait()
        other_copy = read_on_current_stream(second)
    sim.wake()
    consumer.synchronize()
    stream.synchronize()
    assert (copy.tolist(), other_copy.tolist()) == (NEW, NEW)
    assert third() == "what no pickle can carry"


@told_or_not
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_await_orders_the_current_stream_after_the_kernels(
    sim, producer, consumer, devices, backend
):
    async def main():
        fut = Future(devices=devices)
        copies = []

        async def read():
            with consumer:
                copies.append(read_on_current_stream(await fut))

        async with anyio.create_task_group() as tg:
            tg.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            with producer:
                fut.set_result(being_filled(sim))
        assert not producer.query()
        return copies

    [copy] = anyio.run(main, backend=backend)
    sim.wake()
    consumer.synchronize()
    assert copy.tolist() == NEW

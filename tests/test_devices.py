"""Values on an accelerator: each promise about streams in torch's documentation."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from torchfut_aio import CallbackError, Future, InvalidStateError, collect_all, gather, wait_all

from .accelerator import (
    DEVICE,
    FIRST,
    NEW,
    OLD,
    SECOND,
    being_filled,
    completed_on,
    current_stream,
    declared_or_not,
    read_on_current_stream,
    several_devices,
)
from .threads import PATIENCE, running, until

pytestmark = pytest.mark.device

either_way = pytest.mark.parametrize("method", ["add_done_callback", "then"])


# ------------------------------------------------------------- assumptions of the other tests


def test_early_read_on_the_simulated_device_sees_the_old_value(accelerator, producer, consumer):
    with producer:
        tensor = being_filled(accelerator)
    with consumer:
        assert tensor.tolist() == OLD
        consumer.wait_event(producer.record_event())
        copy = read_on_current_stream(tensor)
    assert not producer.query()
    assert not consumer.query()
    accelerator.wake()
    consumer.synchronize()
    assert copy.tolist() == NEW


def test_torch_future_orders_streams_of_the_simulated_device(accelerator, producer, consumer):
    fut = torch.futures.Future(devices=[FIRST])
    streams = []
    fut.add_done_callback(lambda f: streams.append(current_stream()))
    with producer:
        fut.set_result(being_filled(accelerator))
    with consumer:
        copy = read_on_current_stream(fut.wait())
    assert not producer.query()
    accelerator.wake()
    consumer.synchronize()
    assert copy.tolist() == NEW
    assert streams
    assert streams[0] not in (producer, consumer, current_stream())


def test_failed_kernel_raises_in_every_synchronisation(accelerator, producer, consumer):
    early, late = torch.Event(DEVICE), torch.Event(DEVICE)
    early.record(producer)
    with producer:
        accelerator.fail("the kernel failed")
    late.record(producer)
    for use in (late.synchronize, late.query, producer.synchronize, producer.query):
        with pytest.raises(RuntimeError, match="the kernel failed"):
            use()
    assert early.query()
    assert consumer.query()
    accelerator.reset()
    assert late.query()


# -------------------------------------------------------------- set_result, done, value


@declared_or_not
def test_future_is_done_while_its_kernels_still_run(accelerator, producer, devices):
    fut = completed_on(producer, accelerator, devices)
    assert not producer.query()
    assert fut.done()
    assert torch._C.Future.done(fut)
    assert not producer.query()


@declared_or_not
def test_value_returns_the_same_tensor_without_synchronising(
    accelerator, producer, consumer, devices
):
    fut = completed_on(producer, accelerator, devices)
    with consumer:
        assert fut.value() is fut.value()
        assert fut.value().tolist() == OLD
    assert not producer.query()


@declared_or_not
def test_future_methods_never_block_on_the_device(accelerator, producer, consumer, devices):
    fut, seen = Future(devices=devices), []
    child = fut.then(lambda f: f.wait().clone())
    with producer:
        tensor = being_filled(accelerator)
        accelerator.reset_counters()
        fut.set_result(tensor)
    with consumer:
        fut.add_done_callback(lambda f: seen.append(f.wait().clone()))
        seen += [fut.wait(), fut.value(), child.wait(), child.value(), repr(fut)]
    assert accelerator.counters()["synchronizations"] == 0
    assert not producer.query()


# --------------------------------------------------------------------------------- wait


@declared_or_not
def test_wait_orders_the_current_stream_without_blocking(accelerator, producer, consumer, devices):
    fut = completed_on(producer, accelerator, devices)
    with consumer:
        copy = read_on_current_stream(fut.wait())
    assert not producer.query()
    assert not consumer.query()
    accelerator.wake()
    consumer.synchronize()
    assert copy.tolist() == NEW


@declared_or_not
def test_wait_orders_only_the_current_stream(accelerator, producer, consumer, devices):
    fut = completed_on(producer, accelerator, devices)
    with consumer:
        fut.wait()
    assert fut.value().tolist() == OLD
    assert not producer.query()


@declared_or_not
def test_each_waiting_thread_has_its_own_streams_ordered(accelerator, producer, devices):
    fut, copies = Future(devices=devices), []

    def wait():
        with torch.Stream(FIRST) as stream:
            copy = read_on_current_stream(fut.wait(PATIENCE))
            assert not producer.query()
            copies.append((stream, copy))

    with running(wait, wait):
        until(lambda: "waiters=2" in repr(fut))
        with producer:
            fut.set_result(being_filled(accelerator))
    accelerator.wake()
    for stream, copy in copies:
        stream.synchronize()
        assert copy.tolist() == NEW
    assert len(copies) == 2


@declared_or_not
def test_wait_ignores_kernels_enqueued_after_the_completion(
    accelerator, producer, consumer, devices
):
    fut = Future(devices=devices)
    with producer:
        fut.set_result(torch.full((2,), 7.0, device=FIRST))
        accelerator.sleep(PATIENCE)
    with consumer:
        assert fut.wait().tolist() == NEW
    assert not producer.query()


@declared_or_not
def test_wait_orders_after_the_streams_of_the_completing_thread(
    accelerator, producer, consumer, devices
):
    fut = Future(devices=devices)

    def complete():
        with producer:
            fut.set_result(being_filled(accelerator))

    with running(complete):
        pass
    with consumer:
        copy = read_on_current_stream(fut.wait())
        accelerator.wake()
        consumer.synchronize()
    assert copy.tolist() == NEW


@declared_or_not
def test_value_without_device_tensors_is_returned_unchanged(accelerator, devices):
    for value in (None, 5, "text", torch.ones(2), {"a": [torch.ones(2)]}, []):
        fut = Future(devices=devices)
        fut.set_result(value)
        assert fut.wait() is value
        assert fut.then(lambda f: f.value()).wait() is value


@declared_or_not
def test_error_is_raised_unchanged_without_synchronising(accelerator, devices):
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


@declared_or_not
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
def test_tensors_are_found_at_any_depth_of_the_value(
    accelerator, producer, consumer, devices, packed, unpacked
):
    fut = Future(devices=devices)
    with producer:
        value = packed(being_filled(accelerator))
        fut.set_result(value)
    with consumer:
        assert fut.wait() is value
        assert not producer.query()
        late = torch.Event(DEVICE)
        late.record()
        assert not late.query()  # the stream waits, whatever the value contains
        accelerator.wake()
        assert unpacked(value).tolist() == NEW


@several_devices
@pytest.mark.parametrize("devices", [[FIRST, SECOND], None], ids=["declared", "undeclared"])
def test_tensors_on_several_devices_are_all_synchronised(accelerator, devices):
    fut, seen = Future(devices=devices), []

    def callback(f):
        streams = [current_stream(d) for d in (0, 1)]
        copies = [read_on_current_stream(t) for t in f.value()["both"]]
        seen.append((streams, copies))

    fut.add_done_callback(callback)
    producers = [torch.Stream(f"{DEVICE}:{n}") for n in (0, 1)]
    with producers[0], producers[1]:
        fut.set_result(
            {"both": [being_filled(accelerator, FIRST), being_filled(accelerator, SECOND)]}
        )
    consumers = [torch.Stream(f"{DEVICE}:{n}") for n in (0, 1)]
    with consumers[0], consumers[1]:
        copies = [read_on_current_stream(t) for t in fut.wait()["both"]]
    seen.append((consumers, copies))
    assert not producers[0].query()
    assert not producers[1].query()
    accelerator.wake()
    assert len(seen) == 2
    for streams, copies in seen:
        for stream, before in zip(streams, producers):
            assert stream != before
            stream.synchronize()
        assert [copy.tolist() for copy in copies] == [NEW, NEW]


# ---------------------------------------------------------------------------- callbacks


@declared_or_not
@either_way
@pytest.mark.parametrize("added", ["before", "after"])
def test_callback_stream_is_dedicated_and_ordered(accelerator, producer, devices, method, added):
    seen, fut, default = [], Future(devices=devices), current_stream()

    def callback(f):
        assert not producer.query()  # the callback runs before the kernels are done
        seen.append((current_stream(), read_on_current_stream(f.value())))

    with producer:
        tensor = being_filled(accelerator)
        if added == "before":
            getattr(fut, method)(callback)
        fut.set_result(tensor)
        if added == "after":
            getattr(fut, method)(callback)
        assert current_stream() == producer
    accelerator.wake()
    [(stream, copy)] = seen
    assert stream not in (producer, default)
    stream.synchronize()
    assert copy.tolist() == NEW


@declared_or_not
def test_callbacks_have_separate_streams(accelerator, producer, devices):
    fut, streams = Future(devices=devices), []
    for _ in range(3):
        fut.add_done_callback(lambda f: streams.append(current_stream()))
    with producer:
        fut.set_result(being_filled(accelerator))
    assert len({stream.stream_id for stream in streams}) == 3


@declared_or_not
def test_callback_can_wait_for_its_future_and_for_others(accelerator, producer, devices):
    other = Future(devices=devices)
    with torch.Stream(FIRST):
        other.set_result(being_filled(accelerator, value=8))
    fut = Future(devices=devices)
    both = fut.then(lambda f: [read_on_current_stream(t) for t in (f.wait(), other.wait())])
    with producer:
        fut.set_result(being_filled(accelerator))
    assert both.done()
    accelerator.wake()
    torch.accelerator.synchronize()
    assert [copy.tolist() for copy in both.value()] == [NEW, [8.0, 8.0]]


@declared_or_not
def test_raising_callback_affects_no_streams_or_other_callbacks(
    accelerator, producer, devices, caplog
):
    def raises(f):
        raise ValueError("the culprit")

    fut, seen = Future(devices=devices), []
    fut.add_done_callback(raises)
    child = fut.then(raises)
    fut.add_done_callback(lambda f: seen.append(read_on_current_stream(f.value())))
    with producer, caplog.at_level(logging.ERROR, logger="torchfut_aio"):
        fut.set_result(being_filled(accelerator))
        assert current_stream() == producer
    assert "the culprit" in caplog.text
    with pytest.raises(CallbackError, match="the culprit") as caught:
        child.wait()
    assert isinstance(caught.value, ValueError)
    accelerator.wake()
    torch.accelerator.synchronize()
    assert [copy.tolist() for copy in seen] == [NEW]


@declared_or_not
@either_way
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_in_a_stream_callback_reaches_the_setter_last(
    accelerator, producer, consumer, devices, method, interrupt
):
    def raises(f):
        raise interrupt

    fut, seen = Future(devices=devices), []
    child = getattr(fut, method)(raises)
    fut.add_done_callback(seen.append)
    with producer:
        tensor = being_filled(accelerator)
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
        accelerator.wake()
        consumer.synchronize()
    assert copy.tolist() == NEW


@declared_or_not
def test_torch_consumer_callback_can_read_the_device_future(accelerator, producer, devices):
    fut, seen = Future(devices=devices), []
    combined = torch.futures.collect_all([fut])
    combined.add_done_callback(lambda f: seen.append((fut.done(), fut.wait(timeout=0))))
    with producer:
        tensor = being_filled(accelerator)
        fut.set_result(tensor)
    assert seen == [(True, tensor)]


# ------------------------------------------------------------------------------- chains


@declared_or_not
def test_then_callback_can_return_a_tensor_not_yet_filled(accelerator, producer, consumer, devices):
    fut = Future(devices=devices)
    child = fut.then(lambda f: being_filled(accelerator, value=8))
    with producer:
        fut.set_result(torch.ones(2, device=FIRST))
    with consumer:
        assert child.value().tolist() == OLD
        copy = read_on_current_stream(child.wait())
        assert not consumer.query()
        accelerator.wake()
        consumer.synchronize()
    assert copy.tolist() == [8.0, 8.0]


@several_devices
def test_children_inherit_the_devices(accelerator):
    class Ours(Future):
        pass

    fut = Ours(devices=[FIRST])
    grandchild = fut.then(lambda f: None).then(lambda f: torch.ones(2, device=FIRST))
    other_child = fut.then(lambda f: torch.ones(2, device=SECOND))
    assert type(grandchild) is Ours
    assert f"devices=[{FIRST}]" in repr(grandchild)
    fut.set_result(None)
    assert grandchild.wait().tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=rf"{SECOND}.*{FIRST}"):
        other_child.wait()


@several_devices
def test_callback_can_use_other_devices_than_its_parent(accelerator):
    fut, streams = Future(devices=[FIRST, SECOND]), []

    def callback(f):
        streams.append(current_stream(1))
        return being_filled(accelerator, SECOND)

    child = fut.then(callback)
    fut.set_result(torch.ones(2, device=FIRST))
    assert streams[0] != current_stream(1)
    with torch.Stream(SECOND) as consumer:
        copy = read_on_current_stream(child.wait())
        assert not consumer.query()
        accelerator.wake()
        consumer.synchronize()
    assert copy.tolist() == NEW


@declared_or_not
def test_long_chain_runs_in_order_while_the_kernels_run(accelerator, producer, consumer, devices):
    fut = last = Future(devices=devices)
    links = []
    for n in range(1000):
        last = last.then(lambda f, n=n: (links.append(n), f.value().clone())[1])
    with producer:
        fut.set_result(being_filled(accelerator))
    assert links == list(range(1000))
    assert not producer.query()
    with consumer:
        copy = read_on_current_stream(last.wait())
        accelerator.wake()
        consumer.synchronize()
    assert copy.tolist() == NEW


@several_devices
@pytest.mark.parametrize("devices", [[FIRST, SECOND], None], ids=["declared", "undeclared"])
@pytest.mark.parametrize("combine", [gather, wait_all, collect_all])
def test_combined_futures_order_the_current_streams(accelerator, consumer, devices, combine):
    futures = [Future(devices=devices) for _ in range(3)]
    waiting = None if combine is wait_all else combine(futures)
    for fut, device in zip(futures, [FIRST, SECOND, FIRST]):
        with torch.Stream(device):
            fut.set_result(being_filled(accelerator, device))
    with consumer, torch.Stream(SECOND) as other:
        values = wait_all(futures) if waiting is None else waiting.wait()
        if combine is collect_all:
            values = [fut.wait() for fut in values]
        copies = [read_on_current_stream(value) for value in values]
        assert not consumer.query()
        assert not other.query()
        accelerator.wake()
        consumer.synchronize()
        other.synchronize()
    assert [copy.tolist() for copy in copies] == [NEW] * 3


# -------------------------------------------------------------------- declaring devices


@several_devices
@pytest.mark.parametrize(
    "devices",
    [
        [FIRST],
        [0],
        [FIRST, 0, FIRST],
        (SECOND, FIRST),
        iter([FIRST]),
        {FIRST: None},
    ],
    ids=["string", "index", "duplicates", "unsorted", "iterator", "dict"],
)
def test_devices_can_be_given_in_any_form_and_order(accelerator, producer, consumer, devices):
    fut = completed_on(producer, accelerator, devices)
    with consumer:
        copy = read_on_current_stream(fut.wait())
        accelerator.wake()
        consumer.synchronize()
    assert copy.tolist() == NEW


@several_devices
def test_devices_can_be_torch_device_objects(accelerator):
    fut = Future(devices=[torch.device(DEVICE, 1), torch.device(FIRST)])
    assert f"devices=[{SECOND}, {FIRST}]" in repr(fut)
    fut.set_result(torch.ones(2, device=SECOND))
    assert fut.wait().tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([DEVICE], "Expected devices to have indices"),
        ([FIRST, "cpu:0"], "same type"),
        (["no-such-device:0"], "no-such-device"),
    ],
)
def test_invalid_devices_are_refused_by_the_constructor(accelerator, devices, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        Future(devices=devices)


@several_devices
@pytest.mark.parametrize("value", [lambda t: t, lambda t: {"a": [t]}], ids=["tensor", "nested"])
def test_value_on_an_undeclared_device_fails_the_future(accelerator, value):
    fut, seen, errors = Future(devices=[FIRST]), [], []

    def wait():
        with pytest.raises(ValueError, match=rf"{SECOND}.*{FIRST}") as caught:
            fut.wait(PATIENCE)
        errors.append(caught.value)

    fut.add_done_callback(lambda f: seen.append(f.exception()))
    child = fut.then(lambda f: f.value())
    with running(wait):
        until(lambda: "waiters=1" in repr(fut))
        fut.set_result(value(torch.ones(2, device=SECOND)))
    assert fut.done()
    assert torch._C.Future.done(fut)
    error = fut.exception()
    assert errors == seen == [error]
    for read in (fut.wait, fut.value):
        with pytest.raises(ValueError, match=rf"{SECOND}.*{FIRST}") as caught:
            read()
        assert caught.value is error
    assert child.exception().__cause__ is error
    with pytest.raises(InvalidStateError):
        fut.set_result(None)


@several_devices
def test_gather_accepts_futures_with_and_without_devices(accelerator, producer, consumer):
    declared, other, host = Future(devices=[FIRST]), Future(), Future()
    combined = gather([declared, other, host])
    with producer:
        declared.set_result(being_filled(accelerator))
    with torch.Stream(SECOND):
        other.set_result(being_filled(accelerator, SECOND))
    host.set_result(lambda: "what no pickle can carry")
    with consumer:
        first, second, third = combined.wait()
        copy = read_on_current_stream(first)
    with torch.Stream(SECOND) as stream:
        combined.wait()
        other_copy = read_on_current_stream(second)
    accelerator.wake()
    consumer.synchronize()
    stream.synchronize()
    assert (copy.tolist(), other_copy.tolist()) == (NEW, NEW)
    assert third() == "what no pickle can carry"

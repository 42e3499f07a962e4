"""Readiness: streams that cannot be ordered, values that cannot be searched."""

from __future__ import annotations

import anyio
import pytest
import torch

from torchfut_aio import Future
from torchfut_aio._devices import Moment, _readiness, found_readiness, joint_readiness

from .accelerator import (
    FIRST,
    NEW,
    being_filled,
    current_stream,
    read_on_current_stream,
    simulated_only,
)
from .explorer import interrupts
from .loops import on_asyncio, on_every_loop
from .threads import PATIENCE
from .waiting import Reader, pending

pytestmark = pytest.mark.device


def readiness_on(stream, accelerator):
    with stream:
        tensor = being_filled(accelerator)
        readiness, error = found_readiness([tensor], Moment())
    assert error is None
    return readiness, tensor


# ------------------------------------------------------------------------- running callbacks


def test_a_callback_runs_on_a_dedicated_stream_after_the_kernels(accelerator, producer):
    readiness, tensor = readiness_on(producer, accelerator)
    seen = []
    readiness.run(lambda: seen.append((current_stream(), read_on_current_stream(tensor))))
    [(stream, copy)] = seen
    assert stream not in (producer, current_stream())
    assert not stream.query()
    accelerator.wake()
    stream.synchronize()
    assert copy.tolist() == NEW


@simulated_only
def test_callback_runs_on_the_current_stream_without_new_streams(accelerator, producer, consumer):
    readiness, tensor = readiness_on(producer, accelerator)
    accelerator.take_new_streams_away()
    seen = []
    with consumer:
        readiness.run(lambda: seen.append((current_stream(), read_on_current_stream(tensor))))
    [(stream, copy)] = seen
    assert stream == consumer
    assert not stream.query()
    accelerator.wake()
    stream.synchronize()
    assert copy.tolist() == NEW


@simulated_only
def test_callback_is_called_once_if_streams_cannot_be_ordered(accelerator, producer):
    readiness, _ = readiness_on(producer, accelerator)
    accelerator.refuse_events()
    seen = []
    readiness.run(lambda: seen.append(current_stream()))
    assert seen == [current_stream()]
    with pytest.raises(RuntimeError, match="the device is lost"):
        readiness.wait()


@simulated_only
@pytest.mark.parametrize("broken", ["take_new_streams_away", "refuse_events"])
def test_dependants_complete_on_a_device_that_cannot_order(accelerator, broken):
    fut, seen = Future(), []
    fut.add_done_callback(seen.append)
    child = fut.then(lambda f: "child")
    with torch.Stream(FIRST):
        tensor = being_filled(accelerator)
    if broken == "take_new_streams_away":
        accelerator.take_new_streams_away()
        fut.set_result(tensor)
    else:
        combined, _ = readiness_on(torch.Stream(FIRST), accelerator)
        accelerator.refuse_events()
        fut.set_result(tensor)  # raises the device's error while it records events
        combined.run(lambda: seen.append(fut))
        assert "the device is lost" in str(fut.exception())
    assert set(seen) == {fut}
    assert child.wait(PATIENCE) == "child"


@pytest.mark.parametrize("error", [ValueError("foo"), KeyboardInterrupt(), SystemExit()])
def test_error_of_a_callback_is_raised_unchanged(accelerator, producer, error, capfd):
    def callback():
        calls.append(None)
        raise error

    readiness, _ = readiness_on(producer, accelerator)
    calls = []
    with pytest.raises(type(error)) as caught:
        readiness.run(callback)
    assert caught.value is error
    assert len(calls) == 1
    assert capfd.readouterr().err == ""


def test_ctrl_c_before_a_callback_never_runs_it_twice(accelerator, producer):
    readiness, _ = readiness_on(producer, accelerator)
    interrupted = 0
    for interrupt in interrupts(_readiness):
        calls, swallowed = [], None
        try:
            with interrupt:
                readiness.run(lambda calls=calls: calls.append(None))
        except KeyboardInterrupt as error:  # in place of one that C++ has swallowed
            swallowed = error
        assert len(calls) == 1 or interrupt.raised
        assert len(calls) <= 1
        if interrupt.where is not None:
            interrupted += 1
            assert interrupt.raised or swallowed is not None
    assert interrupted > 5


# ----------------------------------------------------------------------- callbacks when ready


@on_asyncio
@simulated_only
async def test_unorderable_value_fails_only_its_own_as_asyncio(accelerator, producer):
    fut, other = Future(), Future()
    with producer:
        fut.set_result(being_filled(accelerator))
        other.set_result(torch.ones(1, device=FIRST))
    first, second = fut.as_asyncio(), fut.as_asyncio()
    await pending(2)
    accelerator.refuse_events()
    accelerator.wake()
    for target in (first, second):
        with pytest.raises(RuntimeError, match="the device is lost"):
            await target


@on_every_loop
async def test_joint_readiness_waits_for_all_parts(accelerator, producer, consumer):
    parts = [readiness_on(stream, accelerator)[0] for stream in (producer, consumer)]
    assert joint_readiness([None, parts[0], parts[0]]) is parts[0]
    joint = joint_readiness([*parts, None])

    class Ready:
        def __await__(self):
            yield from joint.ready()

    reader = Reader(Ready())
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await pending(1)
        assert not producer.query()
        accelerator.wake()
    assert producer.query()
    assert consumer.query()
    assert reader.outcome is None


# ------------------------------------------------------------------- values that raise


class WithClass:
    """Like werkzeug's LocalProxy outside of its context."""

    @property
    def __class__(self):
        raise RuntimeError("working outside of request context")


class WithAttributes:
    def __getattribute__(self, name):
        raise RuntimeError(name)


class WithDict:
    @property
    def __dict__(self):
        raise LookupError


class WithItems(dict):
    def values(self):
        raise OSError("the file is closed")


class Endless(list):
    def __iter__(self):
        raise RecursionError


class Meta(type):
    def __getattribute__(cls, name):
        raise RuntimeError(name)

    def __instancecheck__(cls, thing):
        raise RuntimeError


class WithMeta(metaclass=Meta):
    pass


class HostTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError("no function of torch")


class Slotted:
    __slots__ = ("missing",)

    def __getattr__(self, name):
        raise RuntimeError(name)


# Created in each test: pytest would inspect parameters, and fail.
hostile = pytest.mark.parametrize(
    "make",
    [
        lambda: WithClass(),
        lambda: WithAttributes(),
        lambda: WithDict(),
        lambda: WithItems(a=1),
        lambda: Endless([1]),
        lambda: WithMeta(),
        lambda: torch.ones(2).as_subclass(HostTensor),
        lambda: Slotted(),
    ],
    ids=["class", "attributes", "dict", "items", "endless", "metaclass", "torch function", "slots"],
)


@pytest.mark.parametrize("nested", [False, True], ids=["itself", "in a list"])
@hostile
def test_any_object_completes_a_future_and_its_children(accelerator, make, nested):
    torch.ones(1, device=FIRST)  # the accelerator is in use
    value = [make()] if nested else make()
    fut = Future()
    child, grandchild = fut.then(lambda f: value), Future()
    fut.add_done_callback(lambda f: grandchild.set_result(value))
    fut.set_result(5)
    assert child.wait(PATIENCE) is value
    assert grandchild.wait(PATIENCE) is value


@hostile
def test_unsearchable_object_does_not_hide_other_tensors(accelerator, producer, make):
    with producer:
        tensor = being_filled(accelerator)
        readiness, error = found_readiness([make(), tensor], Moment())
    assert error is None
    [found] = readiness.tensors
    assert found is tensor


def test_tensor_subclass_is_found_on_the_device(accelerator, producer):
    with producer:
        tensor = being_filled(accelerator)
        readiness, error = found_readiness(tensor.as_subclass(HostTensor), Moment())
    assert error is None
    assert readiness is not None

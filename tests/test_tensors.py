"""Which tensors in a value are found, the cost of the search, and what it keeps alive."""

from __future__ import annotations

import collections
import dataclasses
import gc
import weakref

import anyio
import pytest
import torch
from torch.utils import _pytree

from torchfut_aio import Future, ValueStream, gather, set_results, to_host
from torchfut_aio._devices import _readiness, _tensors

from .accelerator import DEVICE, FIRST, NEW, being_filled, current_stream
from .loops import on_every_loop
from .waiting import eventually

pytestmark = pytest.mark.device


class Plain:
    def __init__(self, tensor):
        self.tensor = tensor


@dataclasses.dataclass
class Data:
    tensor: torch.Tensor


class Registered:
    """A container whose tensor only torch's pytree finds."""

    def __init__(self, tensor):
        self.read = lambda: tensor


_pytree.register_pytree_node(
    Registered, lambda thing: ([thing.read()], None), lambda parts, _: Registered(*parts)
)


containers = [
    (lambda t: [t], lambda v: v[0]),
    (lambda t: (t,), lambda v: v[0]),
    (lambda t: {"a": t}, lambda v: v["a"]),
    (lambda t: collections.deque([t]), lambda v: v[0]),
    (lambda t: collections.OrderedDict(a=t), lambda v: v["a"]),
    (lambda t: torch.return_types.max((t, t)), lambda v: v[0]),
    (Data, lambda v: v.tensor),
    (Registered, lambda v: v.read()),
]
others = [
    (lambda t: {t}, lambda v: next(iter(v))),
    (Plain, lambda v: v.tensor),
    (lambda t: Plain(Data([{"a": t}])), lambda v: v.tensor.tensor[0]["a"]),
]


def is_ordered():
    """Return whether the current stream waits for a kernel."""
    late = torch.Event(DEVICE)
    late.record(current_stream())
    return not late.query()


@pytest.mark.parametrize(("pack", "unpack"), containers + others)
def test_tensors_in_searched_containers_order_streams(
    accelerator, producer, consumer, pack, unpack
):
    fut = Future()
    with producer:
        fut.set_result(pack(being_filled(accelerator)))
    with consumer:
        tensor = unpack(fut.wait())
        assert is_ordered()
        accelerator.wake()
        assert tensor.tolist() == NEW


@on_every_loop
@pytest.mark.parametrize(("pack", "unpack"), containers)
async def test_to_host_copies_containers_and_dataclasses(accelerator, pack, unpack):
    value = pack(torch.full((2,), 7.0, device=FIRST))
    copy = await to_host(value)
    assert type(copy) is type(value)
    assert unpack(copy).device.type == "cpu"
    assert unpack(copy).tolist() == NEW


@on_every_loop
@pytest.mark.parametrize("pack", [lambda tensor: {tensor}, Plain], ids=["set", "plain object"])
async def test_to_host_rejects_tensors_in_other_objects(accelerator, pack):
    with pytest.raises(TypeError, match=r"another object in .* holds a tensor of .*: pass its"):
        await to_host([pack(torch.zeros(1, device=FIRST))])


@on_every_loop
async def test_modules_are_not_searched_for_tensors(accelerator, producer):
    module = torch.nn.Module()
    with producer:
        module.weight = torch.nn.Parameter(being_filled(accelerator))
        value = Plain(module)
        fut = Future()
        fut.set_result(value)
    assert await fut is value
    assert await to_host(value) is value
    assert not producer.query()


def test_tensor_search_ends_after_a_thousand_parts(accelerator, producer):
    class Counted(list):
        seen = 0

        def __iter__(self):
            for part in super().__iter__():
                self.seen += 1
                yield part

    torch.ones(1, device=FIRST)  # the accelerator is in use
    many = Counted(range(100_000))
    deep = Counted([[n] for n in range(600)])
    for value, most in ((many, 1000), (Plain([many, deep]), 1000)):
        many.seen = deep.seen = 0
        Future().set_result(value)
        assert 0 < many.seen + deep.seen <= most


def test_value_too_large_to_search_orders_streams(accelerator, producer, consumer):
    fut = Future()
    with producer:
        fut.set_result([*range(5000), being_filled(accelerator)])
    with consumer:
        tensor = fut.wait()[-1]
        assert is_ordered()
        accelerator.wake()
        assert tensor.tolist() == NEW


# --------------------------------------------------------- many tensors, one moment


@pytest.mark.parametrize("devices", [[FIRST], None], ids=["declared", "undeclared"])
def test_rows_of_a_batch_share_one_event(accelerator, producer, devices, monkeypatch):
    recorded = []
    record = _readiness.record_event
    monkeypatch.setattr(
        _readiness, "record_event", lambda stream: recorded.append(stream) or record(stream)
    )
    futures, stream = [Future(devices=devices) for _ in range(5)], ValueStream()
    with producer:
        rows = [being_filled(accelerator) for _ in range(5)]
        set_results(futures, rows)
        assert recorded == [producer]
        stream.put_many(rows)
    assert recorded == [producer, producer]
    together = gather(futures)
    assert not producer.query()
    accelerator.wake()
    assert [row.tolist() for row in together.wait()] == [NEW] * 5


# -------------------------------------------------------------------------- references


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


without_collector = pytest.mark.usefixtures("no_collector")


@on_every_loop
@without_collector
@pytest.mark.parametrize("pack", [lambda t: t, lambda t: {"a": [t]}, lambda t: (t, Data(t))])
async def test_to_host_keeps_neither_value_nor_copy(accelerator, pack):
    tensor = torch.full((2,), 7.0, device=FIRST)
    value = pack(tensor)
    copies = await to_host(value)
    kept = [weakref.ref(tensor), *map(weakref.ref, _tensors.search(copies)[0])]
    del tensor, value, copies
    assert [ref() for ref in kept] == [None] * len(kept)


@on_every_loop
@without_collector
async def test_as_concurrent_does_not_keep_the_value(accelerator, producer):
    fut = Future()
    with producer:
        tensor = being_filled(accelerator)
        fut.set_result([tensor])
    copy = fut.as_concurrent()
    kept = weakref.ref(fut)
    accelerator.wake()
    assert (await anyio.to_thread.run_sync(copy.result))[0].tolist() == NEW
    del fut, copy
    await eventually(lambda: kept() is None)

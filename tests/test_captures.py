"""A graph that another thread captures, and what the package does meanwhile."""

from __future__ import annotations

import contextlib
import threading

import anyio
import pytest
import torch

from torchfut_aio import (
    Future,
    as_completed,
    collect_all,
    gather,
    set_results,
    to_host,
    wait_all,
    with_timeout,
)
from torchfut_aio._devices import _capture as _devices_capture

from .accelerator import DEVICE, FIRST, NEW, being_filled, completed_on
from .loops import on_every_loop
from .threads import PATIENCE, running
from .waiting import Reader, pending

pytestmark = pytest.mark.device


@pytest.fixture(params=["global", "thread_local"], autouse=True)
def _capture(accelerator, request, monkeypatch):
    """Another thread captures, on a stream of the ring of ``torch.Stream``, and is to end well."""
    accelerator.wake()  # the memory that kernels watch is there
    if DEVICE == "sim":
        accelerator.share_rings()
        exchange = accelerator.exchange_capture_mode
        monkeypatch.setattr(_devices_capture, "mode_exchange", lambda kind: exchange)
        capturing = _simulated(accelerator, torch.Stream(FIRST))
    else:
        capturing = _captured(request.param, torch.cuda.Stream(FIRST))
    with capturing:
        yield
        accelerator.wake()


@contextlib.contextmanager
def _simulated(accelerator, stream):
    accelerator.begin_capture(stream.stream_id)
    try:
        yield
    finally:
        valid = accelerator.end_capture()
    assert valid


@contextlib.contextmanager
def _captured(mode, stream):
    begun, end, graph = threading.Event(), threading.Event(), torch.cuda.CUDAGraph()
    counter = torch.zeros(1, device=FIRST)
    counter.add_(1)
    torch.cuda.synchronize()

    def work():
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
                counter.add_(1)
                begun.set()
                assert end.wait(PATIENCE)
        finally:
            begun.set()

    with running(work):
        assert begun.wait(PATIENCE)
        try:
            yield
        finally:
            end.set()
    graph.replay()
    assert counter.item() == 2


@on_every_loop
async def test_to_host_leaves_a_capture_alone(accelerator, producer):
    with producer:
        reader = Reader(to_host([being_filled(accelerator)]))
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await pending(1)
        accelerator.wake()
    assert reader.outcome[0].tolist() == NEW


@pytest.mark.parametrize("devices", [[FIRST], None], ids=["declared", "undeclared"])
def test_callbacks_leave_a_capture_alone(accelerator, producer, devices):
    ran = []
    for _ in range(40):
        fut = Future(devices=devices)
        fut.add_done_callback(ran.append)
        child = fut.then(lambda f: f.value())
        with producer:
            fut.set_result(being_filled(accelerator))
        child.wait()
    assert len(ran) == 40


@pytest.mark.parametrize(
    "combine",
    [
        gather,
        collect_all,
        wait_all,
        lambda futures: [fut.value() for fut in as_completed(futures)],
        lambda futures: [with_timeout(fut, 60).wait() for fut in futures],
        lambda futures: [fut.as_concurrent() for fut in futures],
    ],
    ids=["gather", "collect_all", "wait_all", "as_completed", "with_timeout", "as_concurrent"],
)
def test_combinations_leave_a_capture_alone(accelerator, producer, consumer, combine):
    for _ in range(20):
        futures = [completed_on(stream, accelerator, None) for stream in (producer, consumer)]
        combine(futures)
        late = [Future(), Future()]
        together = collect_all(late)
        with producer:
            set_results(late, [futures[0].value()] * 2)
        together.wait()

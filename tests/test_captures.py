"""The package works while another thread captures a graph, and does not invalidate the capture.

These tests need CUDA, or the stand-in for it: the simulated device captures no graphs.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading

import anyio
import pytest
import torch

from torchfut_aio import (
    Future,
    PollPolicy,
    as_completed,
    as_future,
    collect_all,
    gather,
    set_poll_policy,
    set_results,
    synchronize,
    to_host,
    wait_all,
    with_timeout,
)
from torchfut_aio._devices import _streams

from .accelerator import DEVICE, FIRST, NEW, being_filled, completed_on
from .loops import on_every_loop
from .threads import PATIENCE, running
from .waiting import Reader, pending, polled

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA captures graphs"),
]

beside_a_capture = pytest.mark.usefixtures("capture")


@pytest.fixture(params=["global", "thread_local"])
def capture(accelerator, request):
    """Another thread captures a graph; the capture must succeed."""
    with capturing(accelerator, request.param) as errors:
        yield
        accelerator.wake()
    assert not errors


@contextlib.contextmanager
def capturing(accelerator, mode):
    """Capture in another thread, on one of the streams of ``torch.Stream``; yield its errors."""
    accelerator.wake()  # allocates the memory that kernels watch
    begun, end, graph = threading.Event(), threading.Event(), torch.cuda.CUDAGraph()
    stream, errors = torch.cuda.Stream(FIRST), []
    counter = torch.zeros(1, device=FIRST)
    counter.add_(1)
    torch.cuda.synchronize()

    def work():
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
                counter.add_(1)
                begun.set()
                assert end.wait(PATIENCE)
        except RuntimeError as error:
            errors.append(error)
        finally:
            begun.set()

    with running(work):
        assert begun.wait(PATIENCE)
        try:
            yield errors
        finally:
            end.set()
    if not errors:
        graph.replay()
        assert counter.item() == 2


@pytest.fixture(params=[False, True], ids=["polled", "blocked for"])
def either_policy(request):
    before = set_poll_policy(PollPolicy(blocking=request.param))
    yield
    set_poll_policy(before)


@on_every_loop
@beside_a_capture
async def test_await_does_not_disturb_a_capture(accelerator, producer, either_policy):
    own = torch.Event(DEVICE)
    fut = completed_on(producer, accelerator, None)
    own.record(producer)
    readers = [Reader(fut), Reader(as_future(own)), Reader(synchronize(own))]
    async with anyio.create_task_group() as tg:
        for reader in readers:
            tg.start_soon(reader)
        await pending(2)
        accelerator.wake()
    assert readers[0].outcome is fut.value()


@on_every_loop
async def test_await_retries_queries_during_a_global_capture(
    accelerator, producer, either_policy, monkeypatch, nothing_blocks_a_loop
):
    nothing_blocks_a_loop.deactivate()  # threads are started and joined below
    monkeypatch.setattr(_streams, "mode_exchange", lambda kind: None)
    own = torch.Event(DEVICE)
    async with anyio.create_task_group() as tg:
        with capturing(accelerator, "global") as errors:
            fut = completed_on(producer, accelerator, None)
            own.record(producer)
            readers = [Reader(fut), Reader(as_future(own)), Reader(synchronize(own))]
            for reader in readers:
                reader.outcome = "pending"
                tg.start_soon(reader)
            await pending(2)
            accelerator.wake()
            await polled()
            assert [reader.outcome for reader in readers] == ["pending"] * 3
    assert "captur" in str(errors)  # without the driver's function, the capture cannot be spared
    assert [readers[1].outcome, readers[2].outcome] == [None, None]
    assert readers[0].outcome.tolist() == NEW


@on_every_loop
@beside_a_capture
async def test_to_host_does_not_disturb_a_capture(accelerator, producer):
    with producer:
        reader = Reader(to_host([being_filled(accelerator)]))
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await pending(1)
        accelerator.wake()
    assert reader.outcome[0].tolist() == NEW


@beside_a_capture
@pytest.mark.parametrize("devices", [[FIRST], None], ids=["declared", "undeclared"])
def test_callbacks_do_not_disturb_a_capture(accelerator, producer, devices):
    ran = []
    for _ in range(40):
        fut = Future(devices=devices)
        fut.add_done_callback(ran.append)
        child = fut.then(lambda f: f.value())
        with producer:
            fut.set_result(being_filled(accelerator))
        child.wait()
    assert len(ran) == 40


@beside_a_capture
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
def test_combined_futures_do_not_disturb_a_capture(accelerator, producer, consumer, combine):
    combined = []
    for _ in range(20):
        futures = [completed_on(stream, accelerator, None) for stream in (producer, consumer)]
        combined.append((combine(futures), futures))
        late = [Future(), Future()]
        together = collect_all(late)
        with producer:
            set_results(late, [futures[0].value()] * 2)
        assert together.wait() == late
    accelerator.wake()
    for one, futures in combined:
        assert {*map(id, values_of(one))} == {id(fut.value()) for fut in futures}


def values_of(combined):
    """Return the values that a combination returned."""
    parts = combined.wait() if isinstance(combined, Future) else combined
    if isinstance(parts[0], concurrent.futures.Future):
        return [part.result(PATIENCE) for part in parts]
    return [part.value() if isinstance(part, Future) else part for part in parts]

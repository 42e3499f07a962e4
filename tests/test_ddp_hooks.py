"""DDP hooks: the steps before the hook's call returns, and after; in one process."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import threading
import weakref

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch
import torch.distributed as dist

import torchfut_aio
from torchfut_aio import Future, as_completed, as_future, gather
from torchfut_aio._loops import ThreadWaiter
from torchfut_aio.distributed import _background_loop, _ddp, async_comm_hook, async_rpc, shutdown

from .accelerator import FIRST, NEW, being_filled, read_on_current_stream
from .threads import PATIENCE, needs_gil, no_thread_starts, running, until

either_way = pytest.mark.parametrize("overlap", [False, True])


@pytest.fixture(autouse=True)
def _background_loop_ends():
    yield
    shutdown()


class Bucket:
    """A bucket that DDP does not know."""

    def __init__(self, index=0, buffer=None):
        tensor = torch.ones(1) if buffer is None else buffer
        self.buffer = lambda: tensor
        self.index = lambda: index


mine = contextvars.ContextVar("mine", default="none")


def done(value=None):
    fut = Future()
    fut.set_result(value)
    return fut


def recording_hook(steps, overlap=False):
    """Return a hook that records its steps, and awaits its state between them."""

    @async_comm_hook(overlap=overlap)
    async def hook(state, bucket):
        steps.append(f"starts {bucket.index()}")
        await state
        steps.append(f"resumes {bucket.index()}")
        return bucket.buffer()

    return hook


# ------------------------------------------------------------------------- order


@either_way
def test_a_hook_has_started_when_its_call_returns(overlap):
    steps, release = [], Future()
    hook = recording_hook(steps, overlap)
    futures = []
    for index in range(3):
        futures.append(hook(release, Bucket(index)))
        assert steps[-1] == f"starts {index}"
    release.set_result(None)
    for fut in futures:
        assert fut.wait(PATIENCE).item() == 1


def test_hooks_resume_in_the_order_of_their_buckets():
    steps, releases = [], [Future() for _ in range(3)]
    hook = recording_hook(steps)
    futures = [hook(release, Bucket(index)) for index, release in enumerate(releases)]
    for release in reversed(releases):
        release.set_result(None)
    for fut in futures:
        fut.wait(PATIENCE)
    assert steps[3:] == ["resumes 0", "resumes 1", "resumes 2"]


def test_hook_that_never_suspends_keeps_later_hooks_in_order():
    steps, release = [], Future()

    @async_comm_hook
    async def hook(state, bucket):
        if bucket.index() != 1:
            await state
        steps.append(bucket.index())
        return bucket.buffer()

    futures = [hook(release, Bucket(0)), hook(release, Bucket(1)), hook(done(), Bucket(2))]
    assert steps == [1]
    release.set_result(None)
    for fut in futures:
        fut.wait(PATIENCE)
    assert steps == [1, 0, 2]


async def iterate():
    async for fut in as_completed([done()]):
        fut.value()


@pytest.mark.parametrize(
    "finished",
    [
        done,
        lambda: as_future(dist.all_reduce(torch.ones(1), async_op=True)),
        lambda: done().stream_ordered(),
        lambda: gather([done(), done()]),
        lambda: torchfut_aio.with_timeout(done(), 0),
        lambda: torchfut_aio.synchronize(),
        lambda: torchfut_aio.to_host([]),
        iterate,
    ],
    ids=["future", "work", "ordered", "gather", "timeout", "synchronize", "to_host", "completed"],
)
@pytest.mark.usefixtures("group_of_one")
def test_first_await_of_a_hook_suspends_even_if_done(finished):
    steps, release = [], Future()

    @async_comm_hook
    async def hook(state, bucket):
        await state()
        steps.append(bucket.index())
        return bucket.buffer()

    # It must not resume before the other; without the suspension, it would.
    futures = [hook(lambda: release, Bucket(0)), hook(finished, Bucket(1))]
    assert steps == []
    release.set_result(None)
    for fut in futures:
        fut.wait(PATIENCE)
    assert steps == [0, 1]


def test_later_awaits_of_done_futures_do_not_suspend():
    steps, release = [], Future()

    @async_comm_hook
    async def hook(state, bucket):
        await release
        asyncio.get_running_loop().call_soon(steps.append, "another turn")
        await done()
        steps.append("went on")
        return bucket.buffer()

    fut = hook(None, Bucket())
    release.set_result(None)
    fut.wait(PATIENCE)
    assert steps[0] == "went on"


@async_rpc
async def turns():
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("first", [Future(), done()], ids=["before it waits", "while it waits"])
def test_cancellation_reaches_a_hook_in_its_turn(first):
    steps, release, tasks = [], Future(), []

    @async_comm_hook
    async def hook(state, bucket):
        tasks.append(asyncio.current_task())
        try:
            await state
        except asyncio.CancelledError:
            steps.append("cancelled")
        steps.append(bucket.index())
        return bucket.buffer()

    @async_rpc
    async def cancel():
        tasks[1].cancel()

    futures = [hook(release, Bucket(0)), hook(first, Bucket(1))]
    turns().wait(PATIENCE)
    cancel().wait(PATIENCE)
    turns().wait(PATIENCE)
    assert steps == []
    release.set_result(None)
    for fut in futures:
        fut.wait(PATIENCE)
    assert steps == [0, "cancelled", 1]


# ------------------------------------------------------------------------ errors


class Odd(Exception):
    pass


def raising_hook(steps, at, overlap=False):
    """Return a hook that raises at the steps in ``at``; "first 0" is one before it suspends."""

    @async_comm_hook(overlap=overlap)
    async def hook(state, bucket):
        steps.append(f"first {bucket.index()}")
        if steps[-1] in at:
            raise Odd(steps[-1])
        if state is not None:
            await state
            steps.append(f"then {bucket.index()}")
            if steps[-1] in at:
                raise Odd(steps[-1])
        return bucket.buffer()

    return hook


def errors_of(futures):
    until(lambda: all(fut.done() for fut in futures))
    return [repr(fut.exception()) for fut in futures]


@either_way
def test_hook_that_raises_at_once_is_not_run_for_later_buckets(overlap):
    steps, release = [], Future()
    hook = raising_hook(steps, ["first 1"], overlap)
    futures = [hook(release, Bucket(index)) for index in range(4)]
    assert steps == ["first 0", "first 1"]
    release.set_result(None)
    assert errors_of(futures) == ["None"] + ["Odd('first 1')"] * 3
    assert hook(done(), Bucket(0)).wait(PATIENCE).item() == 1


def test_hook_that_raises_later_stops_hooks_of_later_buckets():
    steps, release = [], Future()
    hook = raising_hook(steps, ["then 1"])
    futures = [hook(release, Bucket(index)) for index in range(4)]
    release.set_result(None)
    assert errors_of(futures) == ["None"] + ["Odd('then 1')"] * 3
    # The hook has already raised here, but perhaps not on other ranks. So that must not count.
    late = hook(done(), Bucket(4))
    assert errors_of([late]) == ["Odd('then 1')"]
    assert steps == [*[f"first {index}" for index in range(4)], "then 0", "then 1", "first 4"]


@pytest.mark.usefixtures("group_of_one")
def test_hook_that_returns_a_future_raises_a_helpful_type_error():
    for start in (
        lambda tensor: dist.all_reduce(tensor, async_op=True),
        lambda tensor: dist.all_reduce(tensor, async_op=True).get_future(),
        done,
    ):

        @async_comm_hook
        async def hook(state, bucket, start=start):
            return start(bucket.buffer())

        with pytest.raises(TypeError, match=r"await as_future\(\) of it, and return the tensor"):
            hook(None, Bucket()).wait(PATIENCE)


def test_stopped_hook_is_closed_in_its_context():
    steps, release = [], Future()

    @async_comm_hook
    async def hook(state, bucket):
        try:
            mine.set(bucket.index())
            await release
            raise Odd
        finally:
            steps.append(mine.get())

    futures = [hook(None, Bucket(index)) for index in range(3)]
    release.set_result(None)
    assert errors_of(futures) == ["Odd()"] * 3
    assert steps == [0, 1, 2]


def test_overlapping_hooks_survive_the_error_of_another_hook():
    steps, release = [], Future()
    hook = raising_hook(steps, ["then 0"], overlap=True)
    futures = [hook(release, Bucket(index)) for index in range(2)]
    release.set_result(None)
    assert errors_of(futures) == ["Odd('then 0')", "None"]


@pytest.mark.parametrize("suspends", [True, False])
def test_backward_pass_does_not_raise_errors_of_another_pass(suspends):
    steps, release = [], Future()
    hook = raising_hook(steps, ["then 1"])
    first = [hook(release, Bucket(index)) for index in range(2)]
    second = [hook(release if suspends else None, Bucket(0)), hook(release, Bucket(2))]
    release.set_result(None)
    assert errors_of(first) == ["None", "Odd('then 1')"]
    assert errors_of(second) == ["None", "None"]


@pytest.mark.parametrize("at", ["first 1", "then 1", "then 0"])
def test_dropped_hook_failure_keeps_no_tensors(at):
    hook, release = raising_hook([], [at]), Future()
    tensors = [torch.ones(1) for _ in range(3)]
    refs = [weakref.ref(tensor) for tensor in tensors]
    gc.disable()
    try:
        futures = [hook(release, Bucket(index, tensors[index])) for index in range(3)]
        release.set_result(None)
        assert errors_of(futures)[-1] == f"Odd('{at}')"
        del tensors, futures
        hook(None, Bucket(0)).wait(PATIENCE)
        turns().wait(PATIENCE)
        assert [ref() for ref in refs] == [None] * 3
    finally:
        gc.enable()


async def waits_until_it_is_cancelled():
    await Future()


async def waits_for_what_fails():
    fut = asyncio.get_running_loop().create_future()
    fut.get_loop().call_soon(fut.set_exception, Odd("of asyncio"))
    try:
        await fut
    finally:
        del fut


@pytest.mark.parametrize("waits", [waits_until_it_is_cancelled, waits_for_what_fails])
def test_dropped_await_error_keeps_no_tensors(waits):
    @async_comm_hook
    async def hook(state, bucket):
        if state is not None:
            await state()
        return bucket.buffer()

    tensor = torch.ones(1)
    ref = weakref.ref(tensor)
    gc.disable()
    try:
        fut = hook(waits, Bucket(0, tensor))
        shutdown()
        assert fut.exception() is not None
        del tensor, fut
        hook(None, Bucket(0)).wait(PATIENCE)
        turns().wait(PATIENCE)
        assert ref() is None
    finally:
        gc.enable()


# --------------------------------------------------------------------- the waiting


@pytest.fixture
def main_thread_blocks(monkeypatch):
    """An event that is set when the main thread is about to block."""
    event, block = threading.Event(), ThreadWaiter.block

    def noted(waiter, timeout):
        if waiter.thread == threading.main_thread().ident:
            event.set()
        block(waiter, timeout)

    monkeypatch.setattr(ThreadWaiter, "block", noted)
    return event


def test_hook_call_waits_for_a_loop_busy_with_another_bucket(
    nothing_blocks_a_loop, main_thread_blocks
):
    nothing_blocks_a_loop.deactivate()
    steps, release, go_on = [], Future(), threading.Event()

    @async_comm_hook
    async def hook(state, bucket):
        steps.append(bucket.index())
        if bucket.index() == 0:
            await release
            busy.set()
            assert go_on.wait(PATIENCE)
        return bucket.buffer()

    def complete_when_the_call_waits():
        assert main_thread_blocks.wait(PATIENCE)
        go_on.set()

    busy = threading.Event()
    futures = [hook(None, Bucket(0))]
    release.set_result(None)
    assert busy.wait(PATIENCE)
    main_thread_blocks.clear()
    with running(complete_when_the_call_waits):
        futures.append(hook(None, Bucket(1)))
        assert steps == [0, 1]
    for fut in futures:
        fut.wait(PATIENCE)


def test_hook_can_await_a_future_its_caller_completes_later():
    release = Future()
    fut = recording_hook([])(release, Bucket())
    release.set_result(None)
    assert fut.wait(PATIENCE).item() == 1


def test_hook_call_returns_if_its_task_is_dropped(monkeypatch):
    monkeypatch.setattr(_background_loop, "start_soon", lambda promise, function: None)
    fut = recording_hook([])(done(), Bucket())
    assert "its event loop ended" in str(fut.exception())


def test_hook_calls_return_while_the_loop_shuts_down():
    futures, over = [], threading.Event()

    def train():
        for _ in range(300):
            futures.append(recording_hook([])(Future(), Bucket()))
        over.set()

    gc.disable()  # the collector fails the future of a lost task
    try:
        with running(train):
            until(lambda: shutdown(graceful=False) or over.is_set())
    finally:
        gc.enable()
    shutdown(graceful=False)
    assert len(futures) == 300
    assert all(fut.done() for fut in futures)


def test_hook_call_raises_if_no_thread_can_start():
    hook = recording_hook([])
    with no_thread_starts():
        with pytest.raises(RuntimeError, match="can't start new thread"):
            hook(done(), Bucket())
    assert hook(done(), Bucket()).wait(PATIENCE).item() == 1


def test_hook_call_raises_when_the_interpreter_exits(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "is_finalizing", lambda: True)
        with pytest.raises(RuntimeError, match="the interpreter exits"):
            recording_hook([])(done(), Bucket())


def test_ctrl_c_ends_the_wait_and_the_hook_continues(
    nothing_blocks_a_loop, main_thread_blocks, ctrl_c
):
    nothing_blocks_a_loop.deactivate()
    steps, interrupted = [], threading.Event()

    @async_comm_hook
    async def hook(state, bucket):
        assert main_thread_blocks.wait(PATIENCE)
        ctrl_c()
        assert interrupted.wait(PATIENCE)
        steps.append("resumes")
        return bucket.buffer()

    with pytest.raises(KeyboardInterrupt):
        hook(None, Bucket())
    interrupted.set()
    turns().wait(PATIENCE)
    assert steps == ["resumes"]


@pytest.mark.usefixtures("group_of_one")
def test_backward_on_the_background_loop_raises():
    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 2))
    ddp.register_comm_hook(done(), recording_hook([]))

    @async_rpc
    async def train():
        ddp(torch.ones(3, 4)).sum().backward()

    with pytest.raises(RuntimeError, match=r"anyio\.to_thread\.run_sync"):
        train().wait(PATIENCE)


@needs_gil("no thread can safely check whether another one is in backward()")
def test_hook_call_raises_if_backward_blocks_the_loop(monkeypatch, nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()
    monkeypatch.setattr(_ddp, "_CHECK", 0.01)
    raised = []

    def call():  # like PyTorch's thread for an accelerator
        with pytest.raises(RuntimeError, match=r"anyio\.to_thread\.run_sync") as caught:
            recording_hook([])(done(), Bucket())
        raised.append(caught.value)

    class Calls(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with running(call):
                return grad

    @async_rpc
    async def train():
        Calls.apply(torch.ones(1, requires_grad=True)).backward()

    train().wait(PATIENCE)
    assert len(raised) == 1


# ------------------------------------------------------------------------ the loop


def test_asyncio_works_before_a_hook_suspends():
    @async_comm_hook
    async def hook(state, bucket):
        task = asyncio.create_task(asyncio.sleep(0, "slept"))
        async with asyncio.Lock():
            with anyio.fail_after(PATIENCE):
                state.append(await task)
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep, 0)
            state.append(await asyncio.wait_for(asyncio.sleep(0, "in time"), PATIENCE))
        return bucket.buffer()

    state = []
    hook(state, Bucket()).wait(PATIENCE)
    assert state == ["slept", "in time"]


def test_a_hook_runs_in_a_copy_of_its_callers_context():
    @async_comm_hook
    async def hook(state, bucket):
        state.append(mine.get())
        mine.set("of the hook")
        await asyncio.sleep(0)
        state.append(mine.get())
        return bucket.buffer()

    mine.set("of the caller")
    state = []
    hook(state, Bucket()).wait(PATIENCE)
    assert state == ["of the caller", "of the hook"]
    assert mine.get() == "of the caller"


def test_hook_can_be_called_in_a_trio_task():
    @async_comm_hook
    async def hook(state, bucket):
        await anyio.lowlevel.checkpoint()
        return bucket.buffer()

    async def main():
        return await hook(None, Bucket())

    assert anyio.run(main, backend="trio").item() == 1


@async_comm_hook
async def enqueues_a_read_of_the_bucket(state, bucket):
    state.append(read_on_current_stream(bucket.buffer()))
    return bucket.buffer()


@pytest.mark.device
def test_hook_can_use_a_bucket_that_kernels_still_fill(accelerator, producer, consumer):
    read = []
    with producer:
        fut = enqueues_a_read_of_the_bucket(read, Bucket(buffer=being_filled(accelerator)))
    assert not producer.query()
    with consumer:  # like the optimizer
        torch._C.Future.wait(fut)
        read.append(read_on_current_stream(fut.value()))
    accelerator.wake()
    torch.accelerator.synchronize(FIRST)
    assert [tensor.tolist() for tensor in read] == [NEW, NEW]

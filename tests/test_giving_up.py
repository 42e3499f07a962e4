"""Cancellation as seen by the worker: cancel, try_set_result, has_waiters."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import functools
import gc
import pickle
import threading

import anyio
import pytest
import torch
from torch.distributed.rpc.internal import _internal_rpc_pickler

import torchfut_aio
from torchfut_aio import (
    Batcher,
    CallbackError,
    CancelledError,
    Future,
    InvalidStateError,
    RpcError,
    as_completed,
    as_future,
    collect_all,
    gather,
    start_soon,
    with_timeout,
)
from torchfut_aio._errors import rpc_error

from .documentation import ROOT, blocks
from .explorer import interrupts
from .loops import on_asyncio, on_every_loop
from .threads import PATIENCE, alongside, running

# ------------------------------------------------------------------------------ cancel


@pytest.mark.parametrize("kind", [asyncio.CancelledError, concurrent.futures.CancelledError])
def test_cancelled_error_is_of_asyncio_and_concurrent_futures(kind):
    fut = Future()
    assert not fut.cancelled()
    assert fut.cancel("the client has disconnected") is True
    assert fut.done()
    assert fut.cancelled()
    with pytest.raises(kind, match="the client has disconnected") as caught:
        fut.wait()
    assert isinstance(caught.value, CancelledError)
    assert caught.value is fut.exception()
    assert isinstance(caught.value, Exception)


@pytest.mark.parametrize("copied", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_copied_cancelled_error_keeps_type_args_and_notes(copied):
    fut = Future()
    fut.cancel("the client has disconnected")
    fut.exception().add_note("a note")
    error = copied(fut.exception())
    assert type(error) is type(fut.exception())
    assert isinstance(error, asyncio.CancelledError)
    assert error.args == ("the client has disconnected",)
    assert error.__notes__ == ["a note"]
    assert b"torchfut_aio._" not in pickle.dumps(error)
    assert type(copied(CancelledError("foo"))) is CancelledError


def test_cancel_without_a_message_gives_an_error_without_args():
    fut = Future()
    fut.cancel()
    assert fut.exception().args == ()


@pytest.mark.parametrize("dumps", [pickle.dumps, _internal_rpc_pickler.serialize])
def test_cancelled_error_class_can_be_pickled_by_rpc(dumps):
    fut = Future()
    fut.cancel("foo")
    kind = type(fut.exception())
    sent = dumps(kind)
    received = (
        pickle.loads(sent) if dumps is pickle.dumps else _internal_rpc_pickler.deserialize(*sent)
    )
    assert received is kind
    assert repr(fut.exception()) == "CancelledError('foo')"


def test_cancel_of_a_done_future_returns_false():
    kept, failed, cancelled = Future(), Future(), Future()
    kept.set_result(5)
    failed.set_exception(ValueError("foo"))
    cancelled.cancel("first")
    assert [fut.cancel("late") for fut in (kept, failed, cancelled)] == [False] * 3
    assert [fut.cancelled() for fut in (kept, failed, cancelled)] == [False, False, True]
    assert kept.value() == 5
    assert isinstance(failed.exception(), ValueError)
    assert str(cancelled.exception()) == "first"


@pytest.mark.parametrize("kind", [asyncio.CancelledError, concurrent.futures.CancelledError])
def test_future_failed_with_any_cancelled_error_is_cancelled(kind):
    fut = Future()
    fut.set_exception(kind())
    assert fut.cancelled()


@on_every_loop
async def test_cancel_wakes_all_waiters():
    fut, raised = Future(), []

    async def client():
        try:
            await fut
        except concurrent.futures.CancelledError as error:  # raised by the task itself
            raised.append(str(error))

    def thread():
        with pytest.raises(CancelledError, match="enough"):
            fut.wait(PATIENCE)
        raised.append("thread")

    async with alongside(thread):
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                group.start_soon(client)
                await anyio.wait_all_tasks_blocked()
                fut.cancel("enough")
    assert sorted(raised) == ["enough", "thread"]


@on_asyncio
async def test_cancelled_future_cancels_the_task_that_awaits_it():
    fut = Future()

    async def client():
        await fut

    task = asyncio.ensure_future(client())
    await asyncio.sleep(0)
    fut.cancel("enough")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert fut.as_asyncio().cancelled()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.gather(fut)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_cancelled_future_does_not_cancel_a_trio_scope(anyio_backend):
    fut = Future()
    fut.cancel()
    with anyio.CancelScope() as scope:
        with pytest.raises(CancelledError):
            await fut
    assert not scope.cancelled_caught


def test_cancel_reaches_children_but_not_parents():
    fut = Future()
    child, collected, gathered = fut.then(lambda f: f.value()), collect_all([fut]), gather([fut])
    fut.cancel("enough")
    for other in (child, collected, gathered):
        assert other.exception() is fut.exception()
        assert not isinstance(other.exception(), CallbackError)
    parent = Future()
    assert parent.then(lambda f: f.value()).cancel()
    assert not parent.done()
    parent.set_result(5)


@pytest.mark.parametrize("outcome", [5, ValueError("foo")])
@pytest.mark.parametrize(
    "make",
    [
        lambda fut: fut.then(lambda f: f.value()),
        lambda fut: gather([fut]),
        lambda fut: collect_all([fut]),
        lambda fut: with_timeout(fut, PATIENCE),
        lambda fut: gather([fut], return_exceptions=True),
    ],
)
def test_parent_of_a_cancelled_child_completes_without_logging(make, outcome, caplog):
    fut = Future()
    child = make(fut)
    assert child.cancel()
    fut.set_result(outcome) if outcome == 5 else fut.set_exception(outcome)
    assert fut.exception() is (None if outcome == 5 else outcome)
    assert child.cancelled()
    assert not caplog.records


def test_cancelled_adopted_future_leaves_its_source_adoptable(caplog):
    for source in (torch.futures.Future(), concurrent.futures.Future()):
        first = as_future(source)
        assert first.cancel()
        second = as_future(source)
        source.set_result(5)
        assert second.wait() == 5
        assert first.cancelled()
    assert not caplog.records


@on_asyncio
async def test_cancelled_adopted_future_leaves_its_asyncio_source():
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: complaints.append(context))
    source, complaints = loop.create_future(), []
    fut = as_future(source)
    assert fut.cancel()
    assert not source.cancelled()
    source.set_result(5)
    await asyncio.sleep(0)
    assert (await as_future(source), complaints) == (5, [])


@on_every_loop
async def test_cancelling_the_future_of_a_task_leaves_the_task_running():
    go_on, got = anyio.Event(), []

    async def work():
        await go_on.wait()
        got.append("worked")
        return 5

    async with anyio.create_task_group() as group:
        fut = start_soon(group, work)
        await anyio.wait_all_tasks_blocked()
        assert fut.cancel("no longer wanted")
        go_on.set()
    assert got == ["worked"]
    assert str(fut.exception()) == "no longer wanted"


@on_every_loop
async def test_await_of_a_cancelled_future_leaves_the_group_running():
    fut, go_on = Future(), anyio.Event()

    async def work():
        await fut

    async def other():
        await go_on.wait()
        return 5

    async with anyio.create_task_group() as group:
        given_up, others = start_soon(group, work), start_soon(group, other)
        await anyio.wait_all_tasks_blocked()
        fut.cancel("enough")
        await anyio.wait_all_tasks_blocked()
        go_on.set()
    assert given_up.cancelled()
    assert "enough" in str(given_up.exception())
    assert others.value() == 5


def test_cancelled_error_can_be_sent_to_other_processes():
    fut = Future()
    fut.cancel("enough")
    again = pickle.loads(pickle.dumps(fut.exception()))
    assert isinstance(again, CancelledError)
    assert str(again) == "enough"
    remote = rpc_error(CancelledError, "enough")
    assert isinstance(remote, CancelledError)
    assert isinstance(remote, RpcError)


def test_cpp_consumers_of_a_cancelled_future_get_an_error():
    fut = Future()
    seen = []
    torch._C.Future.add_done_callback(fut, seen.append)
    fut.cancel("enough")
    assert seen == [fut]
    with pytest.raises(CancelledError, match="enough"):
        torch._C.Future.wait(fut)


# -------------------------------------------------------------------- try_set_result


@pytest.mark.parametrize("first", ["set_result", "cancel"])
def test_try_set_completes_only_a_pending_future(first):
    fut = Future()
    getattr(fut, first)("first")
    before = repr(fut)
    assert fut.try_set_result("late") is False
    assert fut.try_set_exception(ValueError("late")) is False
    assert repr(fut) == before
    for kind in (Future, lambda: Future(devices=[])):
        ours, failed = kind(), kind()
        error = ValueError("foo")
        assert ours.try_set_result(5) is True
        assert failed.try_set_exception(error) is True
        assert ours.value() == 5
        assert failed.exception() is error


def test_try_set_exception_refuses_a_non_exception():
    pending, done = Future(), Future()
    done.set_result(5)
    for fut in (pending, done):
        with pytest.raises(TypeError, match=r"try_set_exception\(\) takes an exception"):
            fut.try_set_exception("text")
    assert not pending.done()


def test_exactly_one_racing_try_set_returns_true():
    for _ in range(300):
        fut = Future()
        ways = [
            lambda fut=fut: fut.try_set_result(1),
            lambda fut=fut: fut.try_set_exception(ValueError("foo")),
            lambda fut=fut: fut.cancel(),
            lambda fut=fut: fut.try_set_result(2),
        ]
        results = []
        with running(*[lambda way=way: results.append(way()) for way in ways]):
            pass
        assert sorted(results) == [False, False, False, True]


def test_try_set_that_loses_a_late_race_returns_false():
    wins = []
    for interrupt in interrupts(
        torchfut_aio, at="instructions", do=lambda: fut.try_set_result("other")
    ):
        fut = Future()
        with interrupt:
            wins.append(fut.try_set_result("this"))
        assert fut.value() == ("this" if wins[-1] else "other"), interrupt
    assert set(wins) == {True, False}


def test_callbacks_run_before_try_set_returns():
    fut, ran = Future(), []
    fut.add_done_callback(lambda f: ran.append(f.value()))
    assert fut.try_set_result(5)
    assert ran == [5]


# ------------------------------------------------------------------- has_waiters


@pytest.mark.parametrize(
    "follow",
    [
        lambda fut: fut.add_done_callback(print),
        lambda fut: fut.then(print),
        lambda fut: gather([fut]),
        lambda fut: collect_all([fut]),
        lambda fut: as_completed([fut]),
        lambda fut: with_timeout(fut, 1e6),
        lambda fut: fut.as_concurrent(),
    ],
)
def test_has_waiters_counts_everything_attached_to_the_future(follow):
    fut = Future()
    assert fut.has_waiters() is False
    attached = follow(fut)
    assert fut.has_waiters() is True
    fut.cancel()
    assert fut.has_waiters() is False
    del attached


@on_every_loop
async def test_cancelled_task_no_longer_counts_as_a_waiter():
    fut = Future()
    async with anyio.create_task_group() as group:
        group.start_soon(fut.stream_ordered)
        await anyio.wait_all_tasks_blocked()
        assert fut.has_waiters()
        group.cancel_scope.cancel()
    assert not fut.has_waiters()


def test_timed_out_thread_no_longer_counts_as_a_waiter():
    fut, seen = Future(), []

    def poll():
        while not fut.has_waiters():
            pass
        seen.append(True)

    with running(poll):
        while not seen:
            with pytest.raises(TimeoutError):
                fut.wait(0.01)
    assert not fut.has_waiters()


def test_finished_timeouts_and_iterators_do_not_count_as_waiters():
    fut = Future()
    completed, late = as_completed([fut]), with_timeout(fut, 0.001)
    with pytest.raises(TimeoutError):
        late.wait(PATIENCE)
    del completed
    gc.collect()
    assert not fut.has_waiters()


# ----------------------------------------- the guide's client, the classifier's worker


@pytest.fixture
def client():
    """The recipe for cancellation, taken from the documentation."""
    [recipe] = [
        block.code
        for block in blocks("python")
        if block.page == "docs/guides/cancelling.md" and "async def client(" in block.code
    ]
    names = {}
    exec(recipe.partition("def worker(")[0], names)
    return names["client"]


class Model(torch.nn.Module):
    """Classifies each image as its number; blocks on the first batch until it may go on."""

    def __init__(self, error=None):
        super().__init__()
        self.error = error
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.batches = []

    def forward(self, images):
        self.batches.append(images.tolist())
        self.begun.set()
        assert self.go_on.wait(PATIENCE)
        if self.error is not None and len(self.batches) == 1:
            raise self.error
        return torch.nn.functional.one_hot(images, 10)


@pytest.fixture
def digits(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return pytest.importorskip("digits")


@pytest.mark.parametrize("error", [None, ValueError("of the model")])
def test_worker_survives_clients_that_cancel(client, digits, error):
    model = Model(error)
    batcher = Batcher(
        functools.partial(digits.classify, model),
        max_batch_size=64,
        max_wait=0,
        max_queue_size=64,
    )
    began = batcher.submit(torch.tensor(1))  # in the model when its client cancels
    assert model.begun.wait(PATIENCE)
    waits = batcher.submit(torch.tensor(2))  # still queued then
    for fut in (began, waits):
        with pytest.raises(TimeoutError):
            asyncio.run(client(fut, 0.001))
        assert fut.cancelled()
    stays = batcher.submit(torch.tensor(3))
    model.go_on.set()
    assert asyncio.run(client(stays, PATIENCE)) == 3
    batcher.close()
    assert model.batches == [[1], [3]]
    assert batcher.statistics().batches == 2


@on_asyncio
async def test_cancelled_client_cancels_its_future(client):
    fut = Future()
    task = asyncio.ensure_future(client(fut, PATIENCE))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert fut.cancelled()


def test_set_result_on_a_cancelled_future_raises():
    fut = Future()
    fut.cancel()
    with pytest.raises(InvalidStateError):
        fut.set_result("too late")

"""Giving up, through to the worker: cancel, completing unless done, and whether anybody waits."""

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
from .loops import on_asyncio, on_every_loop
from .threads import PATIENCE, alongside, running

# ------------------------------------------------------------------------------ cancel


@pytest.mark.parametrize("kind", [asyncio.CancelledError, concurrent.futures.CancelledError])
def test_a_cancelled_future_raises_the_cancelled_error_of_asyncio_and_of_threads(kind):
    fut = Future()
    assert not fut.cancelled()
    assert fut.cancel("the client has gone") is True
    assert fut.done()
    assert fut.cancelled()
    with pytest.raises(kind, match="the client has gone") as caught:
        fut.wait()
    assert isinstance(caught.value, CancelledError)
    assert caught.value is fut.exception()
    assert isinstance(caught.value, Exception)


@pytest.mark.parametrize("copied", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_a_cancelled_error_that_is_copied_is_the_same(copied):
    fut = Future()
    fut.cancel("the client has gone")
    fut.exception().add_note("a note")
    error = copied(fut.exception())
    assert type(error) is type(fut.exception())
    assert isinstance(error, asyncio.CancelledError)
    assert error.args == ("the client has gone",)
    assert error.__notes__ == ["a note"]
    assert b"torchfut_aio._" not in pickle.dumps(error)
    assert type(copied(CancelledError("foo"))) is CancelledError


def test_without_a_message_the_error_says_nothing():
    fut = Future()
    fut.cancel()
    assert fut.exception().args == ()


@pytest.mark.parametrize("dumps", [pickle.dumps, _internal_rpc_pickler.serialize])
def test_the_class_of_a_cancelled_error_can_be_pickled_as_rpc_does(dumps):
    fut = Future()
    fut.cancel("foo")
    kind = type(fut.exception())
    sent = dumps(kind)
    received = (
        pickle.loads(sent) if dumps is pickle.dumps else _internal_rpc_pickler.deserialize(*sent)
    )
    assert received is kind
    assert repr(fut.exception()) == "CancelledError('foo')"


def test_cancelling_what_is_done_does_nothing():
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
def test_a_future_that_failed_with_a_cancellation_of_any_kind_is_cancelled(kind):
    fut = Future()
    fut.set_exception(kind())
    assert fut.cancelled()


@on_every_loop
async def test_cancelling_wakes_all_who_wait():
    fut, told = Future(), []

    async def client():
        try:
            await fut
        except concurrent.futures.CancelledError as error:  # so an error of its own, not its end
            told.append(str(error))

    def thread():
        with pytest.raises(CancelledError, match="enough"):
            fut.wait(PATIENCE)
        told.append("thread")

    async with alongside(thread):
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                group.start_soon(client)
                await anyio.wait_all_tasks_blocked()
                fut.cancel("enough")
    assert sorted(told) == ["enough", "thread"]


@on_asyncio
async def test_a_task_that_awaits_a_cancelled_future_is_cancelled_as_with_asyncios():
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
async def test_on_trio_a_cancelled_future_is_an_error_that_cancels_no_scope(anyio_backend):
    fut = Future()
    fut.cancel()
    with anyio.CancelScope() as scope:
        with pytest.raises(CancelledError):
            await fut
    assert not scope.cancelled_caught


def test_children_are_cancelled_with_it_and_it_not_with_them():
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
def test_whoever_completes_the_source_of_a_cancelled_child_hears_nothing_of_it(
    make, outcome, caplog
):
    fut = Future()
    child = make(fut)
    assert child.cancel()
    fut.set_result(outcome) if outcome == 5 else fut.set_exception(outcome)
    assert fut.exception() is (None if outcome == 5 else outcome)
    assert child.cancelled()
    assert not caplog.records


def test_cancelling_what_was_adopted_leaves_the_source_and_whoever_adopts_it_again(caplog):
    for source in (torch.futures.Future(), concurrent.futures.Future()):
        first = as_future(source)
        assert first.cancel()
        second = as_future(source)
        source.set_result(5)
        assert second.wait() == 5
        assert first.cancelled()
    assert not caplog.records


@on_asyncio
async def test_cancelling_what_was_adopted_from_asyncio_leaves_the_source():
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
async def test_cancelling_the_future_of_a_task_leaves_the_task():
    go_on, got = anyio.Event(), []

    async def work():
        await go_on.wait()
        got.append("worked")
        return 5

    async with anyio.create_task_group() as group:
        fut = start_soon(group, work)
        await anyio.wait_all_tasks_blocked()
        assert fut.cancel("nobody wants it")
        go_on.set()
    assert got == ["worked"]
    assert str(fut.exception()) == "nobody wants it"


@on_every_loop
async def test_a_task_that_awaits_a_cancelled_future_leaves_its_group_alone():
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


def test_it_can_be_told_to_other_processes():
    fut = Future()
    fut.cancel("enough")
    again = pickle.loads(pickle.dumps(fut.exception()))
    assert isinstance(again, CancelledError)
    assert str(again) == "enough"
    remote = rpc_error(CancelledError, "enough")
    assert isinstance(remote, CancelledError)
    assert isinstance(remote, RpcError)


def test_c_consumers_of_a_cancelled_future_get_an_error_and_no_value():
    fut = Future()
    seen = []
    torch._C.Future.add_done_callback(fut, seen.append)
    fut.cancel("enough")
    assert seen == [fut]
    with pytest.raises(CancelledError, match="enough"):
        torch._C.Future.wait(fut)


# -------------------------------------------------------------------- completing unless done


@pytest.mark.parametrize("first", ["set_result", "cancel"])
def test_trying_completes_a_pending_future_and_leaves_one_that_is_done(first):
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


def test_trying_with_what_is_no_exception_is_a_type_error():
    pending, done = Future(), Future()
    done.set_result(5)
    for fut in (pending, done):
        with pytest.raises(TypeError, match=r"try_set_exception\(\) takes an exception"):
            fut.try_set_exception("text")
    assert not pending.done()


def test_of_racing_setters_exactly_one_is_told_that_it_completed_the_future():
    for _ in range(300):
        fut = Future()
        ways = [
            lambda fut=fut: fut.try_set_result(1),
            lambda fut=fut: fut.try_set_exception(ValueError("foo")),
            lambda fut=fut: fut.cancel(),
            lambda fut=fut: fut.try_set_result(2),
        ]
        told = []
        with running(*[lambda way=way: told.append(way()) for way in ways]):
            pass
        assert sorted(told) == [False, False, False, True]


def test_a_race_that_is_lost_after_a_look_is_told_as_any_other(monkeypatch):
    fut = Future()

    class Late:  # while its value is looked at, another thread completes the future
        def __reduce_ex__(self, protocol):
            return int, (5,)

    real = torchfut_aio._core._completion.complete

    def complete(future, outcome):
        if not fut.done():
            monkeypatch.undo()
            fut.set_result("first")
        real(future, outcome)

    monkeypatch.setattr(torchfut_aio._core._completion, "complete", complete)
    assert fut.try_set_result(Late()) is False
    assert fut.value() == "first"


def test_callbacks_run_before_trying_returns():
    fut, ran = Future(), []
    fut.add_done_callback(lambda f: ran.append(f.value()))
    assert fut.try_set_result(5)
    assert ran == [5]


# ------------------------------------------------------------------- whether anybody waits


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
def test_what_is_attached_to_a_future_waits_for_it(follow):
    fut = Future()
    assert fut.has_waiters() is False
    attached = follow(fut)
    assert fut.has_waiters() is True
    fut.cancel()
    assert fut.has_waiters() is False
    del attached


@on_every_loop
async def test_a_task_waits_until_it_is_cancelled():
    fut = Future()
    async with anyio.create_task_group() as group:
        group.start_soon(fut.stream_ordered)
        await anyio.wait_all_tasks_blocked()
        assert fut.has_waiters()
        group.cancel_scope.cancel()
    assert not fut.has_waiters()


def test_a_thread_waits_until_its_time_is_up():
    fut, seen = Future(), []

    def look():
        while not fut.has_waiters():
            pass
        seen.append(True)

    with running(look):
        while not seen:
            with pytest.raises(TimeoutError):
                fut.wait(0.01)
    assert not fut.has_waiters()


def test_a_timeout_or_an_iterator_that_is_over_waits_no_more():
    fut = Future()
    completed, late = as_completed([fut]), with_timeout(fut, 0.001)
    with pytest.raises(TimeoutError):
        late.wait(PATIENCE)
    del completed
    gc.collect()
    assert not fut.has_waiters()


# ------------------------------------------- the guide's client, the quickstart's worker


@pytest.fixture
def client():
    """The documentation's recipe for giving up, as it stands there."""
    [recipe] = [
        block.code
        for block in blocks("python")
        if block.page == "docs/guides/cancelling.md" and "async def client(" in block.code
    ]
    names = {}
    exec(recipe.partition("def worker(")[0], names)
    return names["client"]


class Model(torch.nn.Module):
    """Tells each image's number; holds the first batch until it may go on."""

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
def quickstart(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return pytest.importorskip("quickstart")


@pytest.mark.parametrize("error", [None, ValueError("of the model")])
def test_the_worker_outlives_clients_that_give_up(client, quickstart, error):
    model = Model(error)
    batcher = Batcher(
        functools.partial(quickstart.classify, model),
        max_batch_size=64,
        max_wait=0,
        max_queue_size=64,
    )
    began = batcher.submit(torch.tensor(1))  # is in the model when its client gives up
    assert model.begun.wait(PATIENCE)
    waits = batcher.submit(torch.tensor(2))  # is still in the queue then
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
async def test_a_client_that_is_cancelled_gives_up_too(client):
    fut = Future()
    task = asyncio.ensure_future(client(fut, PATIENCE))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert fut.cancelled()


def test_whoever_would_rather_have_an_error_still_gets_it():
    fut = Future()
    fut.cancel()
    with pytest.raises(InvalidStateError):
        fut.set_result("too late")

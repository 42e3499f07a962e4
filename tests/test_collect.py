"""Many futures: ``collect_all``, ``gather``, ``wait_all``, ``as_completed``."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import gc
import itertools
import pickle
import random
import threading
import traceback
import weakref

import anyio
import pytest
import torch

from torchfut_aio import (
    CallbackError,
    Future,
    _as_completed,
    as_completed,
    as_future,
    collect_all,
    gather,
    wait_all,
)

from .explorer import interrupts
from .loops import on_every_loop
from .threads import PATIENCE, alongside, running, until


def done(value):
    fut = Future()
    fut.set_result(value)
    return fut


def failed(error):
    fut = Future()
    fut.set_exception(error)
    return fut


# ------------------------------------------------------------------------- collect_all


def test_collect_all_returns_its_futures_once_all_are_done():
    futures = [Future(), torch.futures.Future(), Future()]
    combined = collect_all(futures)
    assert isinstance(combined, Future)
    for fut in futures:
        assert not combined.done()
        fut.set_result(None)
    got = combined.wait()
    assert len(got) == 3
    assert all(a is b for a, b in zip(got, futures))


def test_collect_all_raises_only_once_all_are_done():
    first, second, third = futures = [Future(), Future(), Future()]
    combined = collect_all(futures)
    third.set_exception(KeyError("third"))
    second.set_exception(ValueError("second"))
    assert not combined.done()
    first.set_result(1)
    with pytest.raises(ValueError, match="second"):
        combined.wait()
    assert combined.exception() is second.exception()


def test_collect_all_returns_our_class():
    futures = [Future(), Future()]
    total = collect_all(futures).then(lambda f: sum(fut.value() for fut in f.value()))
    for fut in futures:
        fut.set_result(3)
    assert isinstance(total, Future)
    assert total.wait() == 6


@pytest.mark.parametrize("combine", [collect_all, gather])
def test_combined_futures_nest_to_any_depth(combine):
    fut = Future()
    combined = fut
    for _ in range(10_000):
        combined = combine([combined])
    fut.set_result(5)
    assert combined.done()


# -------------------------------------------------------------------- gather, wait_all


def test_gather_returns_the_values_in_order():
    futures = [Future(), torch.futures.Future(), Future()]
    combined = gather(futures)
    for n, fut in reversed(list(enumerate(futures))):
        assert not combined.done()
        fut.set_result(n)
    assert combined.wait() == [0, 1, 2]


def test_gather_fails_at_the_first_error_and_releases_the_others():
    never, fails = Future(), Future()
    combined = gather([never, fails, never])
    assert "callbacks=1" in repr(never)
    fails.set_exception(ValueError("foo"))
    assert combined.exception() is fails.exception()
    assert "callbacks=0" in repr(never)
    assert not never.done()


def test_traceback_does_not_grow_when_gathered_repeatedly():
    fut = failed(ValueError("foo"))

    def frames():
        with pytest.raises(ValueError, match="foo") as caught:
            wait_all([fut])
        return len(traceback.extract_tb(caught.value.__traceback__))

    first = frames()
    assert [frames() for _ in range(20)] == [first] * 20


def test_gather_of_a_failed_future_leaves_no_callback():
    for make in (lambda n, f: [n, f, n], lambda n, f: [f, n]):
        never = Future()
        combined = gather(make(never, failed(ValueError("foo"))))
        with pytest.raises(ValueError, match="foo"):
            combined.wait(timeout=0)
        assert "callbacks=0" in repr(never)


def test_gather_of_any_iterable_returns_a_list():
    futures = (Future(), torch.futures.Future())
    combined, settled = gather(futures), gather(futures, return_exceptions=True)
    for n, fut in enumerate(futures):
        fut.set_result(n)
    assert combined.wait() == settled.wait() == [0, 1]
    assert gather(()).wait() == gather((), return_exceptions=True).wait() == []


def test_gather_returns_exceptions_on_request():
    error = ValueError("foo")
    slow, fails, cancelled = futures = [Future(), Future(), Future()]
    combined = gather([*futures, fails], return_exceptions=True)
    fails.set_exception(error)
    cancelled.cancel()
    assert not combined.done()
    slow.set_result(5)
    assert combined.wait() == [5, error, cancelled.exception(), error]
    assert gather([], return_exceptions=True).wait() == []


def test_wait_all_that_times_out_leaves_no_waiter_behind():
    never, done_already = Future(), done(1)
    for timeout in (0.01, 0, -1):
        with pytest.raises(TimeoutError, match=r"futures not done within .* s: 1;"):
            wait_all([never, done_already, never], timeout=timeout)
        assert repr(never) == "<Future pending waiters=0 callbacks=0>"
    assert wait_all([done_already], timeout=0) == [1]
    with running(lambda: never.set_result(2)):
        assert wait_all([never, done_already], timeout=PATIENCE) == [2, 1]


def test_timeout_error_of_a_future_is_raised_by_wait_all():
    error = TimeoutError("its own")
    with pytest.raises(TimeoutError, match="its own"):
        wait_all([Future(), failed(error)], timeout=PATIENCE)


@pytest.mark.parametrize(("timeout", "error"), [("1", TypeError), (float("nan"), ValueError)])
@pytest.mark.parametrize("function", [wait_all, as_completed])
def test_invalid_timeout_is_refused_before_waiting(function, timeout, error):
    fut = Future()
    with pytest.raises(error, match="timeout must be a number"):
        function([fut], timeout=timeout)
    assert not fut.has_waiters()


@pytest.mark.parametrize("function", [gather, collect_all, wait_all, as_completed])
def test_futures_as_separate_arguments_are_refused_with_a_hint(function):
    loop = asyncio.new_event_loop()
    futures = [Future(), torch.futures.Future(), concurrent.futures.Future(), loop.create_future()]
    cure = rf"{function.__name__}\(\) takes one iterable: {function.__name__}\(\[a, b\]\)"
    for first, second in itertools.product(futures, futures):
        for passed in ((first, second), (first, second, first), ([first], second)):
            with pytest.raises(TypeError, match=cure):
                function(*passed)
    with pytest.raises(TypeError, match=cure):
        function(futures, 5)
    assert not futures[0].has_waiters()
    loop.close()


def test_wait_all_returns_the_values():
    futures = [Future(), torch.futures.Future(), Future()]
    got = []
    with running(
        lambda: got.append(wait_all(futures)),
        lambda: [fut.set_result(n) for n, fut in enumerate(futures)],
    ):
        pass
    assert got == [[0, 1, 2]]


@pytest.mark.parametrize("early", [True, False])
def test_wait_all_raises_the_first_error_without_waiting_longer(early):
    never, fails = Future(), Future()
    if early:
        fails.set_exception(ValueError("foo"))
    caught = []

    def wait():
        with pytest.raises(ValueError, match="foo"):
            wait_all([never, fails])
        caught.append(True)

    with running(wait):
        if not early:
            until(lambda: "callbacks=1" in repr(never))
            fails.set_exception(ValueError("foo"))
    assert caught == [True]
    assert repr(never) == "<Future pending waiters=0 callbacks=0>"


def test_wait_all_raises_the_error_of_a_callback():
    first, second = done(1), done(2)
    assert wait_all([first, second]) == [1, 2]
    third = first.then(lambda fut: {}["Expected error"])
    for every_wait_all in (wait_all, torch.futures.wait_all):
        with pytest.raises(RuntimeError, match="Expected error") as caught:
            every_wait_all([third, second])
        assert isinstance(caught.value, CallbackError)


# ----------------------------------------------------------------- the same for each of them


@pytest.mark.parametrize(
    ("combine", "empty"), [(collect_all, []), (gather, []), (as_completed, None)]
)
def test_empty_list_of_futures_is_accepted(combine, empty):
    combined = combine([])
    assert wait_all([]) == []
    assert (list(combined) if combine is as_completed else combined.wait()) == (empty or [])


def test_duplicate_futures_are_accepted():
    fut = Future()
    collected, gathered, completed = (
        collect_all([fut, fut]),
        gather([fut, fut]),
        as_completed([fut, fut]),
    )
    fut.set_result(1)
    assert collected.wait() == [fut, fut]
    assert gathered.wait() == wait_all([fut, fut]) == [1, 1]
    assert list(completed) == [fut]


@pytest.mark.parametrize("combine", [collect_all, gather, wait_all, as_completed])
def test_non_future_is_refused_before_callbacks_are_added(combine):
    fut = Future()
    with pytest.raises(RuntimeError, match="Future can't be None"):
        combine([fut, None])
    with pytest.raises(TypeError, match="an int is not a future"):
        combine([fut, 5])
    with pytest.raises(TypeError, match="iterable of futures"):
        combine(fut)
    assert "callbacks=0" in repr(fut)


@pytest.mark.parametrize("combine", [collect_all, gather])
def test_racing_completions_lose_no_value(combine):
    for seed in range(50):
        futures = [Future() for _ in range(100)]
        shuffled = random.Random(seed).sample(futures, 100)

        def complete(part):
            for fut in part:
                fut.set_result(None)

        with running(*[lambda k=k: complete(shuffled[k::3]) for k in range(3)]):
            combined = combine(futures)
        assert combined.done()


@pytest.mark.parametrize("errors", [1, 3])
def test_gather_raises_one_of_racing_failures(errors, caplog):
    for _ in range(100):
        futures = [Future() for _ in range(6)]
        combined = gather(futures)
        fails = [lambda fut=fut: fut.set_exception(ValueError()) for fut in futures[:errors]]
        works = [lambda fut=fut: fut.set_result(1) for fut in futures[errors:]]
        with running(*fails, *works):
            pass
        assert combined.exception() in [fut.exception() for fut in futures[:errors]]
    assert not caplog.records


@on_every_loop
async def test_combined_futures_can_be_awaited():
    futures = [Future() for _ in range(10)]
    async with alongside(lambda: [fut.set_result(n) for n, fut in enumerate(futures)]):
        with anyio.fail_after(PATIENCE):
            assert await gather(futures) == list(range(10))
            assert await collect_all(futures) == futures


# ------------------------------------------------------------------------ as_completed


def test_as_completed_yields_futures_in_completion_order():
    first, plain, last = Future(), torch.futures.Future(), done("at once")
    completed = as_completed([first, plain, last])
    assert next(completed) is last
    plain.set_result("second")
    assert next(completed).wait() == "second"
    first.set_exception(ValueError("foo"))
    assert next(completed) is first
    with pytest.raises(StopIteration):
        next(completed)


def test_as_completed_in_a_thread_waits_for_other_threads():
    futures = [Future() for _ in range(100)]
    shuffled = random.sample(futures, 100)
    completed = as_completed(futures)
    with running(lambda: [fut.set_result(None) for fut in shuffled]):
        assert list(completed) == shuffled


@on_every_loop
async def test_as_completed_in_a_task_yields_all_futures():
    futures = [Future() for _ in range(100)]
    shuffled = random.sample(futures, 100)
    completed = as_completed(futures)
    async with alongside(lambda: [fut.set_result(None) for fut in shuffled]):
        with anyio.fail_after(PATIENCE):
            got = [fut async for fut in completed]
    assert got == shuffled


@on_every_loop
async def test_as_completed_adds_one_waiter_and_no_tasks():
    futures = [Future() for _ in range(10)]

    async def first():
        async for fut in as_completed(futures):
            assert fut is futures[7]
            break

    async with anyio.create_task_group() as tg:
        tg.start_soon(first)
        await anyio.wait_all_tasks_blocked()
        assert all(repr(fut) == "<Future pending waiters=0 callbacks=1>" for fut in futures)
        assert len([t for t in anyio.get_running_tasks() if "first" in str(t.name)]) == 1
        futures[7].set_result(None)
    # An iteration that stops half way leaves nothing behind.
    assert all("callbacks=0" in repr(fut) for fut in futures if fut is not futures[7])


@on_every_loop
async def test_cancelled_as_completed_can_be_resumed():
    futures = [Future(), Future()]
    completed = as_completed(futures)
    with anyio.move_on_after(0.001) as scope:
        await completed.__anext__()
    assert scope.cancelled_caught
    for fut in futures:
        fut.set_result(None)
    assert [fut async for fut in completed] == futures


def test_dropped_as_completed_leaves_no_callback_behind():
    futures = [Future() for _ in range(3)]
    completed = as_completed(futures)
    ref = weakref.ref(completed)
    del completed
    gc.collect()
    assert ref() is None
    assert all("callbacks=0" in repr(fut) for fut in futures)


def test_as_completed_keeps_no_yielded_future():
    futures = [done(n) for n in range(10)]
    refs = [weakref.ref(fut) for fut in futures]
    completed = as_completed(futures)
    del futures
    for _ in range(9):
        next(completed)
    gc.collect()
    assert [ref() is not None for ref in refs] == [False] * 9 + [True]


def test_as_completed_in_a_thread_times_out_and_cleans_up():
    never, later, early = Future(), Future(), done(1)
    completed = as_completed([never, early, later], timeout=0.01)
    assert next(completed) is early
    for _ in range(2):
        with pytest.raises(TimeoutError, match=r"futures not done within 0\.01 s: 2;"):
            next(completed)
        assert not never.has_waiters()
    later.set_result(2)
    with pytest.raises(TimeoutError):
        next(completed)


def test_as_completed_yields_done_futures_before_it_times_out():
    futures = [Future() for _ in range(3)]
    completed = as_completed(futures, timeout=0)
    with pytest.raises(TimeoutError):
        next(completed)
    completed = as_completed(futures, timeout=0.01)
    futures[1].set_result(1)
    until_late = threading.Event()
    until_late.wait(0.02)
    assert next(completed) is futures[1]
    with pytest.raises(TimeoutError):
        next(completed)


@pytest.mark.parametrize(("error", "at"), [(KeyboardInterrupt, "signals"), (MemoryError, "calls")])
def test_interrupted_as_completed_times_out_and_cleans_up(error, at):
    for interrupt in interrupts(_as_completed, error=error, at=at):
        never, early = Future(), done(1)
        completed = as_completed([never, early], timeout=0.001)
        with interrupt, pytest.raises(TimeoutError):
            list(completed)
        with pytest.raises(TimeoutError):
            list(completed)
        assert not never.has_waiters()


@pytest.mark.parametrize("timeout", [PATIENCE, float("inf"), 1e300, None])
def test_as_completed_with_enough_time_yields_all(timeout):
    futures = [Future() for _ in range(3)]
    completed = as_completed(futures, timeout=timeout)
    with running(lambda: [fut.set_result(None) for fut in futures]):
        assert list(completed) == futures


@on_every_loop
async def test_as_completed_in_a_task_times_out_and_cleans_up():
    never, early, later = Future(), done(1), Future()
    got, late = [], []
    completed = as_completed([never, early, later], timeout=0.01)

    async def take():
        try:
            async for fut in completed:
                got.append(fut)
        except TimeoutError:
            late.append(True)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(take)
            group.start_soon(take)
    assert (got, late) == ([early], [True, True])
    assert not never.has_waiters()
    later.set_result(2)
    with pytest.raises(TimeoutError):
        await completed.__anext__()


@on_every_loop
async def test_as_completed_in_a_task_with_enough_time_yields_all():
    for timeout in (PATIENCE, 1e300, float("inf")):
        futures = [Future() for _ in range(3)]
        async with alongside(lambda: [fut.set_result(None) for fut in futures]):
            with anyio.fail_after(PATIENCE):
                assert [fut async for fut in as_completed(futures, timeout=timeout)] == futures


def test_as_completed_is_shared_by_several_threads():
    for _ in range(20):
        futures = [Future() for _ in range(60)]
        completed = as_completed(futures)
        got = []
        with running(
            *[lambda: got.extend(completed)] * 4,
            lambda: [fut.set_result(None) for fut in futures],
        ):
            pass
        assert len(got) == 60
        assert set(got) == set(futures)


@on_every_loop
async def test_as_completed_is_shared_by_tasks_that_are_cancelled():
    futures = [Future() for _ in range(20)]
    completed = as_completed(futures)
    got = []

    async def take():
        async for fut in completed:
            got.append(fut)

    async with anyio.create_task_group() as tg:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as cancelled:
                for _ in range(3):
                    cancelled.start_soon(take)
                tg.start_soon(take)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
        for fut in futures:
            fut.set_result(None)
    assert set(got) == set(futures)


def test_combined_futures_can_be_of_any_adoptable_kind():
    with concurrent.futures.ThreadPoolExecutor() as pool:
        release = threading.Event()
        submitted = pool.submit(release.wait)
        combined = gather([submitted, done("ours")])
        assert not combined.done()
        release.set()
        assert combined.wait(PATIENCE) == [True, "ours"]
    assert as_future(submitted).wait() is True


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_as_completed_cannot_be_copied_or_pickled(copied):
    futures = [Future(), Future()]
    completed = as_completed(futures)
    with pytest.raises(TypeError, match=r"belongs to this process.*as_completed\(\) again"):
        copied(completed)
    gc.collect()
    for fut in futures:
        fut.set_result(None)
    assert list(completed) == futures

"""``set_results``: complete many futures at once."""

from __future__ import annotations

import asyncio
import gc
import logging

import anyio
import pytest
import torch

from torchfut_aio import (
    Future,
    InvalidStateError,
    NotAFutureError,
    _core,
    _loops,
    _many,
    gather,
    set_results,
)

from .accelerator import FIRST, NEW, SECOND, being_filled, declared_or_not, simulated_only
from .explorer import interrupts
from .loops import on_asyncio, on_every_loop
from .threads import PATIENCE, alongside, running, until
from .waiting import polled


def futures_of(number):
    return [Future() for _ in range(number)]


@on_every_loop
async def test_tasks_that_wait_get_their_values_from_another_thread():
    futures = futures_of(300)
    got = {}

    async def wait(n):
        got[n] = await futures[n]

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tg:
            for n in range(300):
                tg.start_soon(wait, n)
            await anyio.wait_all_tasks_blocked()
            async with alongside(lambda: set_results(futures, range(300))):
                pass
    assert got == {n: n for n in range(300)}
    assert not any(_core.waiters_of(fut) for fut in futures)


@on_every_loop
async def test_tasks_of_the_loop_that_completes_them_get_their_values():
    futures = futures_of(3)
    async with anyio.create_task_group() as tg:
        got = []

        async def wait(fut):
            got.append(await fut)

        for fut in futures:
            tg.start_soon(wait, fut)
        await anyio.wait_all_tasks_blocked()
        set_results(futures, ["a", "b", "c"])
    assert sorted(got) == ["a", "b", "c"]


@on_asyncio
async def test_a_loop_is_woken_once_for_all(monkeypatch):
    loop, futures = asyncio.get_running_loop(), futures_of(64)
    tasks = [asyncio.ensure_future(fut) for fut in futures]
    await asyncio.sleep(0)
    ours, asked = _loops.current_asyncio(), []
    call_soon = type(ours).call_soon

    def counted(self, function):
        asked.append(self)
        return call_soon(self, function)

    monkeypatch.setattr(type(ours), "call_soon", counted)
    await loop.run_in_executor(None, set_results, futures, range(64))
    assert await asyncio.gather(*tasks) == list(range(64))
    assert asked == [ours]


def test_a_value_that_is_an_exception_is_an_error():
    first, second, third = futures_of(3)
    error = ValueError("foo")
    assert set_results([first, second, third], [1, error, KeyError]) == []
    assert (first.value(), third.value()) == (1, KeyError)
    assert second.exception() is error


def test_what_is_done_keeps_its_outcome_and_is_told(caplog):
    cancelled, pending, failed = futures_of(3)
    cancelled.set_exception(asyncio.CancelledError())
    failed.set_result("before")
    unused = ValueError("not stored: the caller still has it")
    assert set_results([cancelled, pending, failed], ["late", 2, unused]) == [cancelled, failed]
    assert isinstance(cancelled.exception(), asyncio.CancelledError)
    assert (pending.value(), failed.value()) == (2, "before")
    del unused
    gc.collect()
    assert not caplog.records


def test_a_future_that_is_named_twice_gets_the_first_value():
    (fut,) = futures_of(1)
    assert set_results([fut, fut], [1, 2]) == [fut]
    assert fut.value() == 1


@pytest.mark.parametrize(
    ("values", "extra", "error"),
    [([1], [], ValueError), ([1, 2, 3], [], ValueError), ([1, 2, 3], [None], NotAFutureError)],
    ids=["fewer", "more", "no future"],
)
def test_what_does_not_fit_completes_nothing(values, extra, error):
    futures = futures_of(2)
    with pytest.raises(error):
        set_results(futures + extra, values)
    with pytest.raises(NotAFutureError):
        set_results([torch.futures.Future()], [1])
    assert not any(fut.done() for fut in futures)
    assert set_results([], []) == []
    assert set_results(iter(futures), torch.eye(2)) == []
    assert futures[1].value().tolist() == [0, 1]


def test_consumers_in_cpp_see_each_when_it_returns():
    futures = futures_of(3)
    plain = torch.futures.collect_all(list(futures))
    set_results(futures, [1, ValueError("foo"), 3])
    assert all(torch._C.Future.done(fut) for fut in futures)
    assert plain.done()
    assert torch._C.Future.wait(futures[2]) == 3
    with pytest.raises(ValueError, match="foo"):
        torch._C.Future.wait(futures[1])
    with pytest.raises(InvalidStateError):
        futures[0].set_result(2)


def test_threads_that_wait_are_woken():
    futures, got = futures_of(4), []

    def wait(fut):
        got.append(fut.wait(PATIENCE))

    with running(*[lambda fut=fut: wait(fut) for fut in futures]):
        until(lambda: all("waiters=1" in repr(fut) for fut in futures))
        set_results(futures, range(4))
    assert sorted(got) == [0, 1, 2, 3]


def test_every_callback_runs_whatever_one_raises(caplog):
    caplog.set_level(logging.CRITICAL, "torchfut_aio")
    futures, ran = futures_of(5), []

    def interrupt(fut):
        ran.append(fut.value())
        raise (KeyboardInterrupt if fut.value() else ValueError)

    for fut in futures:
        fut.add_done_callback(interrupt)
        fut.add_done_callback(lambda fut: ran.append(-fut.value()))
    children = [fut.then(lambda fut: fut.value()) for fut in futures]
    with pytest.raises(KeyboardInterrupt):
        set_results(futures, range(5))
    assert ran == [0, 0, 1, -1, 2, -2, 3, -3, 4, -4]
    assert [child.value() for child in children] == [0, 1, 2, 3, 4]


def test_racing_setters_complete_each_future_once():
    for _ in range(20):
        futures, refused = futures_of(200), []

        def complete(name, futures=futures, refused=refused):
            refused.extend(set_results(futures, [name] * 200))

        with running(*[lambda name=name: complete(name) for name in "abc"]):
            values = gather(futures).wait(PATIENCE)
        assert len(values) == 200
        assert len(refused) == 400


class Waiter:
    """It is its own waker."""

    woken = 0

    def wake_all(self, waiters):
        for waiter in waiters:
            waiter.woken += 1


@pytest.mark.parametrize(
    ("error", "at"),
    [(KeyboardInterrupt, "signals"), (MemoryError, "calls"), (RecursionError, "calls")],
    ids=["interrupt", "memory", "recursion"],
)
def test_interrupted_set_results_completes_all_or_none(error, at, caplog):
    caplog.set_level(logging.CRITICAL, "torchfut_aio")
    completed = untouched = 0
    for interrupt in interrupts(_core, _many, error=error, at=at):
        futures, ran = futures_of(3), []
        waiters = [Waiter() for _ in futures]
        for fut, waiter in zip(futures, waiters, strict=True):
            _core.add_waiter(fut, waiter, waiter)
            fut.add_done_callback(ran.append)
        children = [fut.then(lambda _: "child") for fut in futures]
        values = [1, ValueError("foo"), 3]
        with interrupt:
            set_results(futures, values)
        if not any(fut.done() for fut in futures):
            untouched += 1
            assert not any(waiter.woken for waiter in waiters)
            set_results(futures, values)
        else:
            completed += 1
        until(lambda: all(child.done() for child in children))
        until(lambda: all(waiter.woken for waiter in waiters))
        assert all(torch._C.Future.done(fut) for fut in futures)
        assert len(ran) <= 3
        assert [fut.exception() or fut.value() for fut in futures] == values
    assert completed > untouched > 0


@on_every_loop
@declared_or_not
@pytest.mark.device
async def test_values_are_ready_when_they_are_awaited(accelerator, producer, devices):
    futures = [Future(devices=devices) for _ in range(2)]
    got = []

    async def wait():
        got.append((await futures[0]).tolist())

    async with anyio.create_task_group() as tg:
        tg.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        with producer:
            set_results(futures, [being_filled(accelerator, FIRST), ValueError("foo")])
        await polled()
        assert futures[0].done()
        assert not got
        accelerator.wake()
    assert got == [NEW]
    assert isinstance(futures[1].exception(), ValueError)


def a_host_value(_accelerator):
    return torch.ones(1)


def what_cannot_be_pickled(_accelerator):
    return [torch.ones(1, device=FIRST), lambda: None]


def on_another_device(_accelerator):
    return torch.ones(1, device=SECOND)


def behind_a_failed_kernel(accelerator):
    value = torch.ones(1, device=FIRST)
    accelerator.fail("the kernel failed")
    return value


def without_events(accelerator):
    accelerator.take_events_away()
    return torch.ones(1, device=FIRST)


def seen(fut):
    """Return the outcome of a future in Python, in C++ and in callbacks."""
    in_callback, in_cpp = [], None
    fut.add_done_callback(lambda fut: in_callback.append(fut.done()))
    try:
        torch._C.Future.wait(fut)
    except Exception as raised:
        in_cpp = str(raised)
    error = fut.exception()
    return type(error), str(error), error or fut.value(), in_cpp, in_callback


@declared_or_not
@simulated_only
@pytest.mark.device
@pytest.mark.several_devices
@pytest.mark.parametrize(
    "make",
    [
        a_host_value,
        what_cannot_be_pickled,
        on_another_device,
        behind_a_failed_kernel,
        without_events,
    ],
)
def test_each_value_is_what_set_result_would_make_of_it(accelerator, producer, devices, make):
    alone, before, after = (Future(devices=devices) for _ in range(3))
    with producer:
        value = make(accelerator)
        alone.set_result(value)
        assert set_results([before, after], [value, value]) == []
    expected = seen(alone)
    for fut in (before, after):
        found = seen(fut)
        assert found[:2] == expected[:2]
        assert found[2] is expected[2] or isinstance(found[2], Exception)
        assert found[3:] == expected[3:]

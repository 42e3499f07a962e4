"""``await``, on every loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import anyio
import anyio.to_thread
import pytest

from torchfut_aio import CallbackError, Future

from .loops import on_every_loop
from .threads import PATIENCE, alongside, running

on_a_thread = anyio.to_thread.run_sync


async def waits_for(fut, into):
    into.append(await fut)


@on_every_loop
async def test_await_returns_the_value_another_thread_sets():
    fut = Future()
    got = []
    async with anyio.create_task_group() as tg:
        tg.start_soon(waits_for, fut, got)
        await anyio.wait_all_tasks_blocked()
        await on_a_thread(fut.set_result, 5)
    assert got == [5]


@on_every_loop
async def test_await_returns_the_value_its_loop_thread_sets():
    fut = Future()
    got = []
    async with anyio.create_task_group() as tg:
        tg.start_soon(waits_for, fut, got)
        await anyio.wait_all_tasks_blocked()
        fut.set_result(5)
    assert got == [5]


@on_every_loop
async def test_await_of_a_done_future_returns_its_value():
    fut = Future()
    fut.set_result(5)
    assert await fut == await fut == 5


@on_every_loop
async def test_await_raises_the_same_error_object():
    error = ValueError("foo")
    fut, done = Future(), Future()
    done.set_exception(error)
    with pytest.raises(ValueError, match="foo") as caught:
        await done
    assert caught.value is error
    async with anyio.create_task_group() as tg:
        tg.start_soon(on_a_thread, fut.set_exception, error)
        with pytest.raises(ValueError, match="foo") as caught:
            await fut
    assert caught.value is error


@on_every_loop
async def test_await_of_a_failed_child_raises_its_callback_error():
    fut = Future()
    child = fut.then(lambda f: f.value()["missing"])
    async with anyio.create_task_group() as tg:
        tg.start_soon(on_a_thread, fut.set_result, {})
        with pytest.raises(KeyError, match="missing") as caught:
            await child
    assert isinstance(caught.value, CallbackError)


@on_every_loop
async def test_await_raises_stop_iteration_as_runtime_error():
    fut = Future()
    fut.set_exception(StopIteration(3))
    with pytest.raises(RuntimeError, match="StopIteration"):
        await fut


@on_every_loop
async def test_any_number_of_tasks_await_one_future():
    fut = Future()
    got = []
    async with anyio.create_task_group() as tg:
        for _ in range(500):
            tg.start_soon(waits_for, fut, got)
        await anyio.wait_all_tasks_blocked()
        assert "waiters=500" in repr(fut)
        await on_a_thread(fut.set_result, 5)
    assert got == [5] * 500


@on_every_loop
async def test_cancelled_task_leaves_future_and_other_waiters_alone():
    fut = Future()
    got = []
    async with anyio.create_task_group() as tg:
        tg.start_soon(waits_for, fut, got)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as cancelled:
                for _ in range(10):
                    cancelled.start_soon(waits_for, fut, got)
                await anyio.wait_all_tasks_blocked()
                assert "waiters=11" in repr(fut)
                scope.cancel()
        assert repr(fut) == "<Future pending waiters=1 callbacks=0>"
        await on_a_thread(fut.set_result, 5)
    assert got == [5]


@on_every_loop
async def test_await_that_times_out_leaves_no_waiter_behind():
    fut = Future()
    with pytest.raises(TimeoutError):
        with anyio.fail_after(0.001):
            await fut
    with anyio.move_on_after(0.001) as scope:
        await fut
    assert scope.cancelled_caught
    assert repr(fut) == "<Future pending waiters=0 callbacks=0>"


@on_every_loop
async def test_value_is_not_lost_to_a_scope_cancelled_afterwards():
    fut, got = Future(), []
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tg:
            tg.start_soon(waits_for, fut, got)
            await anyio.wait_all_tasks_blocked()
            fut.set_result(5)
            scope.cancel()
    assert got == [5]


@on_every_loop
async def test_task_cancelled_after_completion_is_cancelled_once():
    for _ in range(200):
        fut = Future()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tg:
                tg.start_soon(waits_for, fut, [])
                await anyio.wait_all_tasks_blocked()
                async with alongside(lambda fut=fut: fut.set_result(5)):
                    scope.cancel()
        assert await fut == 5


@on_every_loop
async def test_the_loop_runs_while_a_task_awaits():
    fut = Future()
    turns = 0
    async with anyio.create_task_group() as tg:
        tg.start_soon(waits_for, fut, [])
        for _ in range(100):
            await anyio.lowlevel.checkpoint()
            turns += 1
        assert not fut.done()
        fut.set_result(None)
    assert turns == 100


@on_every_loop
async def test_a_future_completed_from_a_finaliser_wakes_its_tasks():
    fut = Future()

    class Finalised:
        def __del__(self):
            fut.set_result("finalised")

    got = []
    async with anyio.create_task_group() as tg:
        tg.start_soon(waits_for, fut, got)
        await anyio.wait_all_tasks_blocked()
        Finalised()
    assert got == ["finalised"]


@on_every_loop
async def test_await_never_misses_a_concurrent_completion():
    for _ in range(100):
        futures = [Future() for _ in range(50)]
        async with alongside(lambda futures=futures: [fut.set_result(5) for fut in futures]):
            with anyio.fail_after(PATIENCE):
                assert [await fut for fut in futures] == [5] * 50


def test_loops_of_all_kinds_in_several_threads_await_one_future():
    fut = Future()
    got = []
    started = threading.Semaphore(0)

    def run(backend, options):
        async def main():
            async with anyio.create_task_group() as tg:
                for _ in range(20):
                    tg.start_soon(waits_for, fut, got)
                await anyio.wait_all_tasks_blocked()
                started.release()

        anyio.run(main, backend=backend, backend_options=options)

    kinds = [
        ("asyncio", {}),
        ("asyncio", {"use_uvloop": True}),
        ("trio", {}),
        ("asyncio", {}),
        ("trio", {}),
    ]
    with running(*[lambda kind=kind: run(*kind) for kind in kinds]):
        for _ in kinds:
            assert started.acquire(timeout=PATIENCE)
        assert "waiters=100" in repr(fut)
        fut.set_result(5)
    assert got == [5] * 100


def test_await_outside_any_loop_raises_a_clear_error():
    for fut in (Future(), done := Future()):
        if fut is done:
            fut.set_result(5)
        coroutine = asyncio.wait_for(fut, 1)
        coroutine.close()
        with pytest.raises(RuntimeError, match=r"no asyncio, uvloop or trio event loop.*wait\(\)"):
            fut.__await__().send(None)
    with pytest.raises(RuntimeError, match=r"as_asyncio\(\) makes a future of the running asyncio"):
        Future().as_asyncio()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_completion_after_a_loop_ended_reaches_other_waiters(backend):
    fut = Future()
    got = []

    async def main():
        with contextlib.suppress(TimeoutError):
            with anyio.fail_after(0.01):
                await fut

    anyio.run(main, backend=backend)

    def abandoned():
        loop = asyncio.new_event_loop()
        task = loop.create_task(waits_for(fut, got))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()  # with a task pending
        return task

    task = abandoned()
    assert "waiters=1" in repr(fut)

    async def survivor():
        async with anyio.create_task_group() as tg:
            tg.start_soon(waits_for, fut, got)
            await anyio.wait_all_tasks_blocked()
            await on_a_thread(fut.set_result, 5)

    anyio.run(survivor, backend=backend)
    assert got == [5]
    assert not task.done()
    task.get_coro().close()  # or asyncio logs that the task was destroyed pending
    task._log_destroy_pending = False


def test_loop_closed_during_completions_loses_no_completion():
    for _ in range(30):
        futures = [Future() for _ in range(200)]

        async def main(futures=futures):
            tasks = [asyncio.ensure_future(waits_for(fut, [])) for fut in futures]
            await tasks[20]

        with running(lambda futures=futures: [fut.set_result(None) for fut in futures]):
            asyncio.run(main())
        assert all(fut.done() for fut in futures)

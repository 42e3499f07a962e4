"""Tasks as futures: ``start_soon``, and ``as_future`` of anyio's objects."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import gc
import inspect
import logging
import sys
import threading
import traceback
import warnings
import weakref

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
import trio.testing
import uvloop
from anyio.from_thread import start_blocking_portal

from torchfut_aio import (
    CancelledError,
    Future,
    _core,
    as_completed,
    as_future,
    gather,
    start_soon,
)

from .explorer import interrupts
from .loops import on_asyncio, on_every_loop
from .threads import PATIENCE, alongside, needs_gil, running, until

on_a_thread = anyio.to_thread.run_sync

# For tests that end a loop, or run one in another thread.
each_loop = pytest.mark.parametrize(
    "loop",
    [
        pytest.param({"backend": "asyncio"}, id="asyncio"),
        pytest.param({"backend": "asyncio", "backend_options": {"use_uvloop": True}}, id="uvloop"),
        pytest.param({"backend": "trio"}, id="trio"),
    ],
)
each_asyncio_loop = pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
in_either_group = pytest.mark.parametrize("kind", ["anyio", "native"])


def task_group(kind):
    """Return a task group of anyio, or of the loop's own library."""
    if kind == "anyio":
        return anyio.create_task_group()
    return trio.open_nursery() if trio.lowlevel.in_trio_run() else asyncio.TaskGroup()


class Stop(Exception):
    pass


async def double(x):
    await anyio.lowlevel.checkpoint()
    return 2 * x


async def fails(error):
    await anyio.lowlevel.checkpoint()
    raise error


async def fails_at_once(error):
    raise error


async def own_name():
    return anyio.get_current_task().name


async def waits_for(event):
    await event.wait()
    return "waited"


def ends_with(error):
    """Expect this error, alone or in an exception group."""
    return pytest.RaisesGroup(
        pytest.RaisesExc(type(error), check=lambda caught: caught is error),
        allow_unwrapped=True,
        flatten_subgroups=True,
    )


def is_cancelled(fut):
    return fut.done() and type(fut.exception()) is CancelledError


def pending_futures():
    return [fut for fut in gc.get_objects() if type(fut) is Future and not fut.done()]


# -------------------------------------------------------------------------- start_soon


@on_every_loop
@in_either_group
async def test_start_soon_returns_a_future_of_the_result(kind):
    async with task_group(kind) as tg:
        futures = [start_soon(tg, double, n) for n in range(10)]
        assert all(type(fut) is Future and not fut.done() for fut in futures)
        assert await futures[3] == 6
    assert [fut.value() for fut in futures] == [2 * n for n in range(10)]


@on_every_loop
async def test_threads_can_wait_for_a_task():
    release, got = anyio.Event(), []
    async with anyio.create_task_group() as tg:
        fut = start_soon(tg, waits_for, release)
        async with alongside(*[lambda: got.append(fut.wait(PATIENCE))] * 3):
            release.set()
    assert got == ["waited"] * 3


@on_every_loop
async def test_then_chains_a_callback_to_a_task():
    async with anyio.create_task_group() as tg:
        child = start_soon(tg, double, 5).then(lambda fut: fut.value() + 1)
        assert await child == 11


@on_every_loop
@in_either_group
async def test_task_is_named_after_its_function_or_the_name_argument(kind):
    async with task_group(kind) as tg:
        assert await start_soon(tg, own_name) == f"{__name__}.own_name"
        assert await start_soon(tg, own_name, name="mine") == "mine"
        assert await start_soon(tg, own_name, name=7) == "7"
        nameless = functools.partial(own_name)
        assert await start_soon(tg, nameless) == f"{__name__}.own_name"


@on_every_loop
@in_either_group
async def test_task_error_fails_the_future_and_not_the_group(kind):
    release, error = anyio.Event(), Stop()
    async with task_group(kind) as tg:
        other = start_soon(tg, waits_for, release)
        failed = start_soon(tg, fails, error)
        with pytest.raises(Stop) as caught:
            await failed
        assert caught.value is error
        assert not other.done()
        release.set()
    assert other.value() == "waited"


@on_every_loop
@in_either_group
async def test_traceback_of_a_task_starts_in_its_function(kind):
    async with task_group(kind) as tg:
        fut = start_soon(tg, fails, Stop())
    for _ in range(3):
        with pytest.raises(Stop):
            await fut
        frames = traceback.extract_tb(fut.exception().__traceback__)
        assert [frame.name for frame in frames] == ["fails"]


@on_every_loop
@in_either_group
@pytest.mark.parametrize("outcome", ["result", "error", "cancellation"])
async def test_future_of_a_task_is_freed_without_the_collector(kind, outcome):
    with anyio.CancelScope() as scope:
        gc.disable()
        try:
            async with task_group(kind) as tg:
                if outcome == "result":
                    fut = start_soon(tg, double, 1)
                elif outcome == "error":
                    fut = start_soon(tg, fails, Stop())
                else:
                    fut = start_soon(tg, anyio.sleep_forever)
                    await anyio.wait_all_tasks_blocked()
                    scope.cancel()
        finally:
            ref = weakref.ref(fut)
            assert fut.done()
            del fut
            try:
                assert ref() is None
            finally:
                gc.enable()


@each_loop
@in_either_group
@pytest.mark.parametrize("kind_of_error", [KeyboardInterrupt, SystemExit])
def test_system_exit_does_not_keep_the_future_of_its_task(loop, kind, kind_of_error, no_collector):
    error = kind_of_error("enough")
    futures = []

    async def main():
        async with task_group(kind) as tg:
            futures.append(start_soon(tg, fails, error))

    with ends_with(error):
        anyio.run(main, **loop)
    ref = weakref.ref(futures[0])
    assert futures.pop().exception() is error
    assert ref() is None


@each_loop
@in_either_group
@pytest.mark.parametrize("kind_of_error", [KeyboardInterrupt, SystemExit])
def test_system_exit_fails_the_future_and_leaves_the_group(loop, kind, kind_of_error, collected):
    error = kind_of_error("enough")
    futures = []

    async def main():
        with anyio.move_on_after(PATIENCE / 2):
            async with task_group(kind) as tg:
                futures.append(start_soon(tg, anyio.sleep_forever))
                await anyio.wait_all_tasks_blocked()
                futures.append(start_soon(tg, fails, error))
                futures.append(start_soon(tg, anyio.sleep_forever))

    with ends_with(error):
        anyio.run(main, **loop)
    collected()  # so that asyncio logs it here, and not during another test
    bystander, failed, unstarted = futures
    assert failed.exception() is error
    assert is_cancelled(bystander)
    assert is_cancelled(unstarted)


# ------------------------------------------------------------------------ cancellation


@on_every_loop
@in_either_group
async def test_cancelled_group_leaves_no_future_pending(kind):
    cleaned = []

    async def cleans_up():
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.001)
                cleaned.append(True)

    with anyio.CancelScope() as scope:
        async with task_group(kind) as tg:
            asleep = start_soon(tg, anyio.sleep_forever)
            cleaning = start_soon(tg, cleans_up)
            await anyio.wait_all_tasks_blocked()
            unstarted = start_soon(tg, anyio.sleep_forever)
            scope.cancel()
    assert cleaned == [True]
    assert is_cancelled(asleep)
    assert is_cancelled(cleaning)
    assert is_cancelled(unstarted)


@on_every_loop
async def test_shielded_task_keeps_its_result_despite_cancellation():
    async def stubborn():
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.001)
        return "saved"

    async with anyio.create_task_group() as tg:
        fut = start_soon(tg, stubborn)
        await anyio.wait_all_tasks_blocked()
        tg.cancel_scope.cancel()
    assert fut.value() == "saved"


@on_asyncio
@in_either_group
@pytest.mark.parametrize("why", [(), ("because",)], ids=["silently", "with a message"])
async def test_cancelled_error_includes_the_message_of_asyncio_cancel(kind, why):
    async with task_group(kind) as tg:
        fut = start_soon(tg, anyio.sleep_forever, name="sleeper")
        await anyio.wait_all_tasks_blocked()
        [task] = [task for task in asyncio.all_tasks() if task.get_name() == "sleeper"]
        task.cancel(*why)
        with pytest.raises(concurrent.futures.CancelledError) as caught:
            await fut
    assert caught.value.args == (": ".join(("sleeper was cancelled", *why)),)


@on_asyncio
async def test_task_cancelled_before_its_first_step_cancels_its_future():
    async with asyncio.TaskGroup() as tg:
        fut = start_soon(tg, double, 1, name="unstarted")
        [task] = [task for task in asyncio.all_tasks() if task.get_name() == "unstarted"]
        task.cancel()
        del task
    assert is_cancelled(fut)


@on_asyncio
# anyio's task, which is in a cycle, never starts.
@pytest.mark.filterwarnings("ignore:coroutine '_run' was never awaited")
async def test_unstarted_anyio_task_cancels_its_future(collected):
    async with anyio.create_task_group() as tg:
        fut = start_soon(tg, double, 1, name="unstarted")
        [task] = [task for task in asyncio.all_tasks() if task.get_name() == "unstarted"]
        task.cancel()
        del task
    collected()
    assert is_cancelled(fut)


@on_asyncio
async def test_unstarted_task_kept_by_others_cancels_its_future():
    async with asyncio.TaskGroup() as tg:
        fut = start_soon(tg, double, 1, name="unstarted")
        [kept] = [task for task in asyncio.all_tasks() if task.get_name() == "unstarted"]
        kept.cancel()
    assert kept.cancelled()
    assert is_cancelled(fut)


@on_asyncio
async def test_group_aborted_before_a_first_step_fails_the_future():
    futures = []

    async def abort():
        async with asyncio.TaskGroup() as tg:
            futures.append(start_soon(tg, double, 1))
            raise Stop

    with pytest.RaisesGroup(Stop):
        await abort()
    assert is_cancelled(*futures)


@each_asyncio_loop
@pytest.mark.parametrize("started", [True, False])
def test_closing_a_loop_fails_the_futures_of_remaining_tasks(new_loop, started):
    async def main():
        group = asyncio.TaskGroup()
        await group.__aenter__()  # no __aexit__() follows
        fut = start_soon(group, anyio.sleep_forever)
        if started:
            await asyncio.sleep(0)
        return fut

    loop = new_loop()
    fut = loop.run_until_complete(main())
    errors = []

    def wait():
        with pytest.raises(concurrent.futures.CancelledError) as caught:
            fut.wait(PATIENCE)
        errors.append(caught.value)

    with running(wait), warnings.catch_warnings():
        # A task that never started: its coroutine was never awaited.
        warnings.simplefilter("default" if started else "ignore")
        until(lambda: "waiters=1" in repr(fut))
        loop.close()
        del loop
        gc.collect()
    assert errors == [fut.exception()]
    assert "sleep_forever was cancelled" in str(fut.exception())


# ------------------------------------------------------- completed by other code first


@on_every_loop
@in_either_group
@pytest.mark.parametrize("func", [waits_for, "raises"])
async def test_task_continues_when_others_complete_its_future(kind, func, caplog):
    release, ended = anyio.Event(), []

    async def task():
        await release.wait()
        ended.append(True)
        if func == "raises":
            raise Stop
        return "dropped"

    with caplog.at_level(logging.DEBUG, "torchfut_aio"):
        async with task_group(kind) as tg:
            fut = start_soon(tg, task)
            fut.set_result("mine")
            assert await fut == "mine"
            assert not ended
            release.set()
    assert ended == [True]
    assert fut.value() == "mine"
    assert not caplog.records


@on_every_loop
async def test_cancelled_task_with_an_inner_group_is_cancelled():
    async def in_group():
        async with anyio.create_task_group() as tg:
            tg.start_soon(anyio.sleep_forever)
            await anyio.sleep_forever()

    async with anyio.create_task_group() as tg:
        fut = start_soon(tg, in_group)
        await anyio.wait_all_tasks_blocked()
        tg.cancel_scope.cancel()
    assert fut.cancelled()


def test_cancelled_task_with_an_inner_nursery_is_cancelled():
    async def in_nursery():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await trio.sleep_forever()

    async def main():
        async with trio.open_nursery() as nursery:
            fut = start_soon(nursery, in_nursery)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        return fut

    assert trio.run(main).cancelled()


@on_every_loop
async def test_task_can_be_cancelled_after_others_complete_its_future():
    async with anyio.create_task_group() as tg:
        fut = start_soon(tg, anyio.sleep_forever)
        await anyio.wait_all_tasks_blocked()
        fut.set_exception(Stop("mine"))
        tg.cancel_scope.cancel()
    assert type(fut.exception()) is Stop


# --------------------------------------------------------------------------- bad input


@on_every_loop
@in_either_group
async def test_start_soon_refuses_and_closes_a_coroutine(kind):
    coroutine = double(1)
    async with task_group(kind) as tg:
        with pytest.raises(TypeError, match="not the coroutine of double"):
            start_soon(tg, coroutine)
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


@on_every_loop
@in_either_group
async def test_start_soon_refuses_objects_that_are_not_callable(kind):
    async with task_group(kind) as tg:
        with pytest.raises(TypeError, match="must be an async function, not an int"):
            start_soon(tg, 5)


def plain(x):
    return x


@on_every_loop
@in_either_group
async def test_non_async_function_fails_its_future_and_not_the_group(kind):
    async with task_group(kind) as tg:
        fut = start_soon(tg, plain, 5)
        with pytest.raises(TypeError, match=r"plain is not an async function.* returned an int"):
            await fut
        assert await start_soon(tg, double, 5) == 10


@on_every_loop
@in_either_group
async def test_wrong_arguments_fail_the_future_and_not_the_group(kind):
    async with task_group(kind) as tg:
        fut = start_soon(tg, double)
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            await fut


@pytest.mark.parametrize("group", [None, "a group", object(), asyncio])
def test_start_soon_refuses_objects_other_than_task_groups(group):
    with pytest.raises(TypeError, match="takes a task group of anyio"):
        start_soon(group, double, 1)


def test_start_soon_without_a_group_or_portal_raises_a_hint():
    with pytest.raises(TypeError, match=r"takes a task group .* BlockingPortal .*, not a function"):
        start_soon(double, 3)


@on_every_loop
@in_either_group
async def test_exited_group_refuses_tasks_and_leaves_no_future_pending(kind):
    async with task_group(kind) as tg:
        pass
    before = pending_futures()
    with pytest.raises(RuntimeError):
        start_soon(tg, double, 1)
    assert pending_futures() == before


@on_every_loop
async def test_anyio_group_not_entered_leaves_no_future_pending():
    before = pending_futures()
    with pytest.raises(RuntimeError, match="not active"):
        start_soon(anyio.create_task_group(), double, 1)
    assert pending_futures() == before


@on_asyncio
async def test_asyncio_group_not_entered_leaves_no_future_pending():
    before = pending_futures()
    with pytest.raises(RuntimeError, match="has not been entered"):
        start_soon(asyncio.TaskGroup(), double, 1)
    assert pending_futures() == before


# ------------------------------------------------------------------------------ portals


@each_loop
def test_threads_can_submit_to_a_portal_concurrently(loop):
    got = []
    with start_blocking_portal(**loop) as portal:

        def client():
            futures = [start_soon(portal, double, n) for n in range(50)]
            assert all(type(fut) is Future for fut in futures)
            got.append([fut.wait(PATIENCE) for fut in futures])

        with running(*[client] * 4):
            pass
    assert got == [[2 * n for n in range(50)]] * 4


@each_loop
def test_portal_task_error_is_unchanged_and_the_portal_survives(loop):
    error = Stop()
    with start_blocking_portal(**loop) as portal:
        with pytest.raises(Stop) as caught:
            start_soon(portal, fails, error).wait(PATIENCE)
        assert caught.value is error
        assert start_soon(portal, double, 1).wait(PATIENCE) == 2


@each_loop
def test_portal_task_is_named_after_its_function_or_the_argument(loop):
    with start_blocking_portal(**loop) as portal:
        assert start_soon(portal, own_name).wait(PATIENCE) == f"{__name__}.own_name"
        assert start_soon(portal, own_name, name="mine").wait(PATIENCE) == "mine"


@each_loop
def test_portal_that_cancels_its_tasks_leaves_no_future_pending(loop):
    with start_blocking_portal(**loop) as portal:
        futures = [start_soon(portal, anyio.sleep_forever) for _ in range(10)]
        portal.call(portal.stop, True)
    assert all(is_cancelled(fut) for fut in futures)


@each_loop
def test_stopping_portal_finishes_its_remaining_tasks(loop):
    release = threading.Event()

    async def task():
        await on_a_thread(release.wait)
        return "finished"

    with start_blocking_portal(**loop) as portal:
        fut = start_soon(portal, task)
        portal.call(portal.stop)
        assert not fut.done()
        release.set()
    assert fut.value() == "finished"


@each_loop
def test_stopped_portal_refuses_and_leaves_no_future_pending(loop):
    with start_blocking_portal(**loop) as portal:
        pass
    before = pending_futures()
    with pytest.raises(RuntimeError, match="not running"):
        start_soon(portal, double, 1)
    assert pending_futures() == before


@each_loop
def test_loop_can_submit_to_its_own_portal(loop):
    with start_blocking_portal(**loop) as portal:

        async def main():
            return await start_soon(portal, double, 1)

        assert portal.call(main) == 2


@each_loop
def test_loops_can_submit_to_each_other_at_once(loop, nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()
    both = threading.Barrier(2)

    async def ask(other):
        both.wait(PATIENCE)  # both block until each is about to submit to the other
        return await gather([start_soon(other, double, n) for n in range(20)])

    with start_blocking_portal(**loop) as first, start_blocking_portal(**loop) as second:
        answers = [start_soon(first, ask, second), start_soon(second, ask, first)]
        for answer in answers:
            assert answer.wait(PATIENCE) == [2 * n for n in range(20)]


@each_loop
def test_blocked_loop_does_not_delay_calls_to_another_portal(loop, nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()

    async def block():
        assert released.wait(PATIENCE)

    async def main(busy, idle):
        held = start_soon(busy, block)
        late = start_soon(busy, double, 1)
        assert await start_soon(idle, double, 2) == 4
        released.set()
        await held
        return await late

    released = threading.Event()
    with start_blocking_portal(**loop) as busy, start_blocking_portal(**loop) as idle:
        with start_blocking_portal(**loop) as portal:
            assert portal.call(main, busy, idle) == 2


@each_loop
def test_submission_from_a_loop_to_a_stopped_portal_fails(loop):
    with start_blocking_portal(**loop) as portal:
        pass

    async def main():
        with pytest.raises(RuntimeError, match="not running"):
            await start_soon(portal, double, 1)
        return True

    with start_blocking_portal(**loop) as running:
        assert running.call(main)


@each_loop
def test_start_soon_on_a_portal_refuses_non_async_functions(loop):
    coroutine = double(1)
    with start_blocking_portal(**loop) as portal:
        with pytest.raises(TypeError, match="not the coroutine"):
            start_soon(portal, coroutine)
        with pytest.raises(TypeError, match="must be an async function, not an int"):
            start_soon(portal, 5)
        with pytest.raises(TypeError, match=r"plain is not an async function"):
            start_soon(portal, plain, 5).wait(PATIENCE)
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


@needs_gil("anyio's portal may block for ever when it stops")
@each_loop
@pytest.mark.parametrize("cancel", [True, False])
# anyio's own on trio: the group may close between the portal's check and the start.
@pytest.mark.filterwarnings("ignore:coroutine 'BlockingPortal._call_func' was never awaited")
def test_futures_of_a_stopping_portal_all_complete(loop, cancel):
    for _ in range(20):
        futures = []
        with start_blocking_portal(**loop) as portal:

            def client():
                try:
                    while True:
                        futures.append(start_soon(portal, double, 5))
                except RuntimeError:  # the portal has stopped
                    return

            with running(client, client):
                until(lambda: len(futures) > 20)
                portal.call(portal.stop, cancel)
        assert all(is_cancelled(fut) or fut.value() == 10 for fut in futures)
    gc.collect()  # collects anyio's coroutine here, and not in a later test


# ------------------------------------------------------- as_future of anyio's objects


def finished(outcome):
    """Return a done anyio.Future: a value, an error, or None for a cancellation."""
    source = anyio.Future()
    complete(source, outcome)
    return source


def complete(source, outcome):
    if outcome is None:
        source.cancel()
    elif isinstance(outcome, BaseException):
        source.exception = outcome
    else:
        source.return_value = outcome


@each_loop
def test_callback_raising_system_exit_does_not_end_the_loop(loop):
    async def main():
        fut = as_future(anyio.Future())
        fut.add_done_callback(lambda fut: sys.exit("enough"))
        await anyio.wait_all_tasks_blocked()
        return fut

    assert is_cancelled(anyio.run(main, **loop))


@on_every_loop
async def test_a_task_handle_is_adopted():
    release = anyio.Event()
    async with anyio.create_task_group() as tg:
        handle = tg.start_soon(waits_for, release)
        fut = as_future(handle)
        await anyio.wait_all_tasks_blocked()
        assert not fut.done()
        release.set()
        assert await fut == "waited"
    assert as_future(handle).wait(timeout=0) == "waited"


@on_every_loop
async def test_failed_task_handle_passes_on_its_error_unchanged():
    error = Stop()
    adopted = []

    async def group():
        async with anyio.create_task_group() as tg:
            handle = tg.start_soon(fails, error)
            adopted.extend([handle, as_future(handle)])

    with pytest.RaisesGroup(Stop):
        await group()
    handle, fut = adopted
    with pytest.raises(Stop) as caught:
        await fut
    assert caught.value is as_future(handle).exception() is error


@on_every_loop
async def test_cancelled_task_handle_cancels_its_adopted_future():
    async with anyio.create_task_group() as tg:
        handle = tg.start_soon(anyio.sleep_forever)
        fut = as_future(handle)
        await anyio.wait_all_tasks_blocked()
        handle.cancel()
    with pytest.raises(CancelledError, match="was cancelled"):
        await fut
    assert is_cancelled(as_future(handle))


@on_every_loop
async def test_anyio_future_is_adopted():
    for outcome, error in [("value", None), (Stop("foo"), Stop), (None, CancelledError)]:
        source = anyio.Future()
        fut = as_future(source)
        await anyio.wait_all_tasks_blocked()
        assert not fut.done()
        complete(source, outcome)
        for made in (fut, as_future(source)):
            if error is None:
                assert await made == outcome
            else:
                with pytest.raises(error) as caught:
                    await made
                assert caught.value is outcome or outcome is None


@on_every_loop
async def test_finished_task_handle_is_adopted_as_done():
    assert as_future(finished("value")).value() == "value"
    assert type(as_future(finished(Stop())).exception()) is Stop
    assert is_cancelled(as_future(finished(None)))


@on_every_loop
async def test_pending_anyio_source_is_adopted_once():
    source = anyio.Future()
    tasks = len(anyio.get_running_tasks())
    fut = as_future(source)
    assert all(as_future(source) is fut for _ in range(100))
    assert as_future(source, devices=["cpu:0"]) is not fut
    await anyio.wait_all_tasks_blocked()
    assert len(anyio.get_running_tasks()) <= tasks + 2
    source.return_value = 5
    assert await fut == 5


@on_every_loop
async def test_source_reusing_an_id_is_not_mistaken_for_an_earlier_one():
    for n in range(100):
        source = anyio.Future()
        fut = as_future(source)
        source.return_value = n
        assert await fut == n
        del source


@on_every_loop
async def test_thread_can_wait_for_an_adopted_anyio_future():
    source, got = anyio.Future(), []
    fut = as_future(source)
    async with alongside(lambda: got.append(fut.wait(PATIENCE))):
        source.return_value = 5
    assert got == [5]


@on_every_loop
async def test_adopted_anyio_future_can_be_completed_by_others(caplog):
    source = anyio.Future()
    fut = as_future(source)
    fut.set_result("mine")
    source.return_value = "late"
    await anyio.wait_all_tasks_blocked()
    assert fut.value() == "mine"
    assert not caplog.records


@each_loop
@pytest.mark.parametrize("kind_of_error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("function", [fails, fails_at_once])
def test_task_handle_raising_system_exit_ends_the_program_once(
    loop, kind_of_error, function, no_collector
):
    error = kind_of_error("enough")
    adopted = []

    async def main():
        async with anyio.create_task_group() as tg:
            adopted.append(as_future(tg.start_soon(function, error)))

    with ends_with(error):
        anyio.run(main, **loop)
    assert adopted[0].exception() is error


@each_loop
@pytest.mark.parametrize("kind_of_error", [KeyboardInterrupt, SystemExit])
def test_adopting_a_system_exit_does_not_end_the_loop(loop, kind_of_error):
    error = kind_of_error("enough")

    async def main():
        source = anyio.Future()
        fut = as_future(source)
        await anyio.wait_all_tasks_blocked()
        source.exception = error
        await anyio.wait_all_tasks_blocked()
        return fut

    assert anyio.run(main, **loop).exception() is error


def test_pending_anyio_source_is_refused_without_a_loop():
    with pytest.raises(RuntimeError, match="event loop"):
        as_future(anyio.Future())


@each_loop
def test_pending_anyio_source_is_refused_in_another_thread(loop):
    async def main():
        source = anyio.Future()
        with pytest.raises(RuntimeError, match="event loop"):
            await on_a_thread(as_future, source)

    anyio.run(main, **loop)


@each_loop
def test_task_handle_is_refused_without_a_running_loop(loop):
    handles = []

    async def main():
        async with anyio.create_task_group() as tg:
            handles.append(tg.start_soon(double, 5))
            cancelled = tg.start_soon(anyio.sleep_forever)
            handles.append(cancelled)
            await anyio.wait_all_tasks_blocked()
            cancelled.cancel()
        with pytest.RaisesGroup(Stop):
            async with anyio.create_task_group() as tg:
                handles.append(tg.start_soon(fails, Stop("foo")))

    anyio.run(main, **loop)
    for handle in handles:  # anyio does not know their outcome either
        with pytest.raises(RuntimeError, match="in the thread of its event loop"):
            as_future(handle)


@each_loop
@pytest.mark.parametrize("started", [True, False])
def test_adopted_anyio_future_is_done_when_its_loop_has_ended(loop, started, no_collector):
    async def main():
        futures = as_future(anyio.Future()), as_future(anyio.Future())
        if started:
            await anyio.wait_all_tasks_blocked()
        return futures

    futures = anyio.run(main, **loop)
    assert all(is_cancelled(fut) for fut in futures)


@each_asyncio_loop
def test_adopted_anyio_future_is_done_when_its_loop_is_closed(new_loop):
    async def main():
        fut = as_future(anyio.Future())
        await asyncio.sleep(0)
        return fut

    loop = new_loop()
    fut = loop.run_until_complete(main())
    loop.close()
    del loop
    gc.collect()
    assert is_cancelled(fut)


# --------------------------------------------------------------- futures within task groups


async def tries(fut, seconds, into):
    with anyio.move_on_after(seconds):
        into.append(await fut)


@on_every_loop
@in_either_group
async def test_tasks_that_time_out_leave_the_future_unchanged(kind):
    fut, got = Future(), []
    async with task_group(kind) as tg:
        timed_out = [start_soon(tg, tries, fut, 0.001, got) for _ in range(10)]
        patient = start_soon(tg, tries, fut, PATIENCE, got)
        await gather(timed_out)
        assert repr(fut) == "<Future pending waiters=1 callbacks=0>"
        await on_a_thread(fut.set_result, 5)
        await patient
    assert got == [5]


@on_every_loop
@in_either_group
async def test_as_completed_in_a_cancelled_group_leaves_no_callback(kind):
    futures, got = [Future() for _ in range(10)], []

    async def consume():
        async for fut in as_completed(futures):
            got.append(fut)

    with anyio.CancelScope() as scope:
        async with task_group(kind) as tg:
            consumer = start_soon(tg, consume)
            await anyio.wait_all_tasks_blocked()
            for fut in futures[:5]:
                fut.set_result(None)
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
    assert got == futures[:5]
    assert is_cancelled(consumer)
    assert [repr(fut) for fut in futures[5:]] == ["<Future pending waiters=0 callbacks=0>"] * 5


@on_every_loop
async def test_as_completed_can_feed_a_memory_object_stream():
    futures = [Future() for _ in range(20)]
    send, receive = anyio.create_memory_object_stream(2)

    async def feed():
        async with send:
            async for fut in as_completed(futures):
                await send.send(fut.value())

    async with anyio.create_task_group() as tg, receive:
        feeder = start_soon(tg, feed)
        async with alongside(lambda: [fut.set_result(n) for n, fut in enumerate(futures)]):
            with anyio.fail_after(PATIENCE):
                assert [n async for n in receive] == list(range(20))
        await feeder


@on_every_loop
async def test_gather_of_tasks_raises_the_first_error_and_cancels_none():
    release = anyio.Event()
    async with anyio.create_task_group() as tg:
        slow = start_soon(tg, waits_for, release)
        with pytest.raises(Stop):
            await gather([slow, start_soon(tg, fails, Stop())])
        assert repr(slow) == "<Future pending waiters=0 callbacks=0>"
        release.set()
    assert slow.value() == "waited"


@on_every_loop
@in_either_group
async def test_tasks_cancelled_while_finishing_complete_their_futures(kind):
    for n in range(50):
        with anyio.CancelScope() as scope:
            async with task_group(kind) as tg:
                futures = [start_soon(tg, anyio.sleep, 0) for _ in range(20)]
                for _ in range(n % 4):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()
        assert all(is_cancelled(fut) or fut.value() is None for fut in futures)


@pytest.mark.parametrize("way", ["keep", "fail"])
def test_interrupted_promise_completes_with_its_outcome(way):
    for interrupt in interrupts(_core):
        fut = Future()
        promise = _core.Promise(fut, "the promised future")
        with interrupt:
            promise.keep(5) if way == "keep" else promise.fail(ValueError("5"))
        entered = interrupt.raised is None or "_promise" not in str(interrupt.where)
        promise.end()
        until(fut.done)
        if entered:
            assert "5" in repr(fut)
        fut.exception()

"""asyncio and uvloop only: their combinators, debug mode, eager tasks, their pipe."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import re
import resource
import signal
import sys
import threading
import time
import weakref

import anyio
import pytest
import uvloop

from torchfut_aio import Future, as_completed
from torchfut_aio._loops import _asyncio
from torchfut_aio._loops._alarm import Alarm
from torchfut_aio._loops._asyncio import AsyncioLoop

from . import forks
from .loops import on_asyncio
from .threads import PATIENCE, alongside, running, until


async def value_of(fut):
    return await fut


async def pending(n=1):
    """Return futures that a thread completes with 0, 1, ... once the caller awaits."""
    futures = [Future() for _ in range(n)]
    asyncio.get_running_loop().run_in_executor(
        None, lambda: [fut.set_result(i) for i, fut in enumerate(futures)]
    )
    return futures


@on_asyncio
async def test_await_of_a_done_future_does_not_suspend():
    fut = Future()
    fut.set_result(5)
    others = []
    asyncio.get_running_loop().call_soon(others.append, "ran")
    assert await fut == 5
    assert others == []


@on_asyncio
async def test_asyncio_gather_accepts_futures():
    futures = await pending(3)
    assert await asyncio.gather(*futures) == [0, 1, 2]


@on_asyncio
async def test_asyncio_wait_for_accepts_futures():
    [fut] = await pending()
    assert await asyncio.wait_for(fut, PATIENCE) == 0
    never = Future()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(never, 0.001)
    assert repr(never) == "<Future pending waiters=0 callbacks=0>"


@on_asyncio
async def test_asyncio_shield_accepts_futures():
    fut = Future()
    task = asyncio.ensure_future(asyncio.shield(fut))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    fut.set_result(5)
    assert await asyncio.shield(fut) == 5


@on_asyncio
async def test_asyncio_timeout_and_task_group_work_with_futures():
    never = Future()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await never
    assert "waiters=0" in repr(never)
    futures = await pending(3)
    async with asyncio.TaskGroup() as tg:
        tasks = [tg.create_task(value_of(fut)) for fut in futures]
    assert [task.result() for task in tasks] == [0, 1, 2]


@on_asyncio
async def test_asyncio_as_completed_accepts_futures():
    futures = await pending(3)
    assert {await fut for fut in asyncio.as_completed(futures)} == {0, 1, 2}


@on_asyncio
async def test_anyio_gather_accepts_futures():
    gather = pytest.importorskip("anyio").gather
    futures = await pending(3)
    assert await gather(*map(value_of, futures)) == (0, 1, 2)


# ------------------------------------------------------------------------- as_asyncio


@on_asyncio
async def test_asyncio_wait_accepts_as_asyncio():
    futures = await pending(3)
    ours = [fut.as_asyncio() for fut in futures]
    assert all(asyncio.isfuture(fut) for fut in ours)
    done, left = await asyncio.wait(ours, timeout=PATIENCE)
    assert sorted(fut.result() for fut in done) == [0, 1, 2]
    assert not left


@on_asyncio
async def test_asyncio_wait_refuses_a_plain_future():
    fut = Future()
    with pytest.raises(TypeError, match=r"fut\.as_asyncio\(\)"):
        await asyncio.wait([fut])
    assert "callbacks=0" in repr(fut)


@on_asyncio
async def test_as_asyncio_of_a_done_future_is_done():
    fut, failed, cancelled, stopped = Future(), Future(), Future(), Future()
    fut.set_result(5)
    failed.set_exception(ValueError("foo"))
    cancelled.set_exception(asyncio.CancelledError("by me"))
    stopped.set_exception(StopIteration(3))
    assert fut.as_asyncio().result() == 5
    assert failed.as_asyncio().exception() is failed.exception()
    assert cancelled.as_asyncio().cancelled()
    twice = Future()
    twice.set_exception(asyncio.CancelledError("a", "b"))
    assert twice.as_asyncio().cancelled()
    assert isinstance(stopped.as_asyncio().exception().__cause__, StopIteration)


@on_asyncio
async def test_as_asyncio_carries_an_error():
    fut = Future()
    ours = fut.as_asyncio()
    async with alongside(lambda: fut.set_exception(ValueError("foo"))):
        with pytest.raises(ValueError, match="foo"):
            await ours


@on_asyncio
async def test_wait_for_zero_seconds_polls_as_asyncio():
    fut = Future()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(fut.as_asyncio(), 0)
    fut.set_result(5)
    assert await asyncio.wait_for(fut.as_asyncio(), 0) == 5


@on_asyncio
async def test_shielded_as_asyncio_leaves_no_waiter_behind():
    fut = Future()
    for _ in range(20):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(fut.as_asyncio()), 0.001)
    gc.collect()  # the last timeout is referenced by the exceptions that were raised
    assert "waiters=0" in repr(fut)
    shielded = asyncio.shield(fut.as_asyncio())
    fut.set_result(5)
    assert await shielded == 5


@on_asyncio
async def test_as_asyncio_completes_without_other_references():
    fut, called = Future(), []
    fut.as_asyncio().add_done_callback(lambda copy: called.append(copy.result()))
    tasks = [asyncio.create_task(value_of(fut.as_asyncio())) for _ in range(3)]
    both = asyncio.gather(fut.as_asyncio(), fut.as_asyncio())
    await asyncio.sleep(0)
    gc.collect()
    fut.set_result(5)
    assert await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE) == [5] * 3
    assert await both == [5, 5]
    assert called == [5]


@on_asyncio
async def test_done_as_asyncio_is_freed_without_the_collector():
    fut = Future()
    copy = fut.as_asyncio()
    copy.add_done_callback(lambda _: None)
    fut.set_result(5)
    assert await copy == 5
    await asyncio.sleep(0)  # the callback that resumed this task has a reference to it
    ref = weakref.ref(copy)
    gc.disable()
    try:
        del copy
        assert ref() is None
    finally:
        gc.enable()


@on_asyncio
async def test_cancelling_as_asyncio_leaves_the_future_unchanged():
    fut = Future()
    ours = fut.as_asyncio()
    assert "waiters=1" in repr(fut)
    ours.cancel()
    await asyncio.sleep(0)
    assert repr(fut) == "<Future pending waiters=0 callbacks=0>"
    fut.set_result(5)
    assert ours.cancelled()


# --------------------------------------------------------------------------- wake-ups


class Pipe:
    """Counts the calls that write to the pipe of the running loop."""

    def __init__(self, monkeypatch):
        self.writes = 0
        loop = asyncio.get_running_loop()
        real = loop.call_soon_threadsafe

        def counted(*args, **kwargs):
            self.writes += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)


@on_asyncio
async def test_completion_in_the_loop_thread_does_not_write_the_pipe(monkeypatch):
    pipe = Pipe(monkeypatch)
    futures = [Future() for _ in range(100)]
    tasks = [asyncio.ensure_future(value_of(fut)) for fut in futures]
    await asyncio.sleep(0)
    for fut in futures:
        fut.set_result(5)
    assert await asyncio.gather(*tasks) == [5] * 100
    assert pipe.writes == 0


@on_asyncio
async def test_completion_in_a_loop_callback_does_not_write_the_pipe(monkeypatch):
    pipe = Pipe(monkeypatch)
    futures = [Future() for _ in range(2)]
    tasks = [asyncio.ensure_future(value_of(fut)) for fut in futures]
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    loop.call_soon(futures[0].set_result, 5)
    loop.call_later(0.001, futures[1].set_result, 6)
    assert await asyncio.gather(*tasks) == [5, 6]
    assert pipe.writes == 0


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_signal_handler_wakes_a_sleeping_loop(runner):
    fut = Future()
    before = signal.signal(signal.SIGUSR1, lambda *args: fut.set_result("signal"))

    def interrupt():
        until(lambda: "waiters=1" in repr(fut))
        time.sleep(0.05)  # allow time for the loop to block: it cannot be observed
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    async def main():
        return await fut  # the signal is the only thing that can wake this loop in time

    try:
        with running(interrupt):
            assert runner(asyncio.wait_for(main(), PATIENCE)) == "signal"
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_completion_just_before_the_select_wakes_asyncio(monkeypatch):
    async def main():
        fut = Future()
        selector = asyncio.get_running_loop()._selector
        real = selector.select

        def select(timeout):
            if timeout is None or timeout > 1:  # it has decided to block
                monkeypatch.undo()
                fut.set_result("finaliser")  # as if the collector ran a finaliser here
            return real(timeout)

        monkeypatch.setattr(selector, "select", select)
        return await fut

    assert asyncio.run(asyncio.wait_for(main(), PATIENCE)) == "finaliser"


@on_asyncio
async def test_many_completions_cause_one_wake_up(monkeypatch, nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()
    pipe = Pipe(monkeypatch)
    futures = [Future() for _ in range(1000)]
    tasks = [asyncio.ensure_future(value_of(fut)) for fut in futures]
    await asyncio.sleep(0)
    # The loop does not run until all are done, so it cannot resume some of them in between.
    with running(lambda: [fut.set_result(5) for fut in futures]):
        pass
    assert await asyncio.gather(*tasks) == [5] * 1000
    assert pipe.writes == 1


async def burst(n=100):
    """Await futures that were all completed while the loop was blocked: one poll finds them."""
    futures = [Future() for _ in range(n)]
    tasks = [asyncio.ensure_future(value_of(fut)) for fut in futures]
    await asyncio.sleep(0)
    with running(lambda: [fut.set_result(5) for fut in futures]):
        pass
    await tasks[0]
    return tasks


@pytest.fixture
def next_poll(monkeypatch):
    """A function that makes a loop in a burst poll; until it is called, the loop does not."""
    monkeypatch.setattr(_asyncio, "LONGEST_PAUSE", 10 * PATIENCE)
    monkeypatch.setattr(_asyncio, "PAUSE_FOR_EACH", PATIENCE)
    alarms, real = [], AsyncioLoop.alarm

    def alarm(loop, function):
        alarms.append(real(loop, function))
        return alarms[-1]

    def fire():
        [burst_timer] = alarms
        burst_timer.set(0)

    monkeypatch.setattr(AsyncioLoop, "alarm", alarm)
    return fire


@on_asyncio
async def test_loop_polls_during_a_burst_without_being_woken(
    monkeypatch, nothing_blocks_a_loop, next_poll
):
    nothing_blocks_a_loop.deactivate()
    pipe = Pipe(monkeypatch)
    tasks = await burst()
    late = Future()
    waiting = asyncio.ensure_future(value_of(late))
    late_too = asyncio.ensure_future(value_of(late))
    await asyncio.sleep(0)
    with running(lambda: late.set_result(6)):
        pass
    next_poll()
    with anyio.fail_after(PATIENCE):
        assert await asyncio.gather(waiting, late_too, *tasks) == [6, 6] + [5] * 100
    assert pipe.writes == 1


@on_asyncio
async def test_loop_completions_are_not_delayed_during_a_burst(
    monkeypatch, nothing_blocks_a_loop, next_poll
):
    nothing_blocks_a_loop.deactivate()
    await asyncio.gather(*await burst())  # from now on the loop uses the long pause
    futures = [Future() for _ in range(10)]
    tasks = [asyncio.ensure_future(value_of(fut)) for fut in futures]
    await asyncio.sleep(0)
    pipe = Pipe(monkeypatch)
    for fut in futures:
        fut.set_result(5)
    with anyio.fail_after(PATIENCE):
        assert await asyncio.gather(*tasks) == [5] * 10
    assert pipe.writes == 0


@on_asyncio
async def test_loop_sleeps_after_a_burst(monkeypatch, nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()
    polls = 0
    real = AsyncioLoop.run_wake_up

    def run_wake_up(loop):
        nonlocal polls
        polls += 1
        real(loop)

    monkeypatch.setattr(AsyncioLoop, "run_wake_up", run_wake_up)
    for expected in (1, 2):  # the second is found by the timer
        await asyncio.gather(*await burst())
        await asyncio.sleep(0.05)
        assert polls == expected
    with anyio.fail_after(PATIENCE):  # it can be woken again
        assert await asyncio.gather(*await pending(2)) == [0, 1]


@on_asyncio
async def test_interrupted_pause_loses_no_other_waiter(monkeypatch, nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()
    futures, other = [Future() for _ in range(40)], Future()
    waiting = asyncio.ensure_future(value_of(other))
    await asyncio.sleep(0)
    for fut in futures[:30]:
        fut.set_result(5)

    def fails(alarm, seconds):
        monkeypatch.undo()
        with running(lambda: other.set_result(6)):  # it relies on the timer
            pass
        raise MemoryError

    monkeypatch.setattr(Alarm, "set_if_exact", fails)
    with pytest.raises(MemoryError):
        async for _ in as_completed(futures):
            pass
    assert await asyncio.wait_for(waiting, PATIENCE) == 6


@on_asyncio
async def test_burst_completes_when_no_files_can_be_opened(nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()
    await pending(1)  # opens the files that the executor and the pipe need
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        with anyio.fail_after(PATIENCE):
            assert await asyncio.gather(*await burst()) == [5] * 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_loops_leave_no_files_open_after_bursts(runner, nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()

    async def main():
        await asyncio.gather(*await burst())

    def files():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    runner(main())
    before = files()
    for _ in range(10):
        runner(main())
    assert files() <= before


# ----------------------------------------------------------- futures that a task waits for


async def completed_in_one_poll(*functions):
    """Start tasks that await a future each; return them when all futures are done."""
    futures = [Future() for _ in functions]
    tasks = [asyncio.ensure_future(function(fut)) for function, fut in zip(functions, futures)]
    await asyncio.sleep(0)
    with running(lambda: [fut.set_result(n) for n, fut in enumerate(futures)]):
        pass
    return tasks


@on_asyncio
async def test_tasks_resume_in_the_order_of_the_completions(nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()
    resumed = []

    async def wait(fut):
        resumed.append(await fut)

    await asyncio.gather(*await completed_in_one_poll(*[wait] * 50))
    assert resumed == list(range(50))


@on_asyncio
async def test_each_task_resumes_in_its_own_context(nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()
    number = contextvars.ContextVar("number", default=None)

    async def wait(fut):
        number.set(id(fut))
        await fut
        mine = number.get() == id(fut)
        number.set("changed after the await")
        return mine

    assert await asyncio.gather(*await completed_in_one_poll(*[wait] * 5)) == [True] * 5
    assert number.get() is None


@on_asyncio
@pytest.mark.parametrize("messages", [[], ["by me"], ["by me", "again"]])
async def test_cancelled_await_has_the_message_of_asyncio(messages):
    fut, said = Future(), []
    for awaited in (fut, asyncio.get_running_loop().create_future()):
        task = asyncio.ensure_future(value_of(awaited))
        await asyncio.sleep(0)
        assert {task.cancel(message) for message in messages or [None]} == {True}
        with pytest.raises(asyncio.CancelledError) as cancelled:
            await task
        said.append(cancelled.value.args)
    assert said[0] == said[1]
    assert "waiters=0" in repr(fut)


@on_asyncio
async def test_python_tasks_await_and_cancel_like_c_tasks():
    loop = asyncio.get_running_loop()
    futures = await pending(3)
    tasks = [asyncio.tasks._PyTask(value_of(fut), loop=loop) for fut in futures]
    assert [await task for task in tasks] == [0, 1, 2]
    fut = Future()
    task = asyncio.tasks._PyTask(value_of(fut), loop=loop)
    await asyncio.sleep(0)
    task.cancel("by me")
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert caught.value.args == ("by me",)
    assert "waiters=0" in repr(fut)


@on_asyncio
async def test_anyio_sees_a_waiting_task_as_blocked():
    fut = Future()
    async with anyio.create_task_group() as group:
        group.start_soon(value_of, fut)
        with anyio.fail_after(PATIENCE):
            await anyio.wait_all_tasks_blocked()
        assert "waiters=1" in repr(fut)
        fut.set_result(5)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_task_ending_the_loop_leaves_others_for_its_next_run(new_loop, kind, nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()

    async def stop(fut):
        await fut
        raise kind

    async def main():
        tasks[:] = await completed_in_one_poll(value_of, stop, value_of, value_of)
        return await value_of(never)

    never, tasks = Future(), []
    loop = new_loop()
    try:
        rest = loop.create_task(main())
        with pytest.raises(kind):
            loop.run_until_complete(rest)
        never.set_result("the rest")
        assert loop.run_until_complete(asyncio.wait_for(rest, PATIENCE)) == "the rest"
        assert [tasks[n].result() for n in (0, 2, 3)] == [0, 2, 3]
        assert isinstance(tasks[1].exception(), kind)
    finally:
        loop.close()


@pytest.mark.parametrize("kind", [asyncio.Task, asyncio.tasks._PyTask])
def test_task_can_run_its_loop_while_others_are_to_resume(kind, nothing_blocks_a_loop):
    # From Python 3.14 on, tasks written in C and in Python are kept in different places.
    prefix = "_c" if kind is asyncio.Task else "_py"
    leave_task, enter_task = (
        getattr(asyncio.tasks, f"{prefix}_{name}") for name in ("leave_task", "enter_task")
    )
    # Python 3.11 has one dict and one function for both.
    current_task = getattr(asyncio.tasks, f"{prefix}_current_task", asyncio.current_task)
    nothing_blocks_a_loop.deactivate()

    async def runs_the_loop(fut):
        await fut
        loop, task = asyncio.get_running_loop(), current_task()
        leave_task(loop, task)  # like nest_asyncio
        if kind is asyncio.Task:
            with running(lambda: another.set_result(None)):
                pass  # schedules another wake-up
        while not tasks[-1].done():
            loop._run_once()
        enter_task(loop, task)
        return "ran"

    async def main():
        asyncio.get_running_loop().set_task_factory(lambda loop, coro: kind(coro, loop=loop))
        rest.append(asyncio.ensure_future(value_of(another)))
        tasks[:] = await completed_in_one_poll(value_of, runs_the_loop, value_of, value_of)
        return await asyncio.gather(*tasks)

    another, rest, tasks = Future(), [], []
    assert asyncio.run(asyncio.wait_for(main(), PATIENCE)) == [0, "ran", 2, 3]


@on_asyncio
async def test_cancelled_await_is_freed_without_the_collector():
    refs = []
    gc.disable()
    try:
        for _ in range(10):
            task = asyncio.ensure_future(value_of(Future()))
            refs.append(weakref.ref(task))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            del task
        await asyncio.sleep(0)
        assert [ref() for ref in refs] == [None] * 10
    finally:
        gc.enable()


@on_asyncio
async def test_anyio_sees_the_pending_cancellation_of_a_task():
    task = asyncio.ensure_future(value_of(Future()))
    await asyncio.sleep(0)
    [info] = [info for info in anyio.get_running_tasks() if info.id == id(task)]
    assert not info.has_pending_cancellation()
    task.cancel()
    assert info.has_pending_cancellation()
    await asyncio.wait([task])


# ------------------------------------------------------------------------------ modes


@on_asyncio
async def test_debug_mode_of_a_loop_accepts_awaits():
    asyncio.get_running_loop().set_debug(True)
    futures = await pending(20)
    assert await asyncio.gather(*futures) == list(range(20))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(Future(), 0.001)


@on_asyncio
@pytest.mark.parametrize("thread", ["of the loop", "another"])
async def test_debug_mode_logs_the_slow_task(caplog, nothing_blocks_a_loop, thread):
    nothing_blocks_a_loop.deactivate()
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    fut = Future()
    task = asyncio.create_task(value_of(fut), name="the slow one")
    await asyncio.sleep(0)
    loop.slow_callback_duration = -1.0  # every step counts as slow
    if thread == "another":
        with running(lambda: fut.set_result(5)):
            pass
    else:
        fut.set_result(5)
    assert await task == 5
    loop.slow_callback_duration = PATIENCE
    slow = [record.getMessage() for record in caplog.records]
    named = r"Executing <Task \w+ name='the slow one'"
    assert any(re.match(named, text) for text in slow), slow


SLOW_STEP_MONITOR = """
import asyncio

original, slow = asyncio.Handle._run, []

def watched(handle):
    callback = handle._callback
    begun = handle._loop.time()
    try:
        return original(handle)
    finally:
        if handle._loop.time() - begun > 0.05:
            task = getattr(callback, "__self__", None)
            slow.append(task.get_name() if isinstance(task, asyncio.Task) else repr(handle))

asyncio.Handle._run = watched
"""

SLOW_STEPS = """
async def wait(fut, is_slow):
    await fut
    if is_slow:
        time.sleep(0.06)

async def main(count):
    futures = [torchfut_aio.Future() for _ in range(count)]
    tasks = [asyncio.create_task(wait(f, n == 1), name=f"{n}") for n, f in enumerate(futures, 1)]
    await asyncio.sleep(0)
    thread = threading.Thread(target=lambda: [f.set_result(5) for f in futures])
    thread.start()
    await asyncio.gather(*tasks)
    thread.join()

asyncio.run(main(1))
asyncio.run(main(30))
print(slow)
"""

IMPORTS = "import asyncio, threading, time, torchfut_aio"


@pytest.mark.parametrize("first", ["the monitor", "this package"])
def test_handle_monitor_finds_the_slow_task(first):
    begin = [SLOW_STEP_MONITOR, IMPORTS] if first == "the monitor" else [IMPORTS, SLOW_STEP_MONITOR]
    printed = forks.output("\n".join([*begin, SLOW_STEPS]))
    assert printed.count("'1'") >= 2, printed  # on a busy machine other steps may be slow as well


@pytest.mark.skipif(sys.version_info < (3, 12), reason="new in Python 3.12")
@on_asyncio
async def test_eager_tasks_await_futures():
    def start_eagerly(loop, coro, **options):
        # uvloop 0.23 passes eager_start=None; asyncio's own factory then starts no task eagerly.
        return asyncio.Task(coro, loop=loop, eager_start=True)

    asyncio.get_running_loop().set_task_factory(start_eagerly)
    futures = await pending(20)
    done = Future()
    done.set_result("done")
    assert asyncio.ensure_future(value_of(done)).done()
    assert await asyncio.gather(*futures) == list(range(20))


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_package_does_not_keep_a_closed_loop(new_loop):
    loop = new_loop()
    fut = Future()
    loop.call_soon(fut.set_result, 5)
    assert loop.run_until_complete(value_of(fut)) == 5
    loop.close()
    ref = weakref.ref(loop)
    del loop
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_done_future_does_not_keep_the_loop_that_awaited_it(new_loop):
    loop = new_loop()
    fut = Future()
    task = loop.create_task(value_of(fut))
    loop.run_until_complete(asyncio.sleep(0))
    assert "waiters=1" in repr(fut)
    loop.call_soon(fut.set_result, 5)
    assert loop.run_until_complete(task) == 5
    loop.close()
    ref = weakref.ref(loop)
    del loop, task
    gc.collect()
    assert ref() is None


def test_loops_closed_before_a_completion_are_not_kept():
    refs = []
    for _ in range(20):
        loop = asyncio.new_event_loop()
        fut = Future()
        task = loop.create_task(value_of(fut))
        task._log_destroy_pending = False
        loop.run_until_complete(asyncio.sleep(0))
        with running(lambda fut=fut: fut.set_result(5)):
            pass
        loop.close()
        refs.append(weakref.ref(loop))
        del loop, task, fut
    gc.collect()
    assert sum(ref() is not None for ref in refs) <= 1


def test_exit_with_waiting_tasks_and_daemon_threads_is_clean():
    program = """
        import asyncio, threading
        from torchfut_aio import Future

        futures = [Future() for _ in range(20000)]
        never = Future()

        async def value_of(fut):
            return await fut

        def complete():
            for fut in futures:
                fut.set_result(None)

        async def main():
            waiting = [asyncio.ensure_future(value_of(fut)) for fut in [*futures, never]]
            threading.Thread(target=complete).start()
            await waiting[100]

        asyncio.run(main())
        threading.Thread(target=never.wait, daemon=True).start()
    """
    assert forks.output(program) == ""


@on_asyncio
async def test_as_completed_makes_one_waiter_for_each_wait(monkeypatch):
    waits, real = [], AsyncioLoop.waiter

    def waiter(loop):
        waits.append(loop)
        return real(loop)

    monkeypatch.setattr(AsyncioLoop, "waiter", waiter)
    futures = [Future() for _ in range(20)]
    event_loop = asyncio.get_running_loop()
    for n, fut in enumerate(futures):
        event_loop.call_later(0.001 * n, fut.set_result, n)
    assert {await fut async for fut in as_completed(futures)} == {*range(20)}
    assert len(waits) <= len(futures)

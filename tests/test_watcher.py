"""The event watcher: one a loop, driven by it, and thrifty."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import subprocess
import sys
import threading
from collections import deque

import anyio
import pytest
import torch
import trio
from hypothesis import given
from hypothesis import strategies as st

from torchfut_aio import Future, PollPolicy, set_poll_policy, statistics, synchronize
from torchfut_aio._devices import mark_stream
from torchfut_aio._devices._events import Mark
from torchfut_aio._devices._watcher import Wait, Watcher
from torchfut_aio._loops import _timer

from .accelerator import DEVICE, FIRST, NEW, completed_on
from .loops import on_asyncio, on_every_loop
from .threads import PATIENCE, running
from .waiting import Reader, looked, pending

pytestmark = pytest.mark.device


@pytest.fixture
def blocking_policy():
    before = set_poll_policy(PollPolicy(blocking=True))
    yield
    set_poll_policy(before)


def registered_with_the_loop():
    """What the running loop would wake up for, besides what it always has."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return trio.lowlevel.current_statistics().tasks_living
    if not hasattr(loop, "_selector"):
        return open_files()  # uvloop does not tell
    return len(loop._selector.get_map()), len(loop._scheduled)


def open_files():
    def is_open(number):
        try:
            return fcntl.fcntl(number, fcntl.F_GETFD) >= 0
        except OSError:
            return False

    return sum(map(is_open, range(1024)))


# -------------------------------------------------------------------------------- thrift


@on_every_loop
async def test_nothing_pending_is_nothing_scheduled_and_not_one_query(accelerator, producer):
    before = registered_with_the_loop()
    for _ in range(3):
        fut = completed_on(producer, accelerator, None)
        async with anyio.create_task_group() as tg:
            tg.start_soon(Reader(fut))
            await looked()
            assert registered_with_the_loop() != before
            accelerator.wake()
        await anyio.sleep(0.002)
        accelerator.reset_counters()
        assert registered_with_the_loop() == before
        await anyio.sleep(0.02)
        assert accelerator.counters()["event_queries"] == 0


@on_every_loop
async def test_a_look_is_one_query_a_stream_however_many_wait(accelerator):
    streams = [torch.Stream(FIRST) for _ in range(4)]
    futures = []
    for n in range(1000):
        futures.append(Future())
        with streams[n % 4]:
            tensor = torch.zeros(1, device=FIRST)
            accelerator.fill_after(tensor, n, PATIENCE)
            futures[-1].set_result(tensor)
    readers = [Reader(fut) for fut in futures]
    async with anyio.create_task_group() as tg:
        for reader in readers:
            tg.start_soon(reader)
        await pending(1000)
        accelerator.reset_counters()
        before = statistics()
        await looked(10)
        after = statistics()
        assert 0 < after.queries - before.queries <= 4 * (after.polls - before.polls)
        assert accelerator.counters()["event_queries"] <= after.queries - before.queries
        accelerator.wake()
    assert [reader.outcome.item() for reader in readers] == list(range(1000))
    # To find how many are done takes a few more: far fewer than there are.
    assert statistics().queries - after.queries < 4 * (statistics().polls - after.polls) + 200


@on_every_loop
async def test_events_are_neither_created_nor_destroyed_in_the_steady_state(
    accelerator, producer, consumer
):
    async def rounds(count):
        for _ in range(count):
            with producer, consumer:
                accelerator.sleep(0.0005)
            async with anyio.create_task_group() as tg:
                for _ in range(5):
                    tg.start_soon(synchronize, producer)
                    tg.start_soon(synchronize, consumer)

    await rounds(2)
    gc.collect()
    accelerator.reset_counters()
    await rounds(30)
    counted = accelerator.counters()
    assert counted["event_queries"] > 60
    assert counted["events_created"] == counted["events_destroyed"] == 0


def test_the_events_of_marks_are_reused(accelerator, producer):
    first = mark_stream(producer)
    event = first.event
    del first
    again = [mark_stream(producer) for _ in range(3)]
    assert sum(mark.event is event for mark in again) == 1
    assert len({id(mark.event) for mark in again}) == 3


@on_every_loop
async def test_a_loop_learns_how_long_waits_on_a_stream_take(accelerator, producer):
    for _ in range(30):
        with producer:
            accelerator.sleep(0.004)
        await synchronize(producer)
    before = statistics()
    for _ in range(20):
        with producer:
            accelerator.sleep(0.004)
        await synchronize(producer)
    learned = statistics()
    [interval] = learned.intervals.values()
    assert list(learned.intervals) == [(torch.device(FIRST), producer.stream_id)]
    assert 0.003 < interval < 0.02
    # Unlearned it takes over ten looks to get through 4 ms.
    assert (learned.polls - before.polls) / 20 < 8


def test_statistics_outside_of_a_loop_are_those_of_all_loops(accelerator, producer):
    async def main():
        with producer:
            accelerator.sleep(0.001)
        await synchronize(producer)
        return statistics()

    before = statistics()
    inside = [anyio.run(main, backend=backend) for backend in ("asyncio", "trio")]
    gc.collect()
    after = statistics()
    assert after.pending == before.pending
    assert after.polls - before.polls >= sum(s.polls for s in inside)
    assert after.hits - before.hits == sum(s.hits for s in inside) == 2


# ------------------------------------------------------------------ the order of marks


class Clock:
    """A stream whose marks are reached when the test says so."""

    def __init__(self):
        self.reached = 0
        self.queries = 0

    def mark(self, begun, ended=None, name=0):
        mark = object.__new__(Mark)
        mark._pool, mark.device, mark.stream = None, None, ("made up", name)
        mark.begun, mark.ended, mark.made = begun, ended or begun + 1, 0.0
        mark.event = Place(self, begun)
        return mark


class Place:
    def __init__(self, clock, at):
        self.clock, self.at = clock, at

    def query(self):
        self.clock.queries += 1
        return self.at < self.clock.reached


class Loop:
    """A loop that runs nothing by itself."""

    def __init__(self):
        self.soon = deque()

    def alarm(self, function):
        return self

    def set(self, seconds):
        pass

    def close(self):
        pass

    def call_soon(self, function):
        self.soon.append(function)


@given(st.permutations(range(30)), st.lists(st.integers(0, 29), min_size=1, max_size=6))
def test_whatever_the_order_of_the_waits_those_that_are_reached_are_notified_and_no_others(
    order, times
):
    clock, notified = Clock(), set()
    watcher = Watcher(Loop())
    for n in order:
        watcher.watch([clock.mark(2 * n)], Wait(lambda error, n=n: notified.add(n)))
    for time in sorted(times):
        clock.reached = 2 * time + 1
        before = clock.queries
        for lane in list(watcher._watched):
            lane.look_at = 0.0
        watcher.look()
        assert notified == set(range(time + 1))
        assert clock.queries - before <= 12
    assert watcher.pending == 30 - len(notified)


@given(st.data())
def test_marks_made_by_two_threads_at_once_are_each_asked_for_themselves(data):
    # Such marks overlap, and the stream may have got them in either order.
    spans = data.draw(
        st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)), min_size=1, max_size=12)
    )
    clock, notified = Clock(), set()
    watcher = Watcher(Loop())
    true_place = {}
    for n, (begun, length) in enumerate(spans):
        mark = clock.mark(100 * begun + n, 100 * (begun + length))
        place = data.draw(st.integers(mark.begun, mark.ended))
        mark.event = Place(clock, place)
        true_place[n] = place
        watcher.watch([mark], Wait(lambda error, n=n: notified.add(n)))
    for _ in range(10):
        clock.reached += 350
        for lane in list(watcher._watched):
            lane.look_at = 0.0
        watcher.look()
        assert all(true_place[n] < clock.reached for n in notified)
    clock.reached = 10_000
    while watcher.pending:
        for lane in list(watcher._watched):
            lane.look_at = 0.0
        watcher.look()
    assert notified == set(true_place)


# ------------------------------------------------------------------------------- policy


@on_every_loop
async def test_the_blocking_policy_polls_nothing_and_its_threads_end(
    accelerator, producer, blocking_policy
):
    def blockers():
        return [t for t in threading.enumerate() if t.name == "torchfut_aio blocker"]

    futures = [completed_on(producer, accelerator, None) for _ in range(10)]
    readers = [Reader(fut) for fut in futures]
    async with anyio.create_task_group() as tg:
        for reader in readers:
            tg.start_soon(reader)
        await pending(10)
        assert len(blockers()) == 1
        accelerator.reset_counters()
        await anyio.sleep(0.02)
        assert accelerator.counters()["event_queries"] == 0
        accelerator.wake()
    assert [reader.outcome.tolist() for reader in readers] == [NEW] * 10
    with anyio.fail_after(PATIENCE):
        while blockers():  # noqa: ASYNC110
            await anyio.sleep(0.01)


@on_every_loop
async def test_the_blocking_policy_tells_of_failed_kernels_and_lets_go_of_cancelled_waits(
    accelerator, producer, blocking_policy
):
    with producer:
        accelerator.sleep(PATIENCE)
    with anyio.move_on_after(0.01) as scope:
        await synchronize(producer)
    assert scope.cancelled_caught
    with producer:
        accelerator.fail("the kernel failed")
    reader = Reader(synchronize(producer))
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await pending(1)
        accelerator.wake()
    assert "the kernel failed" in str(reader.outcome)


@on_every_loop
async def test_a_policy_may_be_set_while_waits_are_pending(accelerator, producer, consumer):
    default = set_poll_policy(PollPolicy(blocking=True))
    try:
        blocked, polled = (completed_on(s, accelerator, None) for s in (producer, consumer))
        readers = [Reader(blocked), Reader(polled)]
        async with anyio.create_task_group() as tg:
            tg.start_soon(readers[0])
            await pending(1)
            set_poll_policy(default)
            tg.start_soon(readers[1])
            await pending(2)
            set_poll_policy(PollPolicy(blocking=True))
            await looked(1)
            accelerator.wake()
        assert [reader.outcome.tolist() for reader in readers] == [NEW, NEW]
    finally:
        set_poll_policy(default)


@on_every_loop
async def test_where_there_is_no_timerfd_the_timers_of_the_loop_serve(
    accelerator, producer, monkeypatch
):
    monkeypatch.setattr(_timer, "available", lambda: False)
    for _ in range(3):
        fut = completed_on(producer, accelerator, None)
        reader = Reader(fut)
        async with anyio.create_task_group() as tg:
            tg.start_soon(reader)
            await looked()
            accelerator.wake()
        assert reader.outcome.tolist() == NEW
        with anyio.move_on_after(0.01):
            await completed_on(producer, accelerator, None)
        accelerator.wake()


# ------------------------------------------------------------- loops and processes end


@on_asyncio
async def test_the_context_of_who_waits_first_is_not_kept(accelerator, producer):
    import contextvars
    import weakref

    class Payload:
        pass

    payload = Payload()
    variable = contextvars.ContextVar("variable")
    variable.set(payload)
    alive = weakref.ref(payload)
    first = asyncio.ensure_future(synchronize(producer))
    fut = completed_on(producer, accelerator, None)
    context = contextvars.copy_context()
    variable.set(None)
    task = asyncio.get_running_loop().create_task(_read(fut), context=context)
    await pending(1)
    second = asyncio.ensure_future(_read(fut))
    await pending(2)
    task.cancel()
    await asyncio.wait([task, first])
    del task, first, context, payload
    gc.collect()
    assert alive() is None
    accelerator.wake()
    assert (await second).tolist() == NEW


async def _read(fut):
    return await fut


@pytest.mark.parametrize("factory", ["asyncio", "uvloop"])
def test_loops_that_close_with_waits_pending_leave_no_file_behind(
    accelerator, producer, factory, collected
):
    import uvloop

    def run_one():
        loop = asyncio.new_event_loop() if factory == "asyncio" else uvloop.new_event_loop()

        async def wait():
            task = asyncio.ensure_future(_read(completed_on(producer, accelerator, None)))
            await pending(1)
            task.cancel()
            await asyncio.wait([task])
            lasting = asyncio.ensure_future(_read(completed_on(producer, accelerator, None)))
            lasting._log_destroy_pending = False
            await pending(1)

        loop.run_until_complete(wait())
        loop.close()

    run_one()
    collected()
    before = open_files()
    for _ in range(10):
        run_one()
    done = Future()
    done.set_result(None)
    asyncio.run(_read(done))  # the next loop that awaits clears up
    collected()
    assert open_files() <= before
    assert statistics().pending == 0


PROGRAM = """
import asyncio, gc, os, sys, threading, warnings
import torch, trio
from tests import simulated_device as sim
import torchfut_aio
from torchfut_aio import Future, PollPolicy, as_future, set_poll_policy, synchronize

def kernels():
    with torch.Stream("sim:0") as stream:
        sim.sleep(60)
    return stream

async def wait(stream):
    await synchronize(stream)

{}
"""


def program_ends(body, timeout=60):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM.format(body)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONWARNINGS": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.skipif(DEVICE != "sim", reason="written for the simulated device")
@pytest.mark.parametrize(
    "body",
    [
        "stream = kernels(); fut = as_future(stream)",
        "stream = kernels()\n"
        "async def main():\n"
        "    try: await asyncio.wait_for(synchronize(stream), 0.01)\n"
        "    except asyncio.TimeoutError: pass\n"
        "asyncio.run(main())",
        "stream = kernels()\n"
        "async def main():\n"
        "    task = asyncio.ensure_future(synchronize(stream))\n"
        "    await asyncio.sleep(0.01)\n"
        "asyncio.run(main())",
        "stream = kernels()\n"
        "async def main():\n"
        "    fut = as_future(stream)\n"
        "    await asyncio.sleep(0.01)\n"
        "asyncio.run(main())",
        "stream = kernels()\n"
        "async def main():\n"
        "    fut = as_future(stream)\n"
        "    with trio.move_on_after(0.01): await synchronize(stream)\n"
        "trio.run(main)",
        "stream = kernels()\n"
        "def other():\n"
        "    asyncio.run(wait(stream))\n"
        "threading.Thread(target=other, daemon=True).start()\n"
        "import time; time.sleep(0.1)",
    ],
    ids=["adopted", "timed out", "task left", "adopted on asyncio", "on trio", "daemon thread"],
)
def test_an_interpreter_exits_with_kernels_pending(accelerator, body):
    assert program_ends(body) == ""


@pytest.mark.skipif(DEVICE != "sim", reason="CUDA does not survive a fork")
def test_a_forked_child_is_not_troubled_by_what_its_parent_waits_for(accelerator):
    told = program_ends("""
stream = kernels()
adopted = as_future(stream)
async def main():
    task = asyncio.ensure_future(synchronize(stream))
    await asyncio.sleep(0.01)
    assert torchfut_aio.statistics().pending == 1
    child = os.fork()
    if child == 0:
        try:
            loop = asyncio.new_event_loop()
            async def other():
                fut = Future()
                asyncio.get_running_loop().call_later(0.01, fut.set_result, 5)
                return await fut
            asyncio._set_running_loop(None)
            assert loop.run_until_complete(other()) == 5
            gc.collect()
            os._exit(0)
        finally:
            os._exit(1)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid: break
        await asyncio.sleep(0.01)
    assert status == 0, status
    sim.wake()
    await task
asyncio.run(main())
adopted.wait(30)
print("done")
""")
    assert told == "done\n"


# -------------------------------------------------------------- what might go wrong


@on_every_loop
async def test_ctrl_c_while_a_wait_is_entered_harms_no_other(accelerator, producer, monkeypatch):
    from torchfut_aio._devices import _watcher

    class Strike(BaseException):
        """As KeyboardInterrupt, which pytest and the loops would take for themselves."""

    def strikes(entry):
        raise Strike

    first = Reader(completed_on(producer, accelerator, None))
    struck = completed_on(producer, accelerator, None)
    async with anyio.create_task_group() as tg:
        for waiting in range(2):  # nobody waits on the stream; then somebody does
            with monkeypatch.context() as patch:
                patch.setattr(_watcher, "_begun", strikes)
                with pytest.raises(Strike):
                    await struck
            assert statistics().pending == waiting
            if not waiting:
                tg.start_soon(first)
                await pending(1)
        before = statistics().polls
        await anyio.sleep(0.05)
        assert statistics().polls - before < 500
        accelerator.wake()
    assert first.outcome.tolist() == NEW
    assert (await struck).tolist() == NEW


@on_every_loop
async def test_one_event_is_queried_once_a_look_however_many_wait_for_it(accelerator, producer):
    event = torch.Event(DEVICE)
    with producer:
        accelerator.sleep(PATIENCE)
    event.record(producer)
    async with anyio.create_task_group() as tg:
        for _ in range(50):
            tg.start_soon(synchronize, event)
        await pending(50)
        before = statistics()
        await looked(5)
        after = statistics()
        assert after.queries - before.queries <= after.polls - before.polls
        accelerator.wake()


@on_every_loop
async def test_cancelled_waits_leave_nothing_with_a_blocking_thread(
    accelerator, producer, blocking_policy
):
    from torchfut_aio import _loops
    from torchfut_aio._devices import watcher_of

    with producer:
        accelerator.sleep(PATIENCE)
    async with anyio.create_task_group() as tg:
        tg.start_soon(synchronize, producer)
        await pending(1)
        for _ in range(100):
            with anyio.move_on_after(0):
                await synchronize(producer)
        [lane] = watcher_of(_loops.current())._watched
        assert len(lane.pending) < 40
        assert len(lane.blocker.work) <= 1
        accelerator.wake()


def test_the_blocking_thread_is_no_daemon_even_if_its_loop_runs_in_one(
    accelerator, producer, blocking_policy
):
    async def main():
        with producer:
            accelerator.sleep(PATIENCE)
        async with anyio.create_task_group() as tg:
            tg.start_soon(synchronize, producer)
            await pending(1)
            daemons.extend(
                t.daemon for t in threading.enumerate() if t.name == "torchfut_aio blocker"
            )
            accelerator.wake()

    daemons = []
    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert daemons == [False]


def test_loops_may_start_and_end_in_many_threads_at_once(accelerator):
    async def main():
        stream = torch.Stream(FIRST)
        with stream:
            accelerator.sleep(0.0005)
        await synchronize(stream)

    def loops(backend):
        def run():
            for _ in range(40):
                anyio.run(main, backend=backend)

        return run

    def look():
        for _ in range(300):
            assert statistics().pending >= 0

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with running(loops("asyncio"), loops("asyncio"), loops("trio"), look):
            pass
    finally:
        sys.setswitchinterval(interval)


@on_every_loop
async def test_a_thread_that_could_not_be_started_is_an_error_for_one_wait_only(
    accelerator, producer, blocking_policy, monkeypatch
):
    def fails(thread):
        raise RuntimeError("can't start new thread")

    fut = completed_on(producer, accelerator, None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await fut
    reader = Reader(fut)
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await pending(1)
        accelerator.wake()
    assert reader.outcome.tolist() == NEW

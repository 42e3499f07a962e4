"""The event watcher: one per loop, driven by the loop, with few polls and queries."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import sys
import threading
import time
from collections import deque

import anyio
import pytest
import torch
import trio
from hypothesis import given
from hypothesis import strategies as st

from torchfut_aio import Future, PollPolicy, _loops, poll_statistics, set_poll_policy, synchronize
from torchfut_aio._devices import RecordedEvent, _watcher, record_event
from torchfut_aio._devices._watcher import Watcher, watcher_of
from torchfut_aio._loops import _alarm
from torchfut_aio._threads import workers

from . import forks
from .accelerator import DEVICE, FIRST, NEW, completed_on
from .loops import on_asyncio, on_every_loop
from .threads import PATIENCE, no_thread_starts, running
from .waiting import Reader, eventually, pending, polled

pytestmark = pytest.mark.device


@pytest.fixture
def blocking_policy():
    before = set_poll_policy(PollPolicy(blocking=True))
    yield
    set_poll_policy(before)


def registered_with_the_loop():
    """Return a measure of what can wake the running loop: compare it with an earlier one."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return trio.lowlevel.current_statistics().tasks_living
    if not hasattr(loop, "_selector"):
        return open_files()  # uvloop has no list
    return len(loop._selector.get_map()), len(loop._scheduled)


def open_files():
    def is_open(number):
        try:
            return fcntl.fcntl(number, fcntl.F_GETFD) >= 0
        except OSError:
            return False

    return sum(map(is_open, range(1024)))


# -------------------------------------------------------------------------------- economy


@on_every_loop
async def test_idle_watcher_schedules_no_timer_and_no_query(accelerator, producer, collected):
    collected()  # or the files of earlier tests' loops would be closed during this test
    before = registered_with_the_loop()
    for _ in range(3):
        fut = completed_on(producer, accelerator, None)
        async with anyio.create_task_group() as tg:
            tg.start_soon(Reader(fut))
            await polled()
            assert registered_with_the_loop() != before
            accelerator.wake()
        await eventually(lambda: registered_with_the_loop() == before)
        accelerator.reset_counters()
        await anyio.sleep(0.02)
        assert registered_with_the_loop() == before
        assert accelerator.counters()["event_queries"] == 0


@on_every_loop
async def test_poll_makes_one_query_per_stream(accelerator):
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
        before = poll_statistics()
        await polled(10)
        after = poll_statistics()
        assert 0 < after.queries - before.queries <= 4 * (after.polls - before.polls)
        assert accelerator.counters()["event_queries"] <= after.queries - before.queries
        accelerator.wake()
        for stream in streams:  # the loop does not run, so one poll finds all of them
            stream.synchronize()
    assert [reader.outcome.item() for reader in readers] == list(range(1000))
    # Finding how many are done takes a few more queries: far fewer than there are events.
    assert (
        poll_statistics().queries - after.queries
        < 4 * (poll_statistics().polls - after.polls) + 200
    )


@on_every_loop
async def test_events_are_reused_in_the_steady_state(accelerator, producer, consumer):
    async def rounds(count):
        for _ in range(count):
            for stream in (producer, consumer):
                with stream:
                    accelerator.sleep(PATIENCE)
            async with anyio.create_task_group() as tg:
                for _ in range(5):
                    tg.start_soon(synchronize, producer)
                    tg.start_soon(synchronize, consumer)
                await pending(10)
                accelerator.wake()

    await rounds(2)
    gc.collect()
    accelerator.reset_counters()
    await rounds(30)
    counted = accelerator.counters()
    assert counted["event_queries"] > 60
    assert counted["events_created"] == counted["events_destroyed"] == 0


def test_reached_events_are_reused(accelerator, producer):
    first = record_event(producer)
    event = first.event
    first.synchronize()
    del first
    again = [record_event(producer) for _ in range(3)]
    assert sum(recorded.event is event for recorded in again) == 1
    assert len({id(recorded.event) for recorded in again}) == 3


def test_abandoned_event_is_not_recorded_again(accelerator, producer):
    """On some devices it would signal both recordings; openreg's completes at the first."""
    with producer:
        accelerator.sleep(PATIENCE)
    first = record_event(producer)
    event = first.event
    del first
    again = [record_event(producer) for _ in range(3)]
    assert not any(recorded.event is event for recorded in again)
    accelerator.wake()


@on_every_loop
async def test_event_that_a_thread_waits_for_is_not_recorded_again(
    accelerator, producer, blocking_policy
):
    with producer:
        accelerator.sleep(PATIENCE)
    async with anyio.create_task_group() as tg:
        tg.start_soon(synchronize, producer)
        await pending(1)
        tg.cancel_scope.cancel()
    [synchronize_it] = blocking_work()
    again = [record_event(producer) for _ in range(3)]
    assert not any(recorded.event is synchronize_it.__self__.event for recorded in again)
    accelerator.wake()


def blocking_work():
    """Return the functions that the blocking threads of watchers call."""
    blockers = [worker for worker in workers() if worker.name == _watcher.BLOCKER]
    return [function for blocker in blockers for function in blocker.work.values()]


@on_every_loop
async def test_loop_learns_the_duration_of_waits_on_a_stream(accelerator, producer):
    least, most = [], []
    with anyio.fail_after(PATIENCE):
        while len(most) < 20:
            polls, enqueued = poll_statistics().polls, time.monotonic()
            with producer:
                accelerator.sleep(0.004)
            waiting = synchronize(producer)
            marked = time.monotonic()
            await waiting
            if poll_statistics().polls > polls:  # the wait did not end before the first poll
                # At least half the time from here to the end of the kernel, as the kernel ended
                # somewhere between two polls.
                least.append((0.004 - (marked - enqueued)) / 2)
                most.append(time.monotonic() - enqueued)
    learned = poll_statistics().intervals
    assert list(learned) == [(torch.device(FIRST), producer.stream_id)]
    [interval] = learned.values()
    assert min(least) < interval < max(most)


def test_statistics_outside_a_loop_cover_all_loops(accelerator, producer):
    async def main():
        with producer:
            accelerator.sleep(0.001)
        await synchronize(producer)
        return poll_statistics()

    gc.collect()
    before = poll_statistics()
    inside = [anyio.run(main, backend=backend) for backend in ("asyncio", "trio")]
    gc.collect()
    after = poll_statistics()
    assert after.pending == before.pending
    assert after.polls - before.polls >= sum(s.polls for s in inside)
    assert after.hits - before.hits == sum(s.hits for s in inside) == 2


# ----------------------------------------------------------------- the order of events


class Clock:
    """A stream whose progress the test controls."""

    def __init__(self):
        self.reached = 0
        self.queries = 0

    def recorded(self, begun, ended=None, name=0):
        recorded = RecordedEvent(Place(self, begun))
        recorded.stream, recorded.recorded_at = ("made up", name), 0.0
        recorded.begun, recorded.ended = begun, ended or begun + 1
        return recorded


class Place:
    def __init__(self, clock, at):
        self.clock, self.at, self.device = clock, at, None

    def query(self):
        self.clock.queries += 1
        return self.at < self.clock.reached


class AlwaysDue:
    """A schedule by which every poll polls the stream."""

    interval = 0.0

    def next_poll(self, waited):
        return waited

    def observe(self, poll):
        pass


class Loop:
    """A loop that runs nothing by itself."""

    def __init__(self):
        self.soon = deque()

    def alarm(self, function):
        return self

    def set(self, seconds):
        self.seconds = seconds

    def close(self):
        pass

    def call_soon(self, function):
        self.soon.append(function)


@given(st.permutations(range(30)), st.lists(st.integers(0, 29), min_size=1, max_size=6))
def test_exactly_the_reached_waits_are_notified_in_any_order(order, times):
    clock, notified = Clock(), set()
    watcher = Watcher(Loop(), AlwaysDue)
    for n in order:
        watcher.notify_when_reached([clock.recorded(2 * n)], lambda error, n=n: notified.add(n))
    for place in sorted(times):
        clock.reached = 2 * place + 1
        before = clock.queries
        watcher.poll()
        assert notified == set(range(place + 1))
        assert clock.queries - before <= 12
    assert len(watcher.waits.pending) == 30 - len(notified)


@given(st.data())
def test_events_recorded_concurrently_are_queried_separately(data):
    # The recordings overlap in time, so the stream may have received the events in either order.
    spans = data.draw(
        st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)), min_size=1, max_size=12)
    )
    clock, notified = Clock(), set()
    watcher = Watcher(Loop(), AlwaysDue)
    true_place = {}
    for n, (begun, length) in enumerate(spans):
        recorded = clock.recorded(100 * begun + n, 100 * (begun + length))
        true_place[n] = place = data.draw(st.integers(recorded.begun, recorded.ended))
        recorded.event = Place(clock, place)
        watcher.notify_when_reached([recorded], lambda error, n=n: notified.add(n))
    for _ in range(10):
        clock.reached += 350
        watcher.poll()
        assert all(true_place[n] < clock.reached for n in notified)
    clock.reached = 10_000
    while len(watcher.waits.pending):
        watcher.poll()
    assert notified == set(true_place)


@pytest.mark.parametrize("seconds", [0.001, 0.004, 0.02])
def test_trained_loop_polls_less_and_is_barely_late(monkeypatch, seconds):
    clock, alarm, now = Clock(), Loop(), 100.0
    monkeypatch.setattr(_watcher, "monotonic", lambda: now)
    watcher = Watcher(alarm)
    polls, late = [], []
    for n in range(30):
        notified, before = [], watcher.polls
        recorded = clock.recorded(2 * n)
        recorded.recorded_at, end = now, now + seconds
        watcher.notify_when_reached([recorded], notified.append)
        while not notified:
            now += alarm.seconds + 30e-6  # a realistic delay of a loop's wake-up
            if now >= end:
                clock.reached = 2 * n + 1
            watcher.poll()
        polls.append(watcher.polls - before)
        late.append(now - end)
    assert max(polls[20:]) < polls[0] / 2
    assert max(late[20:]) < 200e-6


# ------------------------------------------------------------------------------- policy


@on_every_loop
async def test_blocking_policy_never_polls_and_its_threads_end(
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
    await eventually(lambda: not blockers())


@on_every_loop
async def test_blocking_policy_raises_errors_and_drops_cancelled_waits(
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
async def test_policy_can_be_set_while_waits_are_pending(accelerator, producer, consumer):
    default = set_poll_policy(PollPolicy(blocking=True))
    try:
        blocked, other = (completed_on(s, accelerator, None) for s in (producer, consumer))
        readers = [Reader(blocked), Reader(other)]
        async with anyio.create_task_group() as tg:
            tg.start_soon(readers[0])
            await pending(1)
            set_poll_policy(default)
            tg.start_soon(readers[1])
            await pending(2)
            set_poll_policy(PollPolicy(blocking=True))
            await polled(1)
            accelerator.wake()
        assert [reader.outcome.tolist() for reader in readers] == [NEW, NEW]
    finally:
        set_poll_policy(default)


@on_every_loop
async def test_timers_of_the_loop_replace_a_missing_timerfd(accelerator, producer, monkeypatch):
    monkeypatch.setattr(_alarm, "new_timer", lambda: None)
    for _ in range(3):
        fut = completed_on(producer, accelerator, None)
        reader = Reader(fut)
        async with anyio.create_task_group() as tg:
            tg.start_soon(reader)
            await polled()
            accelerator.wake()
        assert reader.outcome.tolist() == NEW
        with anyio.move_on_after(0.01):
            await completed_on(producer, accelerator, None)
        accelerator.wake()


@on_asyncio
@pytest.mark.parametrize("has_timerfd", [True, False])
async def test_new_waits_do_not_put_polls_off(accelerator, producer, has_timerfd, monkeypatch):
    if not has_timerfd:
        monkeypatch.setattr(_alarm, "new_timer", lambda: None)
    value = completed_on(producer, accelerator, None)
    async with anyio.create_task_group() as tg:
        tg.start_soon(Reader(value))
        await pending(1)
        before = poll_statistics().polls
        for _ in range(100):
            tg.start_soon(Reader(value))
            await asyncio.sleep(0)
            turn_ends = time.monotonic() + 0.001
            while time.monotonic() < turn_ends:
                pass
        polls = poll_statistics().polls - before
        accelerator.wake()
    assert polls > 10


# ------------------------------------------------------------- loops and processes end


@on_asyncio
async def test_watcher_does_not_keep_the_context_of_the_first_waiter(accelerator, producer):
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
    task = context.run(asyncio.ensure_future, _read(fut))
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
def test_loops_closed_with_pending_waits_leave_no_file_open(
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
            pending_task = asyncio.ensure_future(_read(completed_on(producer, accelerator, None)))
            pending_task._log_destroy_pending = False
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
    asyncio.run(_read(done))  # the next loop that awaits cleans up
    collected()
    assert open_files() <= before
    assert poll_statistics().pending == 0


PROGRAM = """
import asyncio, gc, os, sys, threading, warnings
import torch, trio
from tests import simulated_device as sim
from tests.threads import until
import torchfut_aio
from torchfut_aio import Future, PollPolicy, as_future, set_poll_policy, synchronize

# os.fork() warns from CPython 3.12 on, and raises if that is an error, from 3.15 on.
warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)

def kernels():
    with torch.Stream("sim:0") as stream:
        sim.sleep(3600)
    return stream

async def wait(stream):
    await synchronize(stream)

{}
"""


def program_ends(body):
    return forks.output(PROGRAM.format(body))


@pytest.mark.skipif(DEVICE != "sim", reason="written for the simulated device")
@pytest.mark.parametrize(
    "body",
    [
        "stream = kernels(); fut = as_future(stream)",
        "stream = kernels()\n"
        "async def main():\n"
        "    try: await asyncio.wait_for(synchronize(stream), 0.01)\n"
        "    except TimeoutError: pass\n"
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
        "until(lambda: torchfut_aio.poll_statistics().pending == 1)",
    ],
    ids=["adopted", "timed out", "task left", "adopted on asyncio", "on trio", "daemon thread"],
)
def test_an_interpreter_exits_with_kernels_pending(accelerator, body):
    assert program_ends(body) == ""


@pytest.mark.skipif(DEVICE != "sim", reason="CUDA does not survive a fork")
def test_forked_child_is_not_affected_by_waits_of_its_parent(accelerator):
    output = program_ends("""
stream = kernels()
adopted = as_future(stream)
async def main():
    task = asyncio.ensure_future(synchronize(stream))
    await asyncio.sleep(0.01)
    assert torchfut_aio.poll_statistics().pending == 1
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
    assert output == "done\n"


# -------------------------------------------------------------- errors and lost wake-ups


@on_every_loop
async def test_raising_notification_is_logged_and_affects_no_other(accelerator, producer, caplog):
    def raises(error):
        raise LookupError("cannot be notified")

    watcher = watcher_of(_loops.current())
    with producer:
        accelerator.sleep(PATIENCE)
    watcher.notify_when_reached([record_event(producer)], raises)
    reader = Reader(synchronize(producer))
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await pending(2)
        accelerator.wake()
    assert reader.outcome is None
    assert caplog.text.count("LookupError: cannot be notified") == 1
    await synchronize(producer)
    polls = poll_statistics().polls
    await anyio.sleep(0.01)
    assert poll_statistics().polls == polls


class Breaks(AlwaysDue):
    """A schedule that raises."""

    def observe(self, poll):
        raise ZeroDivisionError


def test_raising_schedule_fails_only_the_waits_on_its_stream():
    schedules = iter([Breaks, AlwaysDue])
    watcher, clock, calls = Watcher(Loop(), lambda: next(schedules)()), Clock(), []
    for n in range(2):
        recorded = clock.recorded(n, name=n)
        watcher.notify_when_reached([recorded], lambda error, n=n: calls.append((n, error)))
    watcher.poll()
    [(number, error)] = calls
    assert number == 0
    assert type(error) is ZeroDivisionError
    assert len(watcher.waits.pending) == 1
    clock.reached = 10
    watcher.poll()
    assert calls[1:] == [(1, None)]
    assert len(watcher.waits.pending) == 0


@on_every_loop
async def test_lost_wake_up_of_a_blocking_thread_is_recovered(
    accelerator, producer, blocking_policy, monkeypatch
):
    kind = type(_loops.current())
    real = kind.call_soon

    def call_soon(loop, function):
        # As if KeyboardInterrupt was raised just before the loop called the thread's function.
        return threading.current_thread().name == _watcher.BLOCKER or real(loop, function)

    monkeypatch.setattr(_watcher, "_FALLBACK", 0.01)
    reader = Reader(completed_on(producer, accelerator, None))
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await pending(1)
        monkeypatch.setattr(kind, "call_soon", call_soon)
        accelerator.wake()
    assert reader.outcome.tolist() == NEW


def test_thread_that_unblocks_at_once_starts_a_poll_at_once(blocking_policy, monkeypatch):
    class BlockingThread:
        def __init__(self, name, **options):
            pass

        def has_work(self):
            return False

        def submit(self, notify, function):
            notify(None)  # before submit() returns

    monkeypatch.setattr(_watcher, "BlockingThread", BlockingThread)
    loop, clock, notified = Loop(), Clock(), []
    watcher = Watcher(loop)
    watcher.notify_when_reached([clock.recorded(0)], notified.append)
    clock.reached = 1
    loop.soon.popleft()()
    assert notified == [None]


@on_every_loop
async def test_event_is_queried_once_per_poll_for_many_waits(accelerator, producer):
    event = torch.Event(DEVICE)
    with producer:
        accelerator.sleep(PATIENCE)
    event.record(producer)
    async with anyio.create_task_group() as tg:
        for _ in range(50):
            tg.start_soon(synchronize, event)
        await pending(50)
        before = poll_statistics()
        await polled(5)
        after = poll_statistics()
        assert after.queries - before.queries <= after.polls - before.polls
        accelerator.wake()


@on_every_loop
async def test_cancelled_waits_leave_no_work_for_a_blocking_thread(
    accelerator, producer, blocking_policy
):
    def recorded_events():
        return sum(type(thing) is RecordedEvent for thing in gc.get_objects())

    before = recorded_events()
    with producer:
        accelerator.sleep(PATIENCE)
    async with anyio.create_task_group() as tg:
        tg.start_soon(synchronize, producer)
        await pending(1)
        for _ in range(100):
            with anyio.move_on_after(0):
                await synchronize(producer)
        assert recorded_events() < before + 40
        assert len(blocking_work()) <= 1
        accelerator.wake()


def test_blocking_thread_of_a_daemon_loop_is_not_a_daemon(accelerator, producer, blocking_policy):
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


def test_loops_can_start_and_end_in_many_threads_at_once(accelerator):
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

    def ask():
        for _ in range(300):
            assert poll_statistics().pending >= 0

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with running(loops("asyncio"), loops("asyncio"), loops("trio"), ask):
            pass
    finally:
        sys.setswitchinterval(interval)


@on_every_loop
async def test_stream_is_polled_if_no_blocking_thread_can_start(
    accelerator, producer, blocking_policy
):
    reader = Reader(completed_on(producer, accelerator, None))
    with no_thread_starts():
        async with anyio.create_task_group() as tg:
            tg.start_soon(reader)
            await polled(3)
            accelerator.wake()
    assert reader.outcome.tolist() == NEW

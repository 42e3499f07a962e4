"""Which of several waiters is woken: those for a value or for room in a stream."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import threading
import weakref
from collections import Counter
from importlib.util import find_spec

import anyio
import anyio.lowlevel
import pytest

from torchfut_aio import ValueStream, _loops, _waiters
from torchfut_aio.serving import _stream, _stream_state
from torchfut_aio.serving._stream import state_of

from .explorer import interrupts
from .loops import on_every_loop
from .threads import PATIENCE, alongside, running, until
from .waiting import eventually, waiting

MODULES = (_stream, _stream_state, _waiters)


def full(*values):
    stream = ValueStream(max_size=len(values))
    stream.put_many(values)
    return stream


def nothing_left(*streams):
    """Return True if there is no waiter, and no reference to a loop."""
    states = [state_of(stream) for stream in streams]
    waiters = [each for state in states for each in (state.readers, state.writers)]
    return not any(each.waiting or each.lines for each in waiters)


@pytest.fixture
def wakes(monkeypatch):
    """Count the wake-ups of tasks and threads, by kind."""
    counts = Counter()

    def count(kind, cls):
        real = cls.wake

        def wake(self, waiter, /):
            counts[kind] += 1
            real(self, waiter)

        monkeypatch.setattr(cls, "wake", wake)

    def start():
        count("thread", type(_loops.THREADS))
        count("task", type(_loops.current()))
        return counts

    return start


# ------------------------------------------------------------------------ the number of wake-ups


@on_every_loop
async def test_many_writers_are_woken_once_each_in_order(wakes):
    stream, n = full("first"), 300
    values, counts = aiter(stream), wakes()
    async with anyio.create_task_group() as tg:
        for number in range(n):
            tg.start_soon(stream.aput, number)
            await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()
        assert waiting(stream) == (0, n)
        assert [await anext(values) for _ in range(n + 1)] == ["first", *range(n)]
    assert counts["task"] == 2 * n  # each writer, and the reader once per value
    assert nothing_left(stream)


@on_every_loop
async def test_many_readers_are_woken_once_each_in_order(wakes):
    stream, n, got, counts = ValueStream(), 300, [], wakes()
    listener = aiter(stream)

    async def read(number):
        got.append((number, await anext(listener)))

    async with anyio.create_task_group() as tg:
        for number in range(n):
            tg.start_soon(read, number)
            await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()
        for value in range(n):
            stream.put(value)
            await anyio.lowlevel.checkpoint()
    assert sorted(value for _, value in got) == [*range(n)]
    assert [number for number, _ in got] == [*range(n)]
    assert counts["task"] == n
    assert nothing_left(stream)


@on_every_loop
async def test_many_threads_are_woken_once_each(wakes):
    stream, n = full("first"), 20
    values, counts = aiter(stream), wakes()
    async with alongside(*[lambda k=k: stream.put(k, timeout=PATIENCE) for k in range(n)]):
        await eventually(lambda: waiting(stream) == (0, n))
        counts.clear()
        got = []
        for _ in range(n + 1):
            await eventually(lambda: len(stream) == 1)
            got.append(await anext(values))
    assert sorted(got[1:]) == [*range(n)]
    assert counts["thread"] == n
    assert nothing_left(stream)


@on_every_loop
async def test_many_values_at_once_wake_as_many_readers(wakes):
    stream, got, counts = ValueStream(), [], wakes()
    listener = aiter(stream)

    async def read():
        got.append(await anext(listener))

    async with anyio.create_task_group() as tg:
        for _ in range(10):
            tg.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        stream.put_many([0, 1, 2, 3])
        await anyio.wait_all_tasks_blocked()
        assert counts["task"] == 4
        assert waiting(stream) == (6, 0)
        stream.put_many([*range(4, 10)])
    assert sorted(got) == [*range(10)]


@on_every_loop
async def test_values_wake_one_reader_of_each_kind(wakes):
    stream, counts, got = ValueStream(), wakes(), []
    listener, values = aiter(stream), iter(stream)

    async def read():
        got.append(await anext(listener))

    def read_in_thread():
        got.append(next(values))

    async with alongside(*[read_in_thread] * 3), anyio.create_task_group() as tg:
        for _ in range(3):
            tg.start_soon(read)
        await eventually(lambda: waiting(stream) == (6, 0))
        counts.clear()
        stream.put(0)
        await eventually(lambda: got == [0] and waiting(stream) == (5, 0))
        assert counts == {"task": 1, "thread": 1}
        stream.put_many([1, 2, 3, 4, 5])
    assert sorted(got) == [*range(6)]
    assert nothing_left(stream)


# --------------------------------------------------------------- wake-ups that are passed on


@on_every_loop
async def test_reader_cancelled_when_woken_passes_the_value_on():
    stream, got = ValueStream(), []
    listener = aiter(stream)

    async def read(scope):
        with scope:
            got.append(await anext(listener))

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tg:
            scopes = [anyio.CancelScope() for _ in range(3)]
            for scope in scopes:
                tg.start_soon(read, scope)
            await anyio.wait_all_tasks_blocked()
            stream.put(1)
            scopes[0].cancel()
            await eventually(lambda: got == [1])
            tg.cancel_scope.cancel()
    assert nothing_left(stream)


@on_every_loop
async def test_writer_cancelled_when_woken_passes_the_room_on():
    stream, sent = full("first"), []
    values = aiter(stream)

    async def send(scope, value):
        with scope:
            await stream.aput(value)
            sent.append(value)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tg:
            scopes = [anyio.CancelScope() for _ in range(3)]
            for n, scope in enumerate(scopes):
                tg.start_soon(send, scope, n)
            await anyio.wait_all_tasks_blocked()
            assert await anext(values) == "first"
            scopes[0].cancel()
            await eventually(lambda: len(sent) == 1)
            assert await anext(values) == sent[0]
            tg.cancel_scope.cancel()
    assert nothing_left(stream)


class Pair:
    """Tasks of one loop that wait on one stream, and a list of the values they got."""

    def __init__(self, kind, number=2):
        self.loop = asyncio.new_event_loop()
        self.gets, self.reads = kind == "getters", kind != "writers"
        self.stream = ValueStream() if self.reads else full("first")
        self.values, self.results, self.tasks = aiter(self.stream), [], []
        for _ in range(number):
            self.add()
        self.turn()
        assert sum(waiting(self.stream)) == number

    def add(self):
        self.tasks.append(self.loop.create_task(self.read() if self.reads else self.put()))

    async def read(self):
        self.results.append(await (self.stream.aget() if self.gets else anext(self.values)))

    async def put(self):
        await self.stream.aput(1)
        self.results.append(1)

    def event(self):
        if self.reads:
            self.stream.put(1)
        else:
            next(self.values)

    def happened(self):
        return bool(self.results) or len(self.stream) == self.reads

    def turns(self):
        for _ in range(4):
            self.turn()

    def turn(self):
        self.loop.run_until_complete(asyncio.sleep(0))

    def close(self):
        for task in self.tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*self.tasks, return_exceptions=True))
        self.loop.close()


pairs = pytest.mark.parametrize("kind", ["readers", "getters", "writers"])


@pairs
@pytest.mark.parametrize("which", [0, 1])
def test_a_waiter_cancelled_at_any_step_leaves_no_other_asleep(kind, which):
    for interrupt in interrupts(*MODULES, do=lambda: pair.tasks[which].cancel()):
        pair = Pair(kind)
        with interrupt:
            pair.event()
            pair.turns()
        pair.turns()
        assert pair.results == [1], interrupt
        pair.close()
        assert nothing_left(pair.stream)


@pairs
@pytest.mark.parametrize("cancelled", [False, True], ids=["", "cancelled"])
def test_a_waiter_interrupted_at_any_step_leaves_no_other_asleep(kind, cancelled):
    for interrupt in interrupts(*MODULES):
        pair = Pair(kind)
        with interrupt:
            pair.event()
            if cancelled:
                pair.tasks[0].cancel()
            pair.turns()
        pair.turns()
        if pair.happened():
            assert pair.results or pair.tasks[1].done(), interrupt
        for _ in range(2):
            if not all(task.done() for task in pair.tasks):
                with contextlib.suppress(StopIteration):
                    pair.event()
                    pair.turns()
        assert all(task.done() for task in pair.tasks), interrupt
        pair.close()


@pairs
@pytest.mark.parametrize("number", [1, 2])
def test_an_event_interrupted_at_any_step_loses_no_waiter(kind, number):
    for interrupt in interrupts(*MODULES, _loops):
        pair = Pair(kind, number)
        with interrupt:
            pair.event()
        pair.turns()
        assert pair.results or not pair.happened(), interrupt
        while len(pair.results) < number:
            before = len(pair.results)
            pair.event()
            pair.turns()
            assert len(pair.results) > before, interrupt
        pair.close()


@pairs
def test_waiter_being_added_at_any_step_is_woken(kind):
    for interrupt in interrupts(*MODULES, do=lambda: pair.event()):
        pair = Pair(kind, number=1)
        pair.event()
        pair.turns()
        assert pair.results == [1]
        if kind == "writers":
            assert next(pair.values) == 1
            pair.stream.put("full again")
        with interrupt:
            pair.add()
            pair.turn()
        if interrupt.where is None:
            pair.event()
        pair.turns()
        assert pair.results == [1, 1], interrupt
        pair.close()


def read_by_next(stream):
    values = iter(stream)
    return lambda: next(values)


def read_by_get(stream):
    return lambda: stream.get(timeout=PATIENCE)


threads_read = pytest.mark.parametrize("how", [read_by_next, read_by_get])


@threads_read
def test_thread_starting_to_wait_at_any_step_is_woken(how):
    for interrupt in interrupts(*MODULES, thread="interrupted", do=lambda: stream.put(1)):
        stream, got = ValueStream(), []
        read = how(stream)
        thread = threading.Thread(
            target=lambda read=read, got=got: got.append(read()), name="interrupted"
        )
        with interrupt:
            thread.start()
            until(lambda: waiting(stream)[0] or got)
            if interrupt.where is None:
                stream.put(1)
            thread.join(PATIENCE)
        assert got[:1] == [1], interrupt


@threads_read
def test_a_thread_interrupted_at_any_step_leaves_no_other_asleep(how):
    for interrupt in interrupts(*MODULES, thread="interrupted"):
        stream, got = ValueStream(), []
        read_one = how(stream)

        def read(read_one=read_one, got=got):
            try:
                got.append(read_one())
            except KeyboardInterrupt:
                got.append(None)

        other = threading.Thread(target=read)
        with interrupt:
            interrupted = threading.Thread(target=read, name="interrupted")
            interrupted.start()
            until(lambda: waiting(stream)[0] or got)
            other.start()
            until(lambda: waiting(stream)[0] + len(got) == 2)
            stream.put(1)
            until(lambda: 1 in got)
            stream.put(2)
            interrupted.join(PATIENCE)
            other.join(PATIENCE)
        assert not interrupted.is_alive()
        assert not other.is_alive()
        assert 1 in got
        assert None in got or sorted(got) == [1, 2]
        assert waiting(stream) == (0, 0)


def test_value_put_back_wakes_a_reader_about_to_wait():
    class Writer:
        calls = 0

        def wake(self, waiter):
            self.calls += 1
            if self.calls == 1:
                readers[reader] = reader  # a reader that has found no value
                raise KeyboardInterrupt

    class Reader:
        woken = 0

        def wake(self, waiter):
            self.woken += 1

    stream, writer, reader = full(1), Writer(), Reader()
    readers = state_of(stream).readers.waiting
    state_of(stream).writers.waiting[writer] = writer
    values = iter(stream)
    with pytest.raises(KeyboardInterrupt):
        next(values)
    assert reader.woken
    assert next(values) == 1


# ----------------------------------------------------------------- loops that close or stop


async def read_one(listener, got):
    got.append(await anext(listener))


def waiting_on_a_loop(listener, got, number):
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(read_one(listener, got)) for _ in range(number)]
    for task in tasks:
        task._log_destroy_pending = False
    loop.run_until_complete(asyncio.sleep(0))
    return loop, tasks


@pytest.mark.parametrize("closes", ["before", "after", "never"])
def test_blocked_loop_takes_no_value_from_others(closes):
    stream, got = ValueStream(), []
    listener = aiter(stream)
    still, tasks = waiting_on_a_loop(listener, [], 3)
    running_loop, others = waiting_on_a_loop(listener, got, 3)
    if closes == "before":
        still.close()
    for n in range(3):
        stream.put(n)
        if closes == "after":
            still.close()
        running_loop.run_until_complete(others[n])
    assert got == [0, 1, 2]
    running_loop.close()
    if closes == "never":
        stream.put_many([3, 4, 5])
        still.run_until_complete(asyncio.gather(*tasks))
        still.close()
        assert nothing_left(stream)


def test_stream_does_not_keep_a_closed_loop(no_collector):
    stream, seen = ValueStream(), []
    listener = aiter(stream)
    for _ in range(3):
        loop, tasks = waiting_on_a_loop(listener, [], 5)
        loop.close()
        seen.append(weakref.ref(loop))
        del loop, tasks
    stream.put(1)
    stream.put(2)
    assert nothing_left(stream)
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3


def test_stream_used_by_many_loops_keeps_none_of_them():
    stream, got = ValueStream(), []
    listener = aiter(stream)

    async def main():
        tasks = [asyncio.ensure_future(read_one(listener, got)) for _ in range(3)]
        await asyncio.sleep(0)
        stream.put_many([1, 2])
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        tasks[2].cancel()
        await asyncio.wait(tasks)

    for n in range(1, 11):
        asyncio.run(main())
        assert len(got) == 2 * n
        assert nothing_left(stream)


def test_waiter_joining_a_removed_line_is_in_a_line_or_woken():
    # A line is removed when it is empty. Here a waiter joins just before that, or just after.
    for interrupt in interrupts(_waiters, do=lambda: waiters.line_up("late", waker)):
        waiters, waker = _waiters.Waiters(), Waker()
        waiters.waiting["late"] = waker
        waiters.waiting["early"] = waker
        waiters.line_up("early", waker)
        with interrupt:
            waiters.waiting.pop("early")
            waiters.leave_line("early", waker)
        in_line = "late" in waiters.lines.get(waker, {})
        assert interrupt.where is None or in_line or waker.woken == ["late"]


def test_line_removed_while_a_waiter_joins_is_replaced():
    for interrupt in interrupts(_waiters, do=lambda: waiters.leave_line("early", waker)):
        waiters, waker = _waiters.Waiters(), Waker()
        waiters.line_up("early", waker)
        with interrupt:
            waiters.line_up("late", waker)
        assert "late" in waiters.lines[waker], interrupt


class Waker:
    def __init__(self):
        self.woken = []

    def wake(self, waiter):
        self.woken.append(waiter)


def test_blocked_signal_handler_wakes_before_the_interrupted_put():
    stream, begun, handled = full("first"), [], []

    def handler(*_):
        if not begun:
            begun.append(True)
            stream.put("handler", timeout=PATIENCE)
            handled.append(True)

    # Repeat it: a signal just before the thread blocks has no effect.
    def interrupt():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def read():
        writers = state_of(stream).writers.waiting
        until(lambda: len(writers) == 1)
        (interrupted,) = writers
        until(lambda: begun or interrupt())
        until(lambda: writers and interrupted not in writers)
        values = iter(stream)
        got = [next(values)]
        until(lambda: handled)
        got += [next(values), next(values)]
        assert got == ["first", "handler", "main"]

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with running(read):
            stream.put("main", timeout=PATIENCE)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert nothing_left(stream)


@pytest.mark.skipif(not find_spec("_testcapi"), reason="this Python is built without _testcapi")
def test_waiter_is_woken_even_if_memory_runs_out():
    import _testcapi

    class Waker:
        closed = False

        def wake(self, waiter):
            woken[waiter] = True  # without memory, as the key is there

    for number in range(40):  # of the allocation that fails
        waiters, waker, woken = _waiters.Waiters(), Waker(), {"first": False, "second": False}
        for waiter in woken:
            waiters.waiting[waiter] = waker
            waiters.line_up(waiter, waker)
        _testcapi.set_nomemory(number, number + 1)
        try:
            waiters.wake(2)
        except MemoryError:
            _testcapi.remove_mem_hooks()
            waiters.wake_again(2)  # as each caller does
        finally:
            _testcapi.remove_mem_hooks()
        assert all(woken.values()), number

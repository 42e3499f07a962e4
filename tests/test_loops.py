"""A completion that is interrupted on its way to its task loses no other task, and no loop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import types
import weakref
from contextlib import suppress

import pytest
import trio
import trio.testing
import uvloop

from torchfut_aio import Future, _loops
from torchfut_aio._loops import _alarm, _asyncio, _loop

from . import explorer
from .test_interrupts import Alarm
from .threads import PATIENCE, running


class NoReaders(asyncio.SelectorEventLoop):
    """A loop that cannot watch files, except its own pipe."""

    def add_reader(self, *args):
        if threading.get_ident() == getattr(self, "_thread_id", None):
            raise NotImplementedError
        super().add_reader(*args)


NEW_LOOPS = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
    "without readers": NoReaders,
}

# From CPython 3.12 on, starting to trace is slow.
EVERY = 1 if sys.version_info < (3, 12) else 7

on_asyncios_loops = pytest.mark.parametrize("new_loop", NEW_LOOPS.values(), ids=NEW_LOOPS)
# The first is raised where CPython checks for signals, the second in place of calls.
any_interrupt = pytest.mark.parametrize(
    ("error", "at"), [(KeyboardInterrupt, "signals"), (MemoryError, "calls")]
)
# An exception in a finaliser does not propagate.
finalisers_may_be_interrupted = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def quiet(nothing_blocks_a_loop, caplog):
    nothing_blocks_a_loop.deactivate()
    caplog.set_level(logging.CRITICAL, "asyncio")


def interrupts(*modules, **options):
    """Interrupts without a traceback, which would keep a reference to the loop's pending call."""
    for interrupt in explorer.interrupts(*modules, every=EVERY, **options):
        yield WithoutTraceback(interrupt)


class WithoutTraceback:
    def __init__(self, interrupt):
        self.interrupt = interrupt

    def __enter__(self):
        gc.disable()  # finalisers of earlier runs could be interrupted instead
        return self.interrupt.__enter__()

    def __exit__(self, *error):
        try:
            return self.interrupt.__exit__(*error)
        finally:
            self.interrupt.error.__traceback__ = None
            gc.enable()

    def __repr__(self):
        return repr(self.interrupt)


async def value_of(fut):
    return await fut


def run(loop, task):
    for _ in range(10):
        try:
            return loop.run_until_complete(task)
        except RuntimeError as error:  # a stop that was delayed by an interrupt
            if "stopped before" not in str(error):
                raise
    raise AssertionError("the loop does not run any more")


class Waits:
    """Tasks of a loop that each await a future."""

    def __init__(self, loop, count):
        self.loop = loop
        self.futures = [Future() for _ in range(count)]
        self.tasks = [loop.create_task(value_of(fut)) for fut in self.futures]

    def park(self):
        run(self.loop, self.loop.create_task(asyncio.sleep(0)))
        return self

    def complete(self):
        """Complete all futures in another thread, while the loop does not run."""
        with running(self.complete_here):
            pass
        return self

    def complete_here(self):
        for n, fut in enumerate(self.futures):
            if not fut.done():
                fut.set_result(n)

    def complete_in_thread(self, name, error):
        """Complete all futures in a thread of this name, which may be interrupted with an error."""

        def complete():
            with suppress(error):
                self.complete_here()

        thread = threading.Thread(target=complete, name=name)
        thread.start()
        thread.join()

    def end(self):
        """Run the loop until all tasks have ended."""
        waiting = self.loop.create_task(asyncio.wait(self.tasks, timeout=PATIENCE))
        run(self.loop, waiting)
        assert not waiting.result()[1], "tasks are still asleep"
        return self

    def check(self, interrupted=0):
        """Check that all but ``interrupted`` tasks have a value, and that no waiter is left."""
        ended = [task.cancelled() or task.exception() for task in self.tasks]
        assert sum(error is not None for error in ended) <= interrupted
        assert all("waiters=0" in repr(fut) or fut.done() for fut in self.futures)


def check_works(loop):
    for count in (1, 20, 20, 1):  # 20 in one poll are a burst
        Waits(loop, count).park().complete().end().check()


def new(new_loop):
    loop = new_loop()
    loop.set_exception_handler(lambda *_: None)
    return loop


@on_asyncios_loops
@any_interrupt
@pytest.mark.parametrize("count", [1, 20], ids=["a wake-up", "a burst"])
@finalisers_may_be_interrupted
def test_interrupted_loop_loses_no_waiter(new_loop, error, at, count):
    for interrupt in interrupts(_loops, error=error, at=at):
        loop = new(new_loop)
        waits = Waits(loop, count).park().complete()
        with interrupt:
            waits.end()
        waits.end().check()
        check_works(loop)
        loop.close()


@on_asyncios_loops
@any_interrupt
@finalisers_may_be_interrupted
def test_interrupt_after_a_burst_loses_no_waiter(new_loop, error, at):
    for interrupt in interrupts(_loops, error=error, at=at):
        loop = new(new_loop)
        Waits(loop, 20).park().complete().end()
        waits = Waits(loop, 2).park().complete()
        with interrupt:
            waits.end()
            loop.run_until_complete(asyncio.sleep(0.003))  # longer than a pause
        waits.end().check()
        check_works(loop)
        loop.close()


@on_asyncios_loops
@any_interrupt
def test_task_interrupted_before_it_waits_leaves_no_waiter(new_loop, error, at):
    loop = new(new_loop)
    for interrupt in interrupts(_loops, error=error, at=at):
        waits = Waits(loop, 3)
        with interrupt:
            waits.park()
        waits.complete().end().check(interrupted=1)
        check_works(loop)
    loop.close()


@on_asyncios_loops
@any_interrupt
@pytest.mark.parametrize("where", ["elsewhere", "in a task", "in a burst"])
def test_thread_interrupted_during_completion_loses_no_waiter(new_loop, error, at, where):
    thread = "completing" if where == "in a burst" else None
    for interrupt in interrupts(_loops, error=error, at=at, thread=thread):
        loop = new(new_loop)
        if where == "in a burst":
            Waits(loop, 20).park().complete().end()
        waits = Waits(loop, 3).park()

        async def complete(waits=waits):
            waits.complete_here()

        with interrupt:
            if where == "in a task":
                loop.run_until_complete(complete())
            elif where == "in a burst":
                waits.complete_in_thread(thread, error)
            else:
                waits.complete_here()
        waits.complete_here()
        waits.end().check()
        check_works(loop)
        loop.close()


@on_asyncios_loops
@any_interrupt
@finalisers_may_be_interrupted
def test_interrupt_during_cancellation_loses_no_other_waiter(new_loop, error, at):
    for interrupt in interrupts(_loops, error=error, at=at):
        loop = new(new_loop)
        waits = Waits(loop, 6).park()
        for task in waits.tasks[::2]:
            task.cancel()
        waits.complete()
        with interrupt:
            waits.end()
        # The frames of the tasks that were cancelled in the same turn refer to the loop's pending
        # call, so only another task that waits renews it.
        check_works(loop)
        waits.end().check(interrupted=3)
        loop.close()


@on_asyncios_loops
@any_interrupt
@finalisers_may_be_interrupted
def test_interrupted_loop_cleanup_leaks_no_waiter_or_file(new_loop, error, at):
    def files():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = None
    for interrupt in interrupts(_loops, error=error, at=at):
        loop = new(new_loop)
        Waits(loop, 20).park().complete().end()
        left = Waits(loop, 20).park().complete()  # the loop closes before it wakes them
        for task in left.tasks:
            task._log_destroy_pending = False
        another = new(new_loop)
        loop.close()
        with interrupt:
            Waits(another, 1).park()  # cleans up after the closed loop
        check_works(another)
        another.close()
        del loop, left, task, another
        before = before or files()
    assert files() <= before


@any_interrupt
def test_waiting_task_renews_a_wake_up_lost_to_a_traceback(error, at):
    for interrupt in explorer.interrupts(_loop, _asyncio, error=error, at=at):
        loop = new(asyncio.SelectorEventLoop)
        waits = Waits(loop, 2).park().complete()
        with interrupt:  # keeps the traceback, and with it the loop's pending call
            waits.end()
        Waits(loop, 1).park().complete().end().check()
        waits.end().check()
        loop.close()


@on_asyncios_loops
def test_sleeping_loop_runs_a_call_from_a_signal_handler(new_loop):
    async def main():
        ours, called = _loops.current(), asyncio.Event()
        before = signal.signal(signal.SIGALRM, lambda *_: ours.call_soon(called.set))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            await asyncio.wait_for(called.wait(), PATIENCE)
        finally:
            signal.signal(signal.SIGALRM, before)

    loop = new(new_loop)
    begun = loop.time()
    loop.run_until_complete(main())
    assert loop.time() - begun < PATIENCE / 2
    loop.close()


@on_asyncios_loops
def test_loop_that_moves_between_threads_is_found_in_each(new_loop):
    async def thread_of_this_loop():
        return _loops.current().thread

    loop, threads = new(new_loop), []
    with running(lambda: threads.append(loop.run_until_complete(thread_of_this_loop()))):
        pass
    for _ in range(2):
        assert loop.run_until_complete(thread_of_this_loop()) == threading.get_ident()
        with running(lambda: threads.append(loop.run_until_complete(thread_of_this_loop()))):
            pass
    assert threading.get_ident() not in threads
    loop.close()


class ClosesWithinACall(asyncio.SelectorEventLoop):
    """Closes, as if by another thread, after a call has checked it and before it is registered."""

    closes = False

    def _check_closed(self):
        super()._check_closed()
        if self.closes:
            self.close()


def test_loop_closed_during_call_soon_keeps_no_function():
    async def main():
        return _loops.current()

    loop = new(ClosesWithinACall)
    ours = loop.run_until_complete(main())
    loop.closes = True

    def function():
        pass

    ref = weakref.ref(function)
    assert ours.call_soon(function) is False
    assert loop.is_closed()
    del function
    assert ref() is None


# ------------------------------------------------------------------ another kind of loop


class OneTask(_loops.Loop):
    """A loop that runs one task, and resumes it when its waiter is woken."""

    spawn = watch = unwatch = call_later = None  # only for devices and background tasks

    def __init__(self):
        super().__init__()
        self.calls = queue.SimpleQueue()

    def run(self, coroutine):
        try:
            while True:
                waiter = coroutine.send(None)
                while not waiter.woken:
                    self.calls.get(timeout=PATIENCE)()
        except StopIteration as ended:
            return ended.value

    def call_soon(self, function):
        self.calls.put(function)
        return True

    def new_waiter(self):
        return OneWait()

    def checkpoint(self):
        return ()

    def resume(self, waiter):
        waiter.woken = True


class OneWait:
    woken = False

    def __iter__(self):
        yield self


def test_new_kind_of_loop_needs_one_file_and_one_line(monkeypatch):
    loop = OneTask()
    monkeypatch.setitem(_loop.KINDS, "one_task", ("run", "_one_task"))
    file = types.SimpleNamespace(current=lambda: loop)
    monkeypatch.setitem(sys.modules, "torchfut_aio._loops._one_task", file)
    with pytest.raises(RuntimeError, match="no asyncio, uvloop or trio event loop runs here"):
        loop.run(value_of(Future()))
    monkeypatch.setitem(sys.modules, "one_task", types.SimpleNamespace(run=loop.run))

    async def main():
        return [await fut for fut in (first, second)]

    first, second = Future(), Future()
    with running(lambda: first.set_result(1), lambda: second.set_result(2)):
        assert loop.run(main()) == [1, 2]


# ------------------------------------------------------------------------------ trio


def contains(error, kind):
    return isinstance(error, kind) or any(
        contains(each, kind)
        for each in (error.__cause__, error.__context__, *getattr(error, "exceptions", ()))
        if each is not None
    )


def error_of(function):
    try:
        function()
    except BaseException as error:
        return error


@any_interrupt
@pytest.mark.parametrize("timers", ["timerfd", "of the loop"])
@pytest.mark.parametrize("where", ["elsewhere", "in a task"])
@finalisers_may_be_interrupted
def test_interrupted_trio_run_resumes_all_tasks_or_ends(error, at, where, timers, monkeypatch):
    if timers == "of the loop":
        monkeypatch.setattr(_alarm, "new_timer", lambda: None)

    async def wait(fut, got, interrupted):
        try:
            got.append(await fut)
        except error as raised:
            interrupted.append(raised)

    async def main():
        for _ in range(2):
            futures, got, interrupted = [Future() for _ in range(3)], [], []
            fired = trio.Event()
            with trio.fail_after(PATIENCE):
                async with trio.open_nursery() as nursery:
                    for fut in futures:
                        nursery.start_soon(wait, fut, got, interrupted)
                    await trio.testing.wait_all_tasks_blocked()
                    for fut in futures:
                        if where == "elsewhere":
                            with running(lambda fut=fut: fut.set_result(None)):
                                pass
                        else:
                            try:
                                fut.set_result(None)
                            except error as raised:
                                interrupted.append(raised)
            assert len(got) >= 3 - len(interrupted)
            alarm = _loops.current().alarm(fired.set)
            alarm.set(0.001)
            with trio.fail_after(PATIENCE):
                await fired.wait()
            alarm.close()
            await trio.testing.wait_all_tasks_blocked()

    for interrupt in interrupts(_loops, error=error, at=at):
        with interrupt:
            raised = error_of(lambda: trio.run(main))
        assert raised is None or contains(raised, error), interrupt
    trio.run(main)


def test_trio_task_rescheduled_by_others_raises_and_cleans_up():
    async def main():
        fut, tasks, errors = Future(), [], []

        async def wait():
            tasks.append(trio.lowlevel.current_task())
            try:
                await fut
            except RuntimeError as error:
                errors.append(str(error))
            return await fut

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            trio.lowlevel.reschedule(tasks[0])
            await trio.testing.wait_all_tasks_blocked()
            assert "waiters=1" in repr(fut)  # the second await
            with running(lambda: fut.set_result(5)):
                pass
        assert len(errors) == 1
        assert "other code has rescheduled" in errors[0]

    trio.run(main)


# ------------------------------------------------------------------------- the alarm


@on_asyncios_loops
@any_interrupt
@finalisers_may_be_interrupted
def test_interrupted_alarm_works_and_closes_no_other_file(new_loop, error, at):
    for interrupt in interrupts(_alarm, error=error, at=at):
        loop = new(new_loop)
        fired = asyncio.Event()

        async def fires(alarm, seconds=0.0, fired=fired):
            fired.clear()
            alarm.set(seconds)
            await asyncio.wait_for(fired.wait(), PATIENCE)

        async def use(fires=fires, fired=fired):
            alarm = _loops.current().alarm(fired.set)
            used.append(alarm)
            await fires(alarm)
            alarm.set(PATIENCE)
            await fires(alarm, 1e-5)
            alarm.close()
            await fires(alarm)

        used = []
        with interrupt, suppress(TimeoutError):
            loop.run_until_complete(use())
        if used:
            run(loop, loop.create_task(fires(used[0])))
        run(loop, loop.create_task(use()))
        used.clear()
        one, other = socket.socketpair()
        with one, other:
            one.setblocking(False)
            loop.call_soon(other.send, b"hello")
            receive = asyncio.wait_for(loop.sock_recv(one, 10), PATIENCE)
            assert run(loop, loop.create_task(receive)) == b"hello"
        loop.close()


@on_asyncios_loops
def test_alarm_with_a_raising_function_neither_stops_nor_spins(new_loop):
    calls = []

    def fails():
        calls.append(None)
        if len(calls) < 20:
            raise ValueError
        done.set()

    async def main():
        alarm = _loops.current().alarm(fails)
        alarm.set(0.0)
        await asyncio.wait_for(done.wait(), PATIENCE)
        start = loop.time()
        await asyncio.sleep(0.02)
        assert len(calls) == 20
        alarm.close()
        return start

    loop, done = new(new_loop), asyncio.Event()
    begun = loop.time()
    ended = loop.run_until_complete(main())
    assert ended - begun > 0.015  # about a millisecond each
    loop.close()


# ---------------------------------------------------------------------- real signals


class AlarmInTheLoop(Alarm):
    """Does not interrupt asyncio's `run_forever`, which would leave the loop marked as running."""

    def interrupt(self, signum, frame):
        if frame.f_code.co_name == "run_forever":
            signal.setitimer(signal.ITIMER_REAL, 5e-4)
        else:
            super().interrupt()


# An interrupt may end asyncio.wait after it has made a coroutine and before it awaits it.
@pytest.mark.filterwarnings("ignore:coroutine '_?wait' was never awaited:RuntimeWarning")
@on_asyncios_loops
def test_real_ctrl_c_leaves_the_loop_responsive(new_loop):
    interrupted = 0
    with AlarmInTheLoop() as alarm:
        loop = new(new_loop)

        async def wait_for_tasks(waits, microseconds):
            alarm.armed = True
            signal.setitimer(signal.ITIMER_REAL, microseconds / 1e6)
            await asyncio.wait(waits.tasks)
            alarm.armed = False

        for n in range(600):
            waits = Waits(loop, 1 + 19 * (n % 7 == 0)).park().complete()
            waiting = loop.create_task(wait_for_tasks(waits, n % 150 + 1))
            try:
                loop.run_until_complete(waiting)
            except KeyboardInterrupt:
                interrupted += 1
                alarm.armed = False
                Waits(loop, 1).park().complete().end().check()
            waiting.cancel()
        check_works(loop)
        loop.close()
    assert interrupted > 50

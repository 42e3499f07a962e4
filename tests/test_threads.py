"""The package's threads: their promises, with interrupts at every point."""

from __future__ import annotations

import gc
import sys
import textwrap
import threading
from collections import deque

import pytest

from torchfut_aio import _threads
from torchfut_aio._threads import BlockingThread, QueueWorker

from . import explorer, forks
from .threads import (
    PATIENCE,
    cannot_start,
    no_thread_starts,
    running,
    until,
)

NAME = "torchfut_aio worker in a test"


class EventWorker(QueueWorker):
    """A worker whose work items are events to set, or functions to call."""

    def __init__(self, linger=0.0):
        super().__init__(NAME)
        self.linger = linger
        self.inside = self.most = 0
        self.used = set()

    def run(self, thread):
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.used.add(thread)
        try:
            while not thread.should_end:
                for item in self.take():
                    if self.work.pop(item, self) is not self:
                        getattr(item, "set", item)()
                if not self.work and not self.rest(self.linger):
                    return
        finally:
            self.inside -= 1


def threads():
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def submits(worker):
    """Submit an event, and return it."""
    event = threading.Event()
    worker.submit(event)
    return event


def submits_beside(worker):
    """Submit an event in another thread, and return it."""
    events = []
    with running(lambda: events.append(submits(worker))):
        pass
    return events[0]


# ------------------------------------------------------------------------------- work


def test_worker_runs_submitted_work_and_its_thread_ends():
    worker = EventWorker()
    for _ in range(100):
        assert submits(worker).wait(PATIENCE)
    until(lambda: not threads())
    assert worker.work == {}


def test_lingering_thread_runs_later_work():
    worker = EventWorker(linger=PATIENCE)
    for _ in range(100):
        assert submits(worker).wait(PATIENCE)
        assert len(threads()) == 1
    assert len(worker.used) == 1
    assert worker.end(PATIENCE)
    assert not threads()


def test_worker_runs_concurrent_submissions_one_thread_at_a_time():
    worker, events = EventWorker(), []
    for _ in range(50):
        with running(*[lambda: events.append(submits(worker))] * 6):
            pass
    assert all(event.wait(PATIENCE) for event in events)
    assert worker.most == 1
    until(lambda: not threads())


def test_finalisers_can_submit_work_at_any_time():
    worker, events = EventWorker(), []

    class Finalised:
        def __init__(self):
            self.me = self  # a cycle: only the collector frees it, at any allocation

        def __del__(self):
            events.append(submits(worker))

    threshold = gc.get_threshold()
    gc.set_threshold(7)
    try:
        for _ in range(300):
            Finalised()
            events.append(submits(worker))
    finally:
        gc.set_threshold(*threshold)
    until(lambda: gc.collect() is not None and len(events) == 600)
    assert all(event.wait(PATIENCE) for event in events)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_work_left_by_a_failed_thread_is_run_by_another(kind):
    def fails():
        raise kind

    worker = EventWorker()
    with running(lambda: worker.submit(fails), lambda: worker.submit(fails)):
        events = [submits(worker) for _ in range(3)]
    assert all(event.wait(PATIENCE) for event in events)


# --------------------------------------------------------------------- a start that fails


def test_failed_thread_start_fails_only_one_submission():
    worker = EventWorker()
    with no_thread_starts():
        with pytest.raises(RuntimeError, match="can't start new thread"):
            submits(worker)
    assert not worker.work
    assert not worker.new
    assert submits(worker).wait(PATIENCE)


def test_submission_does_not_rely_on_a_failed_thread_start(monkeypatch):
    worker, events = EventWorker(), []

    def start_other_first(thread):
        patch.undo()
        events.append(submits_beside(worker))
        cannot_start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_other_first)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            submits(worker)
    assert events[0].wait(PATIENCE)


# --------------------------------------------------------------- interrupted at every point
# Not within CPython's threading, where no signal handler runs: test_timeouts.py has real signals.


@pytest.mark.parametrize("has_thread", [False, True])
def test_interrupted_submission_loses_its_item_and_no_other(has_thread):
    for interrupt in explorer.interrupts(_threads):
        worker, event = EventWorker(PATIENCE if has_thread else 0), threading.Event()
        before = submits(worker)
        until(before.is_set if has_thread else lambda: not threads())
        with interrupt:
            worker.submit(event)
        assert interrupt.raised == (interrupt.where is not None), interrupt
        assert interrupt.raised or event.wait(PATIENCE), interrupt
        assert submits(worker).wait(PATIENCE), interrupt
        assert not worker.work, interrupt
        worker.end(PATIENCE)
        until(lambda: not threads())


def test_interrupted_submission_takes_no_other_threads_work_away():
    def submit_beside_and_interrupt():
        events.append(submits_beside(worker))
        raise KeyboardInterrupt

    for interrupt in explorer.interrupts(_threads, do=submit_beside_and_interrupt):
        worker, events = EventWorker(), []
        try:
            with interrupt:
                events.append(submits(worker))
        except KeyboardInterrupt:
            pass
        assert len(events) == 1
        assert events[0].wait(PATIENCE), interrupt
        until(lambda: not threads())


@pytest.mark.parametrize("submit", [submits, submits_beside])
def test_work_submitted_during_another_submission_is_run(submit):
    for interrupt in explorer.interrupts(_threads, do=lambda: events.append(submit(worker))):
        worker, events = EventWorker(), []
        with interrupt:
            events.append(submits(worker))
        assert len(events) == 1 + (interrupt.where is not None)
        assert all(event.wait(PATIENCE) for event in events), interrupt
        assert worker.most == 1
        until(lambda: not threads())


@pytest.mark.parametrize("linger", [0.0, 0.01])
def test_work_submitted_at_any_step_of_the_thread_is_run(linger):
    for interrupt in explorer.interrupts(
        _threads, thread=NAME, do=lambda: events.append(submits_beside(worker))
    ):
        worker, events = EventWorker(linger), []
        with interrupt:
            events.append(submits(worker))
            until(lambda: not threads())
        assert len(events) == 1 + (interrupt.where is not None)
        assert all(event.wait(PATIENCE) for event in events), interrupt
        assert worker.most == 1


# ----------------------------------------------------------------------- blocking threads

BLOCKING = f"{NAME} that blocks"


def blocked(thread, function=lambda: None):
    """Submit a function; return an event that is set when it has been called."""
    event = threading.Event()
    thread.submit(lambda error: event.set(), function)
    return event


def test_call_withdrawn_from_a_blocking_thread_harms_no_other():
    def withdraw():
        blocking.work.pop(first, None)

    notified = []
    for interrupt in explorer.interrupts(_threads, thread=BLOCKING, do=withdraw):
        blocking, first = BlockingThread(BLOCKING), notified.append
        with interrupt:
            blocking.submit(first, lambda: None)
            assert blocked(blocking).wait(PATIENCE), interrupt
        assert blocked(blocking).wait(PATIENCE), interrupt
        assert not blocking.work
    assert notified


def test_submitting_at_any_step_of_a_blocking_thread_gets_called():
    for interrupt in explorer.interrupts(
        _threads, thread=BLOCKING, do=lambda: events.append(blocked(blocking))
    ):
        blocking, events = BlockingThread(BLOCKING), []
        with interrupt:
            events.append(blocked(blocking))
            until(lambda: interrupt.where or not blocking.threads())
        assert all(event.wait(PATIENCE) for event in events), interrupt


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_notification_that_raises_does_not_end_a_blocking_thread(error, caplog):
    def fails(_):
        raise error

    blocking, release = BlockingThread(BLOCKING), threading.Event()
    event = blocked(blocking, lambda: release.wait(PATIENCE))
    for _ in range(3):
        blocking.submit(fails, int)
    last = blocked(blocking)
    release.set()
    assert event.wait(PATIENCE)
    assert last.wait(PATIENCE)
    until(lambda: not blocking.threads())


class EarlyTakenQueue(deque):
    """New items, each of which the thread finds just before it is listed as new."""

    def append(self, item):
        self.worker.ensure_thread()
        until(lambda: not self.worker.has_work())
        super().append(item)


def test_call_that_is_found_twice_is_made_once():
    blocking, called = BlockingThread(BLOCKING), []
    blocking.new = EarlyTakenQueue()
    blocking.new.worker = blocking
    blocking.submit(lambda error: None, lambda: called.append(1))
    assert blocked(blocking).wait(PATIENCE)
    assert called == [1]


def test_blocking_call_is_shared_and_each_waiter_gets_its_error():
    def fails():
        calls.append(len(errors))
        raise ValueError("once")

    blocking, release = BlockingThread(BLOCKING), threading.Event()
    blocked(blocking, lambda: release.wait(PATIENCE))
    calls, errors = [], []
    for _ in range(3):
        blocking.submit(lambda error: errors.append(error), fails)
    last = blocked(blocking)
    release.set()
    assert last.wait(PATIENCE)
    assert calls == [0]
    assert [str(error) for error in errors] == ["once"] * 3
    assert len({id(error) for error in errors}) == 3


# ------------------------------------------------------------------------------- the end


def test_end_waits_for_the_thread_and_hands_over_remaining_work():
    worker, release = EventWorker(), threading.Event()
    began = threading.Event()
    worker.submit(lambda: (began.set(), release.wait(PATIENCE)))
    assert began.wait(PATIENCE)
    [thread] = threads()
    assert not worker.end(0.01)
    event = submits(worker)
    release.set()
    thread.join(PATIENCE)
    assert event.wait(PATIENCE)
    assert worker.end(PATIENCE)
    assert not worker.threads()


def test_end_at_any_step_of_a_submission_loses_no_work():
    for interrupt in explorer.interrupts(_threads, do=lambda: worker.end(PATIENCE)):
        worker = EventWorker(linger=0.01)
        with interrupt:
            event = submits(worker)
        assert event.wait(PATIENCE), interrupt
        until(lambda: not threads())


def python(program):
    return forks.output(PRELUDE + textwrap.dedent(program))


PRELUDE = """
import atexit, os, sys, threading, warnings
from torchfut_aio._threads import QueueWorker

class Prints(QueueWorker):
    def __init__(self, ready=True):
        super().__init__("prints")
        self.ready = ready

    def run(self, thread):
        while not thread.should_end:
            if self.ready:
                for item in self.take():
                    if self.work.pop(item, self) is not self:
                        print(item, flush=True)
                return
            self.rest(30)

"""


@pytest.mark.parametrize("survives", [False, True])
def test_forked_child_runs_inheritable_and_new_work(survives):
    printed = python(f"""
        Prints.survives_fork = {survives}
        worker = Prints(ready=False)
        worker.submit("pending")
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0
            os._exit(0)
        worker.ready = True
        worker.wake()
        for thread in worker.threads():
            thread.join(30)
        worker.submit("new")
        for thread in worker.threads():
            thread.join(30)
        os._exit(0)
    """)
    assert printed.split() == ["pending", "new"][not survives :]


def test_exit_ends_daemon_threads_and_joins_others():
    printed = python("""
        class Ended(Prints):
            timeout_at_exit = 30

            def run(self, thread):
                super().run(thread)
                print("ended", thread.should_end, flush=True)

        class Waited(Prints):
            def run(self, thread):
                threading.main_thread().join()  # which returns when the interpreter waits
                super().run(thread)

        workers = Ended(ready=False), Prints(ready=False), Waited()
        workers[2].daemon = False
        for worker in workers:
            worker.submit("work")
    """)
    assert sorted(printed.splitlines()) == ["ended True", "work"]


def test_work_submitted_at_interpreter_exit_is_run_or_refused():
    printed = python("""
        def late():
            try:
                worker.submit("late")
            except RuntimeError as error:
                print(f"{error}: {worker.work}")
            for thread in worker.threads():
                thread.join(30)

        worker = Prints()
        atexit.register(late)
    """)
    if sys.version_info[:2] == (3, 12):  # 3.12 starts no thread at exit
        assert printed == "can't create new thread at interpreter shutdown: {}\n"
    else:
        assert printed == "late\n"

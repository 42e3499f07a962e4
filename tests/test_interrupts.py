"""Ctrl-C in the middle of a completion, delivered for real, at every place by chance."""

from __future__ import annotations

import gc
import itertools
import signal
import time

import pytest
import torch

from torchfut_aio import Future, _core, as_completed, gather, wait_all

from .threads import PATIENCE, running, until


class Alarm:
    """Strikes this thread with KeyboardInterrupt, once, about when something happens in it.

    How long it takes to get there, and for a signal to arrive, depends on the machine, on what
    else runs there, and on the Python. So the alarm aims by where it has struck so far: earlier
    or later, until about half of its strikes come before that. Around there it scatters as far
    as what is struck takes, either way.
    """

    def __init__(self):
        self.armed = False
        self.aim = 0.0  # microseconds
        self.took = 20.0
        self.turn = itertools.count()

    def __enter__(self):
        gc.disable()  # what other tools hooked into it could be struck instead
        self.before = signal.signal(signal.SIGALRM, self.strike)
        return self

    def __exit__(self, *error):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)
        gc.enable()

    def strike(self, *args):
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt

    def set(self):
        """Has it strike; if it should be even earlier than at once, returns that much later."""
        after = self.aim + self.took * (next(self.turn) % 64 / 32 - 0.5)
        self.armed = True
        signal.setitimer(signal.ITIMER_REAL, max(after, 1) / 1e6)
        start = time.perf_counter()
        while time.perf_counter() - start < -after / 1e6:
            pass

    def learn(self, early):
        """Is told whether it struck before what it should strike about."""
        self.aim += self.took / 64 if early else -self.took / 64


class Waiter:
    """Counts how often it is woken; its own waker, too."""

    woken = 0

    def wake(self, _waiter):
        self.woken += 1


def struck(complete, fut, alarm):
    """Tells whether the alarm struck before ``complete`` had returned, about when it is done."""
    start = time.perf_counter()
    try:
        alarm.set()
        start = time.perf_counter()
        complete()
        alarm.armed = False
    except KeyboardInterrupt:
        alarm.learn(early=not fut.done())
        return True
    alarm.learn(early=False)
    took = (time.perf_counter() - start) * 1e6
    alarm.took += (min(took, 4 * alarm.took) - alarm.took) / 64  # or it was preempted
    return False


def rounds(number, enough):
    """Yields so often, and then until ``enough()``."""
    for n in itertools.count():
        if n == number:
            give_up = time.monotonic() + PATIENCE
        if n >= number:
            if enough():
                return
            assert time.monotonic() < give_up, "the alarm has not struck where it should"
        yield


@pytest.mark.parametrize("first", ["waiter", "callback"])
@pytest.mark.parametrize("outcome", [5, ValueError("foo")], ids=["result", "error"])
def test_ctrl_c_in_set_result_leaves_it_complete_or_undone(outcome, first):
    strikes = untouched = 0
    with Alarm() as alarm:
        for _ in rounds(12_000, lambda: strikes > untouched > 0):
            fut, waiter, ran = Future(), Waiter(), []
            enter = [
                lambda fut=fut, waiter=waiter: _core.add_waiter(fut, waiter, waiter),
                lambda fut=fut, ran=ran: fut.add_done_callback(ran.append),
            ]
            for step in enter if first == "waiter" else reversed(enter):
                step()
            is_error = isinstance(outcome, Exception)
            setter = fut.set_exception if is_error else fut.set_result
            if not struck(lambda setter=setter: setter(outcome), fut, alarm):
                assert (fut.done(), waiter.woken, ran) == (True, 1, [fut])
                continue
            strikes += 1
            if fut.done():
                assert torch._C.Future.done(fut)
                assert waiter.woken >= 1
                assert len(ran) <= 1
            else:
                untouched += 1
                assert (waiter.woken, ran) == (0, [])
                setter(outcome)
            assert (fut.exception() if is_error else fut.value()) is outcome


def test_ctrl_c_in_a_setter_leaves_no_child_pending():
    strikes = 0
    with Alarm() as alarm:
        for _ in rounds(12_000, lambda: strikes > 0):
            fut = Future()
            child = fut.then(lambda f: "child")
            if struck(lambda fut=fut: fut.set_result(5), fut, alarm) and fut.done():
                strikes += 1
                assert child.done()
                assert child.exception() or child.value() == "child"


def test_ctrl_c_in_a_setter_loses_no_dependent_completion():
    strikes = 0
    with Alarm() as alarm:
        for _ in rounds(12_000, lambda: strikes > 0):
            fut = Future()
            combined, completed = gather([fut]), as_completed([fut])
            if struck(lambda fut=fut: fut.set_result(5), fut, alarm) and fut.done():
                strikes += 1
                assert combined.done()
                assert combined.exception() or combined.value() == [5]
                assert next(completed) is fut


def test_interrupted_wait_all_leaves_no_callback_behind(ctrl_c):
    fut = Future()

    def interrupt():
        until(lambda: "callbacks=1" in repr(fut))
        ctrl_c()

    with running(interrupt), pytest.raises(KeyboardInterrupt):
        wait_all([fut])
    assert repr(fut) == "<Future pending waiters=0 callbacks=0>"

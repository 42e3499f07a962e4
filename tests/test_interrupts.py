"""Real Ctrl-C during a completion, at random points."""

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
    """Raises KeyboardInterrupt once in this thread, at about the moment of some event.

    How long the event and the signal take depends on the machine, its load and the Python. So the
    alarm learns from its interrupts: it aims earlier or later until about half of them come before
    the event. Around that time it varies over twice the duration of the interrupted call.
    """

    def __init__(self):
        self.armed = False
        self.aim = 0.0  # microseconds
        self.duration = 20.0
        self.turn = itertools.count()

    def __enter__(self):
        gc.disable()  # finalisers of other tools could be interrupted instead
        self.before = signal.signal(signal.SIGALRM, self.interrupt)
        return self

    def __exit__(self, *error):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)
        gc.enable()

    def interrupt(self, *args):
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt

    def set(self):
        """Start the alarm. If it should fire before now, return only that much later."""
        after = self.aim + self.duration * (next(self.turn) % 64 / 32 - 0.5)
        self.armed = True
        signal.setitimer(signal.ITIMER_REAL, max(after, 1) / 1e6)
        start = time.perf_counter()
        while time.perf_counter() - start < -after / 1e6:
            pass

    def learn(self, early):
        """Learn whether the interrupt came before the event."""
        self.aim += self.duration / 64 if early else -self.duration / 64


class Waiter:
    """Counts how often it is woken; it is its own waker."""

    woken = 0

    def wake(self, _waiter):
        self.woken += 1


def interrupted(complete, fut, alarm):
    """Return whether the alarm interrupted ``complete``; aim at the moment when it is done."""
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
    duration = (time.perf_counter() - start) * 1e6
    alarm.duration += (
        min(duration, 4 * alarm.duration) - alarm.duration
    ) / 64  # or the thread was preempted
    return False


def rounds(number, enough):
    """Yield ``number`` times, and then until ``enough()``."""
    for n in itertools.count():
        if n == number:
            give_up = time.monotonic() + PATIENCE
        if n >= number:
            if enough():
                return
            assert time.monotonic() < give_up, "the alarm has not interrupted where it should"
        yield


@pytest.mark.parametrize("first", ["waiter", "callback"])
@pytest.mark.parametrize("outcome", [5, ValueError("foo")], ids=["result", "error"])
def test_ctrl_c_in_set_result_leaves_it_complete_or_undone(outcome, first):
    interrupts = untouched = 0
    with Alarm() as alarm:
        for _ in rounds(12_000, lambda: interrupts > untouched > 0):
            fut, waiter, ran = Future(), Waiter(), []
            enter = [
                lambda fut=fut, waiter=waiter: _core.add_waiter(fut, waiter, waiter),
                lambda fut=fut, ran=ran: fut.add_done_callback(ran.append),
            ]
            for step in enter if first == "waiter" else reversed(enter):
                step()
            is_error = isinstance(outcome, Exception)
            setter = fut.set_exception if is_error else fut.set_result
            if not interrupted(lambda setter=setter: setter(outcome), fut, alarm):
                assert (fut.done(), waiter.woken, ran) == (True, 1, [fut])
                continue
            interrupts += 1
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
    interrupts = 0
    with Alarm() as alarm:
        for _ in rounds(12_000, lambda: interrupts > 0):
            fut = Future()
            child = fut.then(lambda f: "child")
            if interrupted(lambda fut=fut: fut.set_result(5), fut, alarm) and fut.done():
                interrupts += 1
                assert child.done()
                assert child.exception() or child.value() == "child"


def test_ctrl_c_in_a_setter_loses_no_dependent_completion():
    interrupts = 0
    with Alarm() as alarm:
        for _ in rounds(12_000, lambda: interrupts > 0):
            fut = Future()
            combined, completed = gather([fut]), as_completed([fut])
            if interrupted(lambda fut=fut: fut.set_result(5), fut, alarm) and fut.done():
                interrupts += 1
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

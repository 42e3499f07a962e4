"""Ctrl-C in the middle of a completion, delivered for real, at every place by chance."""

from __future__ import annotations

import gc
import signal

import pytest
import torch

from torchfut_aio import Future, as_completed, gather, wait_all


class Alarm:
    """Strikes this thread with KeyboardInterrupt after some microseconds, once."""

    def __init__(self):
        self.armed = False

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

    def set(self, microseconds):
        self.armed = True
        signal.setitimer(signal.ITIMER_REAL, microseconds / 1e6)


class Waiter:
    """Counts how often it is woken."""

    woken = 0

    def wake(self):
        self.woken += 1


def struck(complete, alarm, microseconds):
    """Tells whether the alarm struck during ``complete``."""
    try:
        alarm.set(microseconds)
        complete()
        alarm.armed = False
    except KeyboardInterrupt:
        return True
    return False


@pytest.mark.parametrize("first", ["waiter", "callback"])
@pytest.mark.parametrize("outcome", [5, ValueError("foo")], ids=["result", "error"])
def test_ctrl_c_in_a_setter_leaves_a_future_untouched_or_everybody_served(outcome, first):
    strikes = untouched = 0
    with Alarm() as alarm:
        for n in range(60_000):
            fut, waiter, ran = Future(), Waiter(), []
            enter = [
                lambda fut=fut, waiter=waiter: fut._enter(waiter, fut._entries),
                lambda fut=fut, ran=ran: fut.add_done_callback(ran.append),
            ]
            for step in enter if first == "waiter" else reversed(enter):
                step()
            is_error = isinstance(outcome, Exception)
            setter = fut.set_exception if is_error else fut.set_result
            if not struck(lambda setter=setter: setter(outcome), alarm, n % 40 + 1):
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
    # The alarm rings by the clock, so only that it struck on both sides is certain.
    assert strikes > untouched > 0


def test_ctrl_c_in_a_setter_leaves_no_child_pending():
    strikes = 0
    with Alarm() as alarm:
        for n in range(60_000):
            fut = Future()
            child = fut.then(lambda f: "child")
            if struck(lambda fut=fut: fut.set_result(5), alarm, n % 40 + 5) and fut.done():
                strikes += 1
                assert child.done()
                assert child.exception() or child.value() == "child"
    assert strikes > 0


def test_ctrl_c_in_a_setter_loses_no_combined_future_and_no_arrival():
    strikes = 0
    with Alarm() as alarm:
        for n in range(40_000):
            fut = Future()
            combined, completed = gather([fut]), as_completed([fut])
            if struck(lambda fut=fut: fut.set_result(5), alarm, n % 40 + 10) and fut.done():
                strikes += 1
                assert combined.done()
                assert next(completed) is fut
    assert strikes > 0


def test_an_interrupted_wait_all_withdraws():
    fut = Future()
    with Alarm() as alarm:
        assert struck(lambda: wait_all([fut]), alarm, 20_000)
    assert repr(fut) == "<Future pending waiters=0 callbacks=0>"

"""The queue of a loop: no order of steps loses a waiter."""

from __future__ import annotations

import pytest

from torchfut_aio._loops._loop import Loop


class ManualLoop(Loop):
    """A loop that runs only when the test calls `turn`; no task waits on it."""

    checkpoint = spawn = watch = unwatch = call_later = None

    def __init__(self):
        super().__init__()
        self.closed = False
        self.wake_ups = 0
        self.resumed = []
        self.interrupt_at = None
        self.scheduled = []

    def call_soon(self, function):
        if not self.closed:
            self.wake_ups += 1
            self.scheduled.append(function)
        return not self.closed

    def new_waiter(self):
        return object()

    def resume(self, waiter):
        if waiter == self.interrupt_at:
            self.interrupt_at = None
            raise KeyboardInterrupt
        self.resumed.append(waiter)

    def turn(self):
        for _ in range(len(self.scheduled)):
            call = self.scheduled.pop(0)  # referenced while it runs, as in real loops
            call()


def test_posts_cause_one_wake_up_per_turn_of_the_loop():
    loop = ManualLoop()
    for n in range(5):
        loop.wake(n)
    assert loop.wake_ups == 1
    loop.turn()
    assert loop.resumed == [0, 1, 2, 3, 4]
    loop.wake(5)
    assert loop.wake_ups == 2


def test_post_during_a_turn_is_handled_in_the_next_turn():
    loop = ManualLoop()
    loop.wake("first")
    real = loop.resume

    def resume(waiter):
        loop.wake("second")
        real(waiter)

    loop.resume = resume
    loop.turn()
    assert (loop.resumed, loop.wake_ups) == (["first"], 2)
    loop.resume = real
    loop.turn()
    assert loop.resumed == ["first", "second"]


def test_turn_interrupted_by_ctrl_c_continues_in_the_next():
    loop = ManualLoop()
    for n in range(5):
        loop.wake(n)
    loop.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        loop.turn()
    assert (loop.resumed, loop.wake_ups) == ([0, 1], 2)
    loop.turn()
    assert loop.resumed == [0, 1, 2, 3, 4]


def test_post_after_an_interrupted_wake_up_wakes_the_loop():
    loop = ManualLoop()
    real = loop.call_soon

    def interrupted(function):
        raise KeyboardInterrupt

    loop.call_soon = interrupted
    with pytest.raises(KeyboardInterrupt):
        loop.wake(0)
    loop.call_soon = real
    loop.wake(1)
    loop.turn()
    assert loop.resumed == [0, 1]


def test_closed_loop_keeps_no_posts():
    loop = ManualLoop()
    loop.wake(0)
    loop.closed = True
    loop.scheduled.clear()
    assert not loop.queue
    loop.wake(1)
    assert not loop.queue


def test_inbox_schedules_another_call_if_the_loop_drops_one():
    loop = ManualLoop()
    loop.wake(0)
    loop.scheduled.pop()  # KeyboardInterrupt was raised before the call
    assert loop.wake_ups == 2
    loop.turn()
    assert (loop.resumed, loop.wake_ups) == ([0], 2)  # a call that has run is not scheduled again
    loop.wake(1)
    loop.turn()
    assert (loop.resumed, loop.wake_ups) == ([0, 1], 3)


def test_renew_wake_up_replaces_a_lost_wake_up_only_once():
    loop = ManualLoop()
    loop.wake(0)
    kept = loop.scheduled.pop()
    for _ in range(3):
        loop.renew_wake_up()
    assert loop.wake_ups == 2
    loop.turn()
    assert loop.resumed == [0]
    del kept
    assert loop.wake_ups == 2


def test_waiter_announces_each_wait_on_any_kind_of_loop(monkeypatch):
    loop, announced = ManualLoop(), []
    monkeypatch.setattr(Loop, "before_wait", lambda loop: announced.append(loop))
    loop.waiter()
    assert (announced, loop.wake_ups) == ([loop], 0)
    loop.wake(0)
    loop.waiter()
    assert (announced, loop.wake_ups) == ([loop, loop], 2)  # the pending wake-up may be lost

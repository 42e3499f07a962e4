"""What is posted to a loop: no order of steps leaves a waiter behind."""

from __future__ import annotations

import pytest

from torchfut_aio._loops._loop import Loop


class HandCrankedLoop(Loop):
    """A loop whose turns the test takes, and on which no task waits."""

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
            call = self.scheduled.pop(0)  # kept while it runs, as the loops keep it
            call()


def test_any_number_of_posts_are_one_wake_up_until_the_loop_has_looked():
    loop = HandCrankedLoop()
    for n in range(5):
        loop.wake(n)
    assert loop.wake_ups == 1
    loop.turn()
    assert loop.resumed == [0, 1, 2, 3, 4]
    loop.wake(5)
    assert loop.wake_ups == 2


def test_a_post_that_arrives_during_a_turn_is_seen_in_another():
    loop = HandCrankedLoop()
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


def test_a_turn_that_ctrl_c_cuts_short_goes_on_in_another():
    loop = HandCrankedLoop()
    for n in range(5):
        loop.wake(n)
    loop.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        loop.turn()
    assert (loop.resumed, loop.wake_ups) == ([0, 1], 2)
    loop.turn()
    assert loop.resumed == [0, 1, 2, 3, 4]


def test_ctrl_c_while_the_loop_is_being_woken_lets_the_next_post_wake_it():
    loop = HandCrankedLoop()
    real = loop.call_soon

    def struck(function):
        raise KeyboardInterrupt

    loop.call_soon = struck
    with pytest.raises(KeyboardInterrupt):
        loop.wake(0)
    loop.call_soon = real
    loop.wake(1)
    loop.turn()
    assert loop.resumed == [0, 1]


def test_a_closed_loop_keeps_nothing():
    loop = HandCrankedLoop()
    loop.wake(0)
    loop.closed = True
    loop.scheduled.clear()
    assert not loop.queue
    loop.wake(1)
    assert not loop.queue


def test_a_loop_that_drops_the_call_it_was_to_make_is_asked_for_another():
    loop = HandCrankedLoop()
    loop.wake(0)
    loop.scheduled.pop()  # Ctrl-C struck before it was made
    assert loop.wake_ups == 2
    loop.turn()
    assert (loop.resumed, loop.wake_ups) == ([0], 2)  # a call that was made is not asked for again
    loop.wake(1)
    loop.turn()
    assert (loop.resumed, loop.wake_ups) == ([0, 1], 3)


def test_who_is_about_to_wait_renews_a_wake_up_that_a_traceback_keeps_but_once():
    loop = HandCrankedLoop()
    loop.wake(0)
    kept = loop.scheduled.pop()
    for _ in range(3):
        loop.renew_wake_up()
    assert loop.wake_ups == 2
    loop.turn()
    assert loop.resumed == [0]
    del kept
    assert loop.wake_ups == 2


def test_each_wait_of_a_task_is_announced_on_any_kind_of_loop(monkeypatch):
    loop, announced = HandCrankedLoop(), []
    monkeypatch.setattr(Loop, "before_wait", lambda loop: announced.append(loop))
    loop.waiter()
    assert (announced, loop.wake_ups) == ([loop], 0)
    loop.wake(0)
    loop.waiter()
    assert (announced, loop.wake_ups) == ([loop, loop], 2)  # that under way may be lost

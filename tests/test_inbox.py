"""The inbox of a loop, on its own: no order of steps leaves a waiter behind."""

from __future__ import annotations

import pytest

from torchfut_aio._loops._inbox import Inbox


class HandCrankedLoop(Inbox):
    """A loop whose turns the test takes."""

    def __init__(self):
        super().__init__()
        self.closed = False
        self.wake_ups = 0
        self.resumed = []
        self.interrupt_at = None

    def _call_soon(self):
        if not self.closed:
            self.wake_ups += 1
        return not self.closed

    def _resume(self, waiters, count):
        for _ in range(count):
            if waiters[0] == self.interrupt_at:
                self.interrupt_at = None
                raise KeyboardInterrupt
            self.resumed.append(waiters[0])
            del waiters[0]

    def turn(self):
        self._serve()


def test_any_number_of_posts_are_one_wake_up_until_the_loop_has_looked():
    loop = HandCrankedLoop()
    for n in range(5):
        loop.post(n)
    assert loop.wake_ups == 1
    loop.turn()
    assert loop.resumed == [0, 1, 2, 3, 4]
    loop.post(5)
    assert loop.wake_ups == 2


def test_a_post_that_arrives_during_a_turn_is_seen_in_another():
    loop = HandCrankedLoop()
    loop.post("first")
    real = loop._resume

    def resume(waiters, count):
        loop.post("second")
        real(waiters, count)

    loop._resume = resume
    loop.turn()
    assert (loop.resumed, loop.wake_ups) == (["first"], 2)
    loop._resume = real
    loop.turn()
    assert loop.resumed == ["first", "second"]


def test_a_turn_that_ctrl_c_cuts_short_goes_on_in_another():
    loop = HandCrankedLoop()
    for n in range(5):
        loop.post(n)
    loop.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        loop.turn()
    assert (loop.resumed, loop.wake_ups) == ([0, 1], 2)
    loop.turn()
    assert loop.resumed == [0, 1, 2, 3, 4]


def test_ctrl_c_while_the_loop_is_being_woken_lets_the_next_post_wake_it():
    loop = HandCrankedLoop()
    real = loop._call_soon

    def struck():
        raise KeyboardInterrupt

    loop._call_soon = struck
    with pytest.raises(KeyboardInterrupt):
        loop.post(0)
    loop._call_soon = real
    loop.post(1)
    loop.turn()
    assert loop.resumed == [0, 1]


def test_a_closed_loop_keeps_nothing():
    loop = HandCrankedLoop()
    loop.post(0)
    loop.closed = True
    loop._armed = False
    loop.post(1)
    assert not loop._queue

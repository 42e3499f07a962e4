"""When to look: what is learned of a stream, on made-up waits and wake-ups."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

import torchfut_aio
from torchfut_aio import PollPolicy, set_poll_policy
from torchfut_aio._devices._policy import History

POLICY = PollPolicy()


def lived_through(waits, late=lambda pause: 30e-6):
    """Returns how late each of ``waits`` was noticed, and how many looks it took."""
    history, lateness, looks = History(), [], []
    for wait in waits:
        now, missed, count = 0.0, 0.0, 0
        while now < wait:
            missed, pause = now, history.pause(now)
            delay = late(pause)
            now += pause + delay
            history.note_wake_up(pause, delay)
            count += 1
        history.learn(missed, now)
        lateness.append(now - wait)
        looks.append(count)
    return lateness, looks


def alike(seconds, count, seed=1):
    dice = random.Random(seed)
    return [dice.gauss(seconds, 30e-6) for _ in range(count)]


def unlike(seconds, count, seed=1):
    dice = random.Random(seed)
    return [seconds * dice.uniform(0.1, 1.9) for _ in range(count)]


@pytest.mark.parametrize("seconds", [0.001, 0.005, 0.02, 0.1])
def test_waits_that_are_alike_are_slept_through_and_noticed_at_once(seconds):
    lateness, looks = lived_through(alike(seconds, 200))
    assert statistics.median(lateness[20:]) < 100e-6
    # Besides those near the end, one each time that the longest pause is over.
    assert statistics.mean(looks[20:]) < 4 + seconds / POLICY.longest


@pytest.mark.parametrize("seconds", [0.001, 0.005, 0.02, 0.1])
def test_waits_that_are_not_alike_are_noticed_within_half_a_millisecond_mostly(seconds):
    lateness, looks = lived_through(unlike(seconds, 200))
    assert statistics.median(lateness) < 0.35e-3
    assert statistics.mean(looks) < 5 + seconds / 0.4e-3


def test_intervals_grow_with_the_time_already_waited():
    history = History()
    pauses = [history.pause(waited) for waited in (0, 0.0005, 0.005, 1, 5, 100)]
    assert pauses == sorted(pauses)
    assert pauses[0] == POLICY.shortest
    assert pauses[-1] == POLICY.longest


@pytest.mark.parametrize(("before", "after"), [(0.005, 0.0001), (0.1, 0.0005), (0.0005, 0.02)])
def test_a_stream_whose_waits_change_is_learned_anew(before, after):
    lateness, _ = lived_through(alike(before, 50) + alike(after, 60))
    assert max(lateness) < POLICY.longest + 1e-4
    assert statistics.median(lateness[-20:]) < 0.25e-3


def test_one_wait_unlike_the_others_is_forgotten():
    lateness, looks = lived_through(alike(0.005, 40) + [0.0002] + alike(0.005, 40))
    assert statistics.median(lateness[41:]) < 100e-6
    assert statistics.mean(looks[41:]) < 5


def test_late_wake_ups_are_made_up_for():
    def late(pause):
        return 300e-6 if pause > 1e-3 else 30e-6

    lateness, _ = lived_through(alike(0.02, 100), late)
    assert statistics.median(lateness[30:]) < 100e-6


@given(st.lists(st.floats(1e-6, 3), max_size=40), st.floats(0, 100))
def test_a_pause_is_never_shorter_or_longer_than_the_policy_allows(waits, waited):
    history = History()
    for wait in waits:
        history.pause(0)
        history.learn(wait / 3, wait)
    assert POLICY.shortest <= history.pause(waited) <= POLICY.longest


# --------------------------------------------------------------------- the policy itself


def test_the_defaults_need_no_arguments_and_policies_compare():
    assert PollPolicy() == PollPolicy(shortest=50e-6, longest=0.01, blocking=False)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"shortest": 0}, ValueError),
        ({"shortest": -1.0}, ValueError),
        ({"shortest": 0.1, "longest": 0.01}, ValueError),
        ({"longest": float("inf")}, ValueError),
        ({"shortest": float("nan")}, ValueError),
        ({"shortest": "1"}, TypeError),
        ({"longest": None}, TypeError),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(arguments, error):
    with pytest.raises(error, match=r"shortest|longest"):
        PollPolicy(**arguments)


def test_setting_a_policy_returns_the_one_before():
    mine = PollPolicy(longest=0.002)
    before = set_poll_policy(mine)
    assert set_poll_policy(before) is mine
    with pytest.raises(TypeError, match="PollPolicy"):
        torchfut_aio.set_poll_policy(0.001)
    assert set_poll_policy(before) is before

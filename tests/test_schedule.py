"""When to poll: what the schedule learns of a stream, with simulated waits and wake-ups."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchfut_aio import PollPolicy
from torchfut_aio._devices._schedule import LearnedSchedule, Poll

POLICY = PollPolicy()


def simulate(waits, late=lambda pause: 30e-6, new_schedule=LearnedSchedule):
    """Return how late each of ``waits`` was noticed, and the number of polls for it."""
    schedule, lateness, polls = new_schedule(), [], []
    for wait in waits:
        now, count = 0.0, 0
        while now < wait:
            before, due = now, schedule.next_poll(now)
            now = due + late(due - before)
            schedule.observe(Poll(before, due, now, reached=now >= wait))
            count += 1
        lateness.append(now - wait)
        polls.append(count)
    return lateness, polls


def similar(seconds, count, seed=1):
    dice = random.Random(seed)
    return [dice.gauss(seconds, 30e-6) for _ in range(count)]


def varied(seconds, count, seed=1):
    dice = random.Random(seed)
    return [seconds * dice.uniform(0.1, 1.9) for _ in range(count)]


@pytest.mark.parametrize("seconds", [0.001, 0.005, 0.02, 0.1])
def test_similar_waits_are_noticed_at_once_with_few_polls(seconds):
    lateness, polls = simulate(similar(seconds, 200))
    assert statistics.median(lateness[20:]) < 100e-6
    # In addition to the polls near the end, one after each pause of maximal length.
    assert statistics.mean(polls[20:]) < 4 + seconds / POLICY.max_interval


@pytest.mark.parametrize("seconds", [0.001, 0.005, 0.02, 0.1])
def test_varying_waits_are_noticed_within_half_a_millisecond(seconds):
    lateness, polls = simulate(varied(seconds, 200))
    assert statistics.median(lateness) < 0.35e-3
    assert statistics.mean(polls) < 5 + seconds / 0.4e-3


def test_poll_intervals_grow_with_the_time_waited():
    schedule = LearnedSchedule()
    pauses = [schedule.next_poll(waited) - waited for waited in (0, 0.0005, 0.005, 1, 5, 100)]
    assert pauses == sorted(pauses)
    assert pauses[0] == POLICY.min_interval
    assert pauses[-1] == pytest.approx(POLICY.max_interval)


@pytest.mark.parametrize(("before", "after"), [(0.005, 0.0001), (0.1, 0.0005), (0.0005, 0.02)])
def test_schedule_relearns_a_stream_with_changed_waits(before, after):
    lateness, _ = simulate(similar(before, 50) + similar(after, 60))
    assert max(lateness) < POLICY.max_interval + 1e-4
    assert statistics.median(lateness[-20:]) < 0.25e-3


def test_schedule_forgets_an_outlier():
    lateness, polls = simulate(similar(0.005, 40) + [0.0002] + similar(0.005, 40))
    assert statistics.median(lateness[41:]) < 100e-6
    assert statistics.mean(polls[41:]) < 5


def test_schedule_compensates_for_late_wake_ups():
    def late(pause):
        return 300e-6 if pause > 1e-3 else 30e-6

    lateness, _ = simulate(similar(0.02, 100), late)
    assert statistics.median(lateness[30:]) < 100e-6


@given(st.lists(st.floats(1e-6, 3), max_size=40), st.floats(0, 100))
def test_pause_is_always_within_the_limits_of_the_policy(waits, waited):
    schedule = LearnedSchedule()
    for wait in waits:
        schedule.observe(Poll(wait / 3, wait / 2, wait, reached=True))
    pause = schedule.next_poll(waited) - waited
    assert POLICY.min_interval * 0.999 <= pause <= POLICY.max_interval * 1.001


@given(st.lists(st.floats(1e-6, 3), max_size=20), st.floats(0, 3))
def test_next_poll_does_not_change_the_schedule(waits, waited):
    asked, other = LearnedSchedule(), LearnedSchedule()
    for wait in waits:
        for schedule in (asked, other):
            schedule.observe(Poll(0.0, wait / 2, wait, reached=True))
        for moment in (0.0, waited, wait):
            assert asked.next_poll(moment) == asked.next_poll(moment)
    assert asked.next_poll(waited) == other.next_poll(waited)
    assert asked.interval == other.interval

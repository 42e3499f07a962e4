"""The explorer interrupts every point once, one per run, in every function of a module."""

from __future__ import annotations

import sys
import textwrap
import threading

import pytest

from . import explorer


def called():
    pass


def scenario(done):
    done.append("entered")
    for n in range(2):
        done.append(n)
    called()
    done.append("left")


HERE = sys.modules[__name__]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_explorer_interrupts_each_step_in_turn(error):
    reached, where = [], []
    for strike in explorer.strikes(HERE, error=error):
        done = []
        with strike:
            scenario(done)
        assert strike.raised == (strike.where is not None)
        if strike.where:
            reached.append(tuple(done))
            where.append(strike.where.partition(",")[0])
    steps = ["entered", 0, 1, "left"]
    assert list(dict.fromkeys(reached)) == [tuple(steps[:n]) for n in range(5)]
    assert reached == sorted(reached, key=len)
    assert {"scenario", "called"} == set(where)


def test_explorer_can_raise_in_place_of_calls():
    reached = []
    for strike in explorer.strikes(HERE, error=MemoryError, at="calls"):
        done = []
        with strike:
            scenario(done)
        reached.append(len(done))
    assert reached == [0, 1, 1, 2, 3, 3, 4]


def test_explorer_skips_steps_on_request():
    def places(**options):
        for strike in explorer.strikes(HERE, **options):
            with strike:
                scenario([])
            if strike.where:
                yield strike.where

    assert list(places(every=3)) == list(places())[::3]


def test_explorer_series_can_alternate_and_stop_tracing():
    def places(*series):
        for strikes in zip(*series, strict=False):
            with strikes[0]:
                scenario([])
            for theirs in strikes[1:]:
                with theirs:
                    textwrap.dedent(" text")
                assert "textwrap.py" in theirs.where
            yield strikes[0].where

    theirs = explorer.strikes(textwrap, at="instructions")
    alone = [*places(explorer.strikes(HERE))]
    assert [*places(explorer.strikes(HERE), theirs)] == alone
    if sys.version_info >= (3, 12):
        assert sys.monitoring.get_tool(explorer._TOOL) is None


def test_explorer_can_call_a_function_instead_of_raising():
    for strike in explorer.strikes(HERE, do=lambda: done.append("other")):
        done = []
        with strike:
            scenario(done)
        assert done.count("other") == (strike.where is not None)
        assert "left" in done


def test_explorer_can_interrupt_another_thread():
    seen = []

    def see():
        seen.append(threading.current_thread())

    for strike in explorer.strikes(HERE, thread="struck", do=see):
        thread = threading.Thread(target=scenario, args=([],), name="struck")
        with strike:
            scenario([])
            thread.start()
            thread.join()
        if strike.where:
            assert seen.pop() is thread
    assert not seen

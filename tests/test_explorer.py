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
    for interrupt in explorer.interrupts(HERE, error=error):
        done = []
        with interrupt:
            scenario(done)
        assert interrupt.raised == (interrupt.where is not None)
        if interrupt.where:
            reached.append(tuple(done))
            where.append(interrupt.where.partition(",")[0])
    steps = ["entered", 0, 1, "left"]
    assert list(dict.fromkeys(reached)) == [tuple(steps[:n]) for n in range(5)]
    assert reached == sorted(reached, key=len)
    assert {"scenario", "called"} == set(where)


def test_explorer_can_raise_in_place_of_calls():
    reached = []
    for interrupt in explorer.interrupts(HERE, error=MemoryError, at="calls"):
        done = []
        with interrupt:
            scenario(done)
        reached.append(len(done))
    assert reached == [0, 1, 1, 2, 3, 3, 4]


def test_explorer_skips_steps_on_request():
    def places(**options):
        for interrupt in explorer.interrupts(HERE, **options):
            with interrupt:
                scenario([])
            if interrupt.where:
                yield interrupt.where

    assert list(places(every=3)) == list(places())[::3]


def test_explorer_series_can_alternate_and_stop_tracing():
    def places(*series):
        for interrupts in zip(*series, strict=False):
            with interrupts[0]:
                scenario([])
            for theirs in interrupts[1:]:
                with theirs:
                    textwrap.dedent(" text")
                assert "textwrap.py" in theirs.where
            yield interrupts[0].where

    theirs = explorer.interrupts(textwrap, at="instructions")
    alone = [*places(explorer.interrupts(HERE))]
    assert [*places(explorer.interrupts(HERE), theirs)] == alone
    if sys.version_info >= (3, 12):
        assert sys.monitoring.get_tool(explorer.TOOL) is None


def test_explorer_can_call_a_function_instead_of_raising():
    for interrupt in explorer.interrupts(HERE, do=lambda: done.append("other")):
        done = []
        with interrupt:
            scenario(done)
        assert done.count("other") == (interrupt.where is not None)
        assert "left" in done


def test_explorer_can_interrupt_another_thread():
    seen = []

    def see():
        seen.append(threading.current_thread())

    for interrupt in explorer.interrupts(HERE, thread="interrupted", do=see):
        thread = threading.Thread(target=scenario, args=([],), name="interrupted")
        with interrupt:
            scenario([])
            thread.start()
            thread.join()
        if interrupt.where:
            assert seen.pop() is thread
    assert not seen

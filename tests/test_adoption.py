"""An adopted future completes even if its source's callback is interrupted."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import sys
import threading
import weakref

import pytest
import torch

from torchfut_aio import Future, _adopt, _core, as_future

from . import explorer
from .loops import on_every_loop
from .threads import PATIENCE, running, until

SOURCES = [concurrent.futures.Future, torch.futures.Future, Future]
sources = pytest.mark.parametrize("source_type", SOURCES)


def adopt(source):
    return as_future(source, devices=[])  # adopt a Future of this package as well


def set_with_frames_left(left, source, value):
    """Complete the source, in a new thread, when ``left`` more frames fit on the stack."""
    outcome = []

    def down(frames):
        if frames:
            down(frames - 1)
        else:
            source.set_result(value)

    def run():
        try:
            down(sys.getrecursionlimit() - left - depth_here() - 1)
        except RecursionError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    return outcome


def depth_here():
    frame, depth = sys._getframe(1), 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


@pytest.fixture
def short_stack(monkeypatch):
    before = sys.getrecursionlimit()
    # concurrent.futures' logging and finalisers' tracebacks do not fit on the full stack.
    logging.disable(logging.CRITICAL)
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    sys.setrecursionlimit(depth_here() + 300)
    yield
    sys.setrecursionlimit(before)
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("source_type", [concurrent.futures.Future, Future])  # torch's crashes
@pytest.mark.parametrize("left", range(1, 40))
def test_a_full_stack_leaves_no_adopted_future_pending(source_type, left, short_stack):
    source = source_type()
    fut = adopt(source)
    set_with_frames_left(left, source, 5)
    if source.done():
        assert fut.wait(PATIENCE) == 5
        assert adopt(source).wait(PATIENCE) == 5


@on_every_loop
async def test_await_completes_a_future_left_behind_by_a_full_stack(
    short_stack, nothing_blocks_a_loop
):
    nothing_blocks_a_loop.deactivate()  # to join the thread
    for left in range(1, 40):
        source = concurrent.futures.Future()
        fut = adopt(source)
        set_with_frames_left(left, source, 5)
        if source.done():
            assert await fut == 5


@sources
@pytest.mark.parametrize(
    ("error", "at"), [(KeyboardInterrupt, "signals"), (MemoryError, "calls")], ids=["^C", "memory"]
)
def test_an_interrupted_source_leaves_no_adopted_future_pending(source_type, error, at, caplog):
    for interrupt in explorer.interrupts(_adopt, _core, error=error, at=at):
        source = source_type()
        fut, waited = adopt(source), []

        def wait(fut=fut, waited=waited):
            waited.append(fut.wait(PATIENCE))

        with running(wait):  # it already waits, and does not check again
            until(lambda fut=fut: fut.has_waiters())
            with interrupt:
                source.set_result(5)
            if not source.done():  # interrupted before it began
                source.set_result(5)
        assert waited == [5], interrupt


def test_adopted_future_waits_for_a_late_callback_of_its_source():
    source, may_call = concurrent.futures.Future(), threading.Event()
    source.add_done_callback(lambda _: may_call.wait(PATIENCE))
    fut = adopt(source)
    with running(lambda: source.set_result(5)):
        until(source.done)
        assert adopt(source) is fut
        may_call.set()
        assert fut.wait(PATIENCE) == 5


@pytest.mark.parametrize("source_type", [concurrent.futures.Future])
def test_collected_source_fails_the_adopted_future(source_type, no_collector):
    source = source_type()
    fut = adopt(source)
    del source
    with pytest.raises(concurrent.futures.CancelledError, match="garbage-collected"):
        fut.wait(0)


def test_source_with_a_raising_result_fails_the_adopted_future(caplog):
    class Broken(concurrent.futures.Future):
        def result(self, timeout=None):
            raise OSError("foo")

    source = Broken()
    fut = adopt(source)
    source.set_result(5)
    with pytest.raises(OSError, match="foo"):
        fut.wait(PATIENCE)


def test_done_source_does_not_keep_its_adopted_future(no_collector):
    source = concurrent.futures.Future()
    fut = adopt(source)
    source.set_result(5)
    assert fut.wait(PATIENCE) == 5
    ref = weakref.ref(fut)
    del fut
    assert ref() is None


def test_adopted_future_does_not_keep_a_done_source():
    source = concurrent.futures.Future()
    fut = adopt(source)
    source.set_result(5)
    ref = weakref.ref(source)
    del source
    gc.collect()
    assert ref() is None
    assert fut.value() == 5


def test_outcome_of_a_future_survives_its_closed_loop():
    loop = asyncio.new_event_loop()
    source = loop.create_future()
    fut = loop.run_until_complete(adopted(source))
    source.set_result(5)
    loop.close()
    del source, loop
    gc.collect()
    assert fut.wait(PATIENCE) == 5


async def adopted(source):
    return as_future(source)

"""A completion that comes between two steps of somebody who is about to wait.

Repetition under load (test_stress.py) meets these moments by chance; here they are made.
"""

from __future__ import annotations

from contextlib import contextmanager

import anyio
import pytest
import trio

from torchfut_aio import Future, as_completed, gather
from torchfut_aio._loops import _asyncio

from .loops import on_asyncio, on_every_loop
from .threads import PATIENCE

moments = pytest.mark.parametrize(
    "moment", ["before the first", "after the first", "before another", "after another"]
)


class Racing(Future):
    """Completes just before, or just after, somebody enters."""

    moment = ""

    @property
    def _first(self):
        return Future._first.__get__(self)

    @_first.setter
    def _first(self, entry):
        with self.racing("first"):
            Future._first.__set__(self, entry)

    @_first.deleter
    def _first(self):
        Future._first.__delete__(self)

    @contextmanager
    def racing(self, place):
        for when in ("before", "after"):
            if self.moment.startswith(when) and self.moment.endswith(place) and not self.done():
                self.set_result("in between")
            if when == "before":
                yield


class RacingDict(dict):
    def __init__(self, fut):
        self.fut = fut

    def __setitem__(self, entry, _):
        with self.fut.racing("another"):
            super().__setitem__(entry, _)


def completes(moment):
    """A future that completes just before, or just after, somebody enters."""
    fut = Racing()
    if moment.endswith("another"):
        fut.add_done_callback(lambda fut: None)
        fut._entries = RacingDict(fut)
    fut.moment = moment
    return fut


@on_every_loop
@moments
async def test_a_task_that_is_about_to_wait_is_not_left_asleep(moment):
    with anyio.fail_after(PATIENCE):
        assert await completes(moment) == "in between"


@moments
def test_a_thread_that_is_about_to_wait_is_not_left_asleep(moment):
    assert completes(moment).wait(timeout=PATIENCE) == "in between"


@moments
def test_a_callback_that_is_being_added_runs_once(moment):
    fut, ran = completes(moment), []
    fut.add_done_callback(ran.append)
    assert ran == [fut]
    child = completes(moment).then(lambda fut: fut.value())
    assert child.wait(timeout=0) == "in between"


@on_asyncio
@moments
async def test_an_asyncio_future_that_is_being_made_completes(moment):
    assert await completes(moment).as_asyncio() == "in between"


@moments
def test_futures_that_are_being_combined_complete(moment):
    assert gather([completes(moment) for _ in range(3)]).wait(PATIENCE) == ["in between"] * 3
    assert len(list(as_completed([completes(moment) for _ in range(3)]))) == 3


def test_an_arrival_while_the_iterator_goes_to_sleep_is_not_missed():
    fut = Future()
    completed = as_completed([fut])

    class Racing(list):
        def append(self, bell):
            fut.set_result(None)  # before the bell hangs, so nobody rings it
            super().append(bell)

    completed._arrivals.bells = Racing()
    assert next(completed) is fut


@on_asyncio
async def test_a_task_of_asyncio_that_is_interrupted_on_its_way_to_sleep_wakes_up(monkeypatch):
    fut = Future()
    real = _asyncio._Waiter.__iter__

    def suspend(waiter):
        fut.set_result("in between")  # as a signal handler or a finaliser might, here
        return real(waiter)

    monkeypatch.setattr(_asyncio._Waiter, "__iter__", suspend)
    with anyio.fail_after(PATIENCE):
        assert await fut == "in between"


def test_a_task_of_trio_that_is_interrupted_on_its_way_to_sleep_wakes_up(monkeypatch):
    fut = Future()
    real = trio.lowlevel.wait_task_rescheduled

    def wait_task_rescheduled(abort):
        fut.set_result("in between")  # as a signal handler or a finaliser might, here
        return real(abort)

    async def main():
        monkeypatch.setattr(trio.lowlevel, "wait_task_rescheduled", wait_task_rescheduled)
        with trio.fail_after(PATIENCE):
            return await fut

    assert trio.run(main) == "in between"

"""A completion between two steps of a waiter that is about to wait.

Repetition under load (test_stress.py) hits these moments by chance; these tests hit each of them.
"""

from __future__ import annotations

import asyncio

import anyio
import pytest
import trio
import uvloop

from torchfut_aio import Future, _future, _loops, as_completed, gather

from .explorer import interrupts
from .loops import on_asyncio, on_every_loop
from .threads import PATIENCE

moments = pytest.mark.parametrize("moment", ["before", "after"])


class Racing(dict):
    """State of a future that completes just before, or just after, a waiter is added."""

    def __init__(self, fut, moment):
        super().__init__()
        self.fut, self.moment = fut, moment

    def __setitem__(self, follower, kind):
        if self.moment == "before" and not self.fut.done():
            self.fut.set_result("in between")
        super().__setitem__(follower, kind)
        if self.moment == "after" and not self.fut.done():
            self.fut.set_result("in between")


def completes(moment):
    fut = Future()
    fut._state = Racing(fut, moment)
    return fut


@on_every_loop
@moments
async def test_task_about_to_wait_is_woken(moment):
    with anyio.fail_after(PATIENCE):
        assert await completes(moment) == "in between"


@moments
def test_thread_about_to_wait_is_woken(moment):
    assert completes(moment).wait(timeout=PATIENCE) == "in between"


@moments
def test_callback_being_added_at_completion_runs_once(moment):
    fut, ran = completes(moment), []
    fut.add_done_callback(ran.append)
    assert ran == [fut]
    child = completes(moment).then(lambda fut: fut.value())
    assert child.wait(timeout=0) == "in between"


@on_asyncio
@moments
async def test_as_asyncio_being_made_at_completion_completes(moment):
    assert await completes(moment).as_asyncio() == "in between"


@moments
def test_futures_combined_during_completion_complete(moment):
    assert gather([completes(moment) for _ in range(3)]).wait(PATIENCE) == ["in between"] * 3
    assert len(list(as_completed([completes(moment) for _ in range(3)]))) == 3


def test_as_completed_about_to_wait_sees_the_completion():
    fut = Future()
    completed = as_completed([fut])

    class Racing(dict):
        def __setitem__(self, waiter, _):
            fut.set_result(None)  # before the waiter is stored, so it is not woken
            super().__setitem__(waiter, None)

    completed._state.waiters.waiting = Racing()
    assert next(completed) is fut


async def value_of(fut):
    return await asyncio.wait_for(fut, PATIENCE)


@pytest.mark.parametrize("new_loop", [asyncio.SelectorEventLoop, uvloop.new_event_loop])
def test_completion_within_an_await_resumes_an_asyncio_task(new_loop):
    loop = new_loop()
    # As a signal handler or a finaliser might do, at each point of the await.
    for interrupt in interrupts(_future, _loops, do=lambda: fut.try_set_result("in between")):
        fut = Future()
        loop.call_soon(loop.call_soon, fut.try_set_result, "later")
        with interrupt:
            assert loop.run_until_complete(value_of(fut)) in ("in between", "later")
    loop.close()


def test_trio_task_interrupted_before_it_waits_wakes_up(monkeypatch):
    fut = Future()
    real = trio.lowlevel.wait_task_rescheduled

    def wait_task_rescheduled(abort):
        fut.set_result("in between")  # as a signal handler or a finaliser might do
        return real(abort)

    async def main():
        monkeypatch.setattr(trio.lowlevel, "wait_task_rescheduled", wait_task_rescheduled)
        with trio.fail_after(PATIENCE):
            return await fut

    assert trio.run(main) == "in between"

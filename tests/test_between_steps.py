"""A completion between two steps of a waiter that is about to wait.

Repetition under load (test_stress.py) hits these moments by chance; these tests hit each of them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import contextmanager

import anyio
import pytest
import trio
import uvloop

import torchfut_aio
from torchfut_aio import Future, _future, _loops, as_completed, gather

from .explorer import interrupts
from .test_stress import every_loop
from .threads import PATIENCE


def completing(complete):
    """Yield an interrupt for each instruction of the package, at which ``complete()`` is called.

    A signal handler or a finaliser may do that at some of them, another thread at each.
    """
    return interrupts(torchfut_aio, at="instructions", do=complete)


@contextmanager
def woken_by(function):
    """Call a function in a thread, unless an interrupt calls it before; check that it wakes us."""
    timer, began = threading.Timer(0.01, function), time.monotonic()
    timer.start()
    yield
    timer.join()
    assert time.monotonic() - began < PATIENCE, "timed out"


@every_loop
def test_task_about_to_wait_is_woken(backend, options):
    async def main(interrupt):
        async with anyio.create_task_group() as tg:
            tg.start_soon(complete_later)
            with anyio.fail_after(PATIENCE), interrupt:
                assert await fut == "in between"

    async def complete_later():
        await anyio.wait_all_tasks_blocked()
        complete()

    def complete():
        fut.try_set_result("in between")

    for interrupt in completing(complete):
        fut = Future()
        anyio.run(main, interrupt, backend=backend, backend_options=options)


def test_thread_about_to_wait_is_woken():
    def complete():
        fut.try_set_result("in between")

    for interrupt in completing(complete):
        fut = Future()
        with woken_by(complete), interrupt:
            assert fut.wait(PATIENCE) == "in between", interrupt


def test_callback_being_added_at_completion_runs_once():
    for interrupt in completing(lambda: fut.try_set_result("in between")):
        fut, ran = Future(), []
        with interrupt:
            fut.add_done_callback(ran.append)
            child = fut.then(lambda fut: fut.value())
        fut.try_set_result("in between")
        assert ran == [fut], interrupt
        assert child.wait(timeout=0) == "in between", interrupt


def test_as_asyncio_being_made_at_completion_completes():
    async def main(interrupt):
        with interrupt:
            copy = fut.as_asyncio()
        fut.try_set_result("in between")
        assert await asyncio.wait_for(copy, PATIENCE) == "in between", interrupt

    for interrupt in completing(lambda: fut.try_set_result("in between")):
        fut = Future()
        asyncio.run(main(interrupt))


def test_futures_combined_during_completion_complete():
    def complete():
        for fut in futures:
            fut.try_set_result("in between")

    for interrupt in completing(complete):
        futures = [Future() for _ in range(3)]
        with interrupt:
            both = gather(futures)
        complete()
        assert both.wait(PATIENCE) == ["in between"] * 3, interrupt
    for interrupt in completing(complete):
        futures = [Future() for _ in range(3)]
        with interrupt:
            completed = as_completed(futures, timeout=PATIENCE)
        complete()
        assert len([*completed]) == 3, interrupt


def test_as_completed_about_to_wait_sees_the_completion():
    def complete():
        fut.try_set_result(None)

    for interrupt in completing(complete):
        fut = Future()
        completed = as_completed([fut], timeout=PATIENCE)
        with woken_by(complete), interrupt:
            assert next(completed) is fut, interrupt


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

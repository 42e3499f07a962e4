"""The loop of the watcher keeps running after an interrupt at any point."""

from __future__ import annotations

import asyncio
import os

import pytest
import torch

from torchfut_aio import Future, PollPolicy, poll_statistics, set_poll_policy, synchronize
from torchfut_aio._devices import _readiness, _schedule, _stream_queue, _watcher

from .accelerator import FIRST, being_filled, write_zeros
from .explorer import interrupts
from .threads import PATIENCE
from .waiting import eventually

pytestmark = pytest.mark.device

# 1: every point.
EVERY = int(os.environ.get("TORCHFUT_AIO_TEST_EVERY", "3"))

WATCHER = (_readiness, _schedule, _stream_queue, _watcher)


@pytest.fixture
def loop():
    loop = asyncio.SelectorEventLoop()
    loop.set_exception_handler(lambda loop, context: None)
    yield loop
    loop.close()


@pytest.fixture(params=[False, True], ids=["polling", "blocking"])
def policy(request, monkeypatch):
    monkeypatch.setattr(_watcher, "_FALLBACK", 0.01)
    before = set_poll_policy(PollPolicy(blocking=request.param))
    yield
    set_poll_policy(before)


async def read(future):
    return await future


def registered(loop):
    return set(loop._selector.get_map())


def test_interrupted_watcher_resumes_other_tasks_and_new_ones(accelerator, loop, policy):
    streams = [torch.Stream(FIRST) for _ in range(2)]
    tasks = []

    async def wait():
        on_both = Future()
        with streams[0], streams[1]:
            on_both.set_result([being_filled(accelerator)])
        tasks.append(asyncio.ensure_future(synchronize(streams[0])))
        tasks.append(asyncio.ensure_future(read(on_both)))
        tasks.append(asyncio.ensure_future(synchronize(streams[1])))
        given_up = asyncio.ensure_future(synchronize(streams[0]))
        tasks.append(given_up)
        await asyncio.sleep(0)
        tasks.append(on_both.as_asyncio())
        given_up.cancel()
        await asyncio.sleep(0.0005)
        accelerator.wake()
        await asyncio.wait(tasks, timeout=PATIENCE)

    async def settle():
        accelerator.wake()
        _, asleep = await asyncio.wait([main, *tasks], timeout=PATIENCE)
        assert not asleep

    async def wait_again():
        await eventually(lambda: poll_statistics().pending == 0)
        with streams[0]:
            accelerator.sleep(PATIENCE)
        again = asyncio.ensure_future(synchronize(streams[0]))
        await asyncio.sleep(0)
        assert poll_statistics().pending == 1
        accelerator.wake()
        await asyncio.wait_for(again, PATIENCE)
        assert poll_statistics().pending == 0
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    loop.run_until_complete(asyncio.sleep(0))
    idle = registered(loop)
    for interrupt in interrupts(*WATCHER, every=EVERY):
        accelerator.reset()
        write_zeros(accelerator, 1)
        tasks.clear()
        main = loop.create_task(wait())
        with interrupt:
            loop.run_until_complete(main)
        loop.run_until_complete(settle())
        errors = [task.exception() for task in [main, *tasks] if not task.cancelled()]
        interrupted = [raised for raised in errors if raised is not None]
        assert all(isinstance(raised, KeyboardInterrupt) for raised in interrupted), interrupt
        assert len(interrupted) <= 1, interrupt
        loop.run_until_complete(wait_again())
        assert registered(loop) == idle, interrupt

"""Races, repeated under load."""

from __future__ import annotations

import random
import sys

import anyio
import pytest

from torchfut_aio import Future, as_completed, gather
from torchfut_aio._loops import ThreadWaiter

from .threads import PATIENCE, alongside, running

LOOPS = [("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})]
every_loop = pytest.mark.parametrize(
    ("backend", "options"), LOOPS, ids=["asyncio", "uvloop", "trio"]
)


@pytest.fixture(params=[None, 1e-6], ids=["", "switching"])
def switch_interval(request):
    """Use the default interval, and one at which threads switch as often as possible."""
    before = sys.getswitchinterval()
    if request.param is not None:
        sys.setswitchinterval(request.param)
    yield
    sys.setswitchinterval(before)


def completers(futures, threads=8):
    shuffled = random.sample(futures, len(futures))

    def complete(part):
        for n, fut in enumerate(part):
            fut.set_result(n)

    return [lambda part=shuffled[k::threads]: complete(part) for k in range(threads)]


@every_loop
def test_awaited_futures_completed_by_8_threads_all_resume(backend, options, switch_interval):
    async def main():
        for _ in range(2):
            futures = [Future() for _ in range(8_000)]
            got = []

            async def take(fut):
                got.append(await fut)

            async with anyio.create_task_group() as tg:
                for fut in futures:
                    tg.start_soon(take, fut)
                async with alongside(*completers(futures)):
                    pass
            assert len(got) == 8_000

    anyio.run(main, backend=backend, backend_options=options)


@every_loop
def test_cancelling_half_of_the_tasks_loses_no_other_completion(backend, options, switch_interval):
    async def main():
        for seed in range(10):
            futures = [Future() for _ in range(400)]
            got = []

            async def take(fut):
                got.append(await fut)

            with anyio.fail_after(PATIENCE):
                async with anyio.create_task_group() as tg:
                    with anyio.CancelScope() as scope:
                        async with anyio.create_task_group() as cancelled:
                            for fut in futures:
                                tg.start_soon(take, fut)
                                cancelled.start_soon(take, fut)
                            async with alongside(*completers(futures, 2)):
                                await anyio.sleep(seed / 5000)
                                scope.cancel()
            assert 400 <= len(got) <= 800
            assert all(fut.done() for fut in futures)

    anyio.run(main, backend=backend, backend_options=options)


def test_threads_loops_and_callbacks_all_see_every_completion(switch_interval):
    for _ in range(5):
        futures = [Future() for _ in range(300)]
        combined, completed = gather(futures), as_completed(futures)
        called, awaited, waited, taken = [], [], [], []
        for fut in futures:
            fut.add_done_callback(called.append)

        async def main():
            async def take(fut):
                awaited.append(await fut)

            async with anyio.create_task_group() as tg:
                for fut in futures:
                    tg.start_soon(take, fut)

        with running(
            lambda: anyio.run(main, backend="trio"),
            lambda: anyio.run(main),
            lambda: waited.extend(fut.wait(PATIENCE) for fut in futures),
            lambda: taken.extend(completed),
            *completers(futures, 3),
        ):
            assert len(combined.wait(PATIENCE)) == 300
        assert [len(x) for x in (called, awaited, waited, taken)] == [300, 600, 300, 300]
        assert set(called) == set(taken) == set(futures)


def test_thread_can_be_woken_by_two_threads_at_once(switch_interval):
    waiters = [ThreadWaiter() for _ in range(100_000)]
    woken = []

    def wake_all():
        for waiter in waiters:
            waiter.unblock()
        woken.append(len(waiters))

    with running(wake_all, wake_all):
        waiters[-1].block(PATIENCE)
    assert woken == [len(waiters)] * 2

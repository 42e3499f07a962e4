"""trio only: checkpoints, waits from its own thread, guest mode."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import warnings

import pytest
import trio
import trio.testing

from torchfut_aio import Future, _loops

from .threads import PATIENCE, until


async def waits_for(fut, into):
    into.append(await fut)


@pytest.mark.parametrize("outcome", ["result", "error"])
def test_an_await_is_always_a_checkpoint(outcome):
    fut = Future()
    fut.set_result(5) if outcome == "result" else fut.set_exception(ValueError("foo"))

    async def main():
        with trio.testing.assert_checkpoints():
            try:
                assert await fut == 5
            except ValueError:
                assert outcome == "error"
        with trio.move_on_after(0) as scope:
            await fut
        assert scope.cancelled_caught

    trio.run(main)


def test_await_of_a_pending_future_is_a_checkpoint():
    async def main():
        fut = Future()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waits_for, fut, [])
            await trio.testing.wait_all_tasks_blocked()
            fut.set_result(5)
        with trio.move_on_after(0) as scope:
            await Future()
        assert scope.cancelled_caught

    trio.run(main)


def test_completion_in_the_trio_thread_skips_run_sync_soon(monkeypatch):
    calls = []

    async def main():
        real = trio.lowlevel.TrioToken.run_sync_soon
        monkeypatch.setattr(
            trio.lowlevel.TrioToken,
            "run_sync_soon",
            lambda *args, **kwargs: (calls.append(args), real(*args, **kwargs)),
        )
        futures = [Future() for _ in range(100)]
        got = []
        async with trio.open_nursery() as nursery:
            for fut in futures:
                nursery.start_soon(waits_for, fut, got)
            await trio.testing.wait_all_tasks_blocked()
            for fut in futures:
                fut.set_result(5)
        assert got == [5] * 100
        assert not calls
        # From another thread, any number of completions are one wake-up.
        futures = [Future() for _ in range(100)]
        async with trio.open_nursery() as nursery:
            for fut in futures:
                nursery.start_soon(waits_for, fut, got)
            await trio.testing.wait_all_tasks_blocked()
            thread = threading.Thread(target=lambda: [fut.set_result(6) for fut in futures])
            thread.start()
            thread.join()
        assert got[100:] == [6] * 100
        assert len(calls) == 1

    trio.run(main)


def run_as_guest(main):
    """Run ``main`` on trio as the guest of an asyncio loop; return its result."""

    async def host():
        done = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()
        trio.lowlevel.start_guest_run(
            main,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=done.set_result,
            host_uses_signal_set_wakeup_fd=True,
        )
        return (await done).unwrap()

    return asyncio.run(host())


def test_guest_and_host_tasks_await_on_their_own_loops():
    fut, from_host, from_guest = Future(), Future(), Future()

    async def main():
        got = []
        host = asyncio.get_running_loop()

        async def on_host():
            got.append(("host", await fut))
            from_host.set_result("host")

        task = host.create_task(on_host())
        with trio.testing.assert_checkpoints():
            done = Future()
            done.set_result(None)
            await done
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waits_for, fut, got)
            nursery.start_soon(waits_for, from_host, got)
            await trio.testing.wait_all_tasks_blocked()
            threading.Thread(target=fut.set_result, args=(5,)).start()
        # Completed by a callback of the host, while trio sleeps in the same thread.
        host.call_later(0.01, from_guest.set_result, "callback")
        got.append(await from_guest)
        with trio.move_on_after(0.001):
            await Future()
        assert task.done()
        return got

    got = run_as_guest(main)
    assert sorted(map(str, got)) == sorted(["('host', 5)", "5", "host", "callback"])


async def awaited_late(wrap=lambda fut: fut):
    """Await a future that a thread completes when the task sleeps."""
    fut = Future()
    threading.Timer(0.01, fut.set_result, ("late",)).start()
    return await wrap(fut)


@pytest.mark.parametrize("wrap", [lambda fut: fut, asyncio.ensure_future], ids=["plain", "task"])
def test_asyncio_loop_run_by_a_trio_task_awaits_as_asyncio(wrap):
    async def main():
        inner = asyncio.run(awaited_late(wrap))
        return inner, await awaited_late()

    assert trio.run(main) == ("late", "late")


def test_a_trio_run_within_an_asyncio_task_awaits_as_trio():
    async def main():
        inner = trio.run(awaited_late)
        return inner, await awaited_late()

    assert asyncio.run(main()) == ("late", "late")


def test_nested_loops_await_independently_at_any_depth():
    async def on_trio(depth):
        got = [await awaited_late()]
        return got + (asyncio.run(on_asyncio(depth - 1)) if depth else [])

    async def on_asyncio(depth):
        got = [await awaited_late()]
        got += trio.run(on_trio, depth - 1) if depth else []
        return [*got, await awaited_late()]

    assert asyncio.run(on_asyncio(1)) == ["late"] * 3
    with pytest.raises(RuntimeError):  # trio's own rule: one run per thread
        trio.run(on_trio, 2)


def test_signal_handler_can_complete_a_future_awaited_on_trio():
    fut = Future()
    before = signal.signal(signal.SIGUSR1, lambda *args: fut.set_result("signal"))
    try:

        async def main():
            thread = threading.Thread(
                target=lambda: (
                    until(lambda: "waiters=1" in repr(fut)),
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1),
                )
            )
            thread.start()
            with trio.fail_after(PATIENCE):
                assert await fut == "signal"

        trio.run(main)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_forked_child_does_not_wake_the_loop_of_its_parent():
    async def main():
        loop = _loops.current()
        if child := os.fork():
            assert loop.call_soon(bool)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # noqa: ASYNC222
        os._exit(0 if loop.call_soon(bool) is False else 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Python 3.12 on, of a fork in a process with threads
        assert trio.run(main) == 0

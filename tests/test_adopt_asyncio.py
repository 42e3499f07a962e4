"""Adopted futures and tasks of asyncio: their outcome when their loop closes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import sys
import threading
import types
import weakref

import pytest
import trio
import uvloop

from torchfut_aio import Future, as_future, gather
from torchfut_aio._adopt import _asyncio

from .explorer import interrupts
from .loops import on_asyncio
from .threads import PATIENCE, alongside, running

ENDED = "its event loop ended|garbage-collected"

every_kind_of_loop = pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)


async def adopt_pending(source=None):
    source = source or asyncio.get_running_loop().create_future()
    return as_future(source), source


async def returns(value):
    return value


@every_kind_of_loop
def test_pending_adopted_future_fails_when_its_loop_closes(new_loop):
    loop = new_loop()
    fut, source = loop.run_until_complete(adopt_pending())
    other = as_future(loop.create_future())  # the loop never runs its callback
    assert not fut.done()
    loop.close()
    for future in fut, other:
        with pytest.raises(concurrent.futures.CancelledError, match=ENDED):
            future.wait(PATIENCE)
    assert not source.done()
    with pytest.raises(RuntimeError, match="loop that has closed"):
        as_future(source)


@every_kind_of_loop
def test_closing_a_loop_fails_futures_awaited_by_other_threads(new_loop):
    loop = new_loop()
    _, source = loop.run_until_complete(adopt_pending())
    adopted, waited = threading.Event(), threading.Event()

    def wait_for_it():
        fut = as_future(source)
        adopted.set()
        fut.add_done_callback(lambda fut: waited.set())
        with pytest.raises(concurrent.futures.CancelledError):
            fut.wait(PATIENCE)

    with running(wait_for_it):
        assert adopted.wait(PATIENCE)
        loop.close()
    assert waited.is_set()


class ClosesWithinACall(asyncio.SelectorEventLoop):
    """Closes, as if by another thread, after a call has checked it and before it is registered."""

    closes = False

    def _check_closed(self):
        super()._check_closed()
        if self.closes:
            self.close()


@pytest.mark.parametrize("source_is_done", [False, True])
def test_loop_closed_during_adoption_completes_the_future(source_is_done):
    loop = ClosesWithinACall()
    source = loop.create_future()
    if source_is_done:
        source.done = iter([False, False, True]).__next__  # as if another thread completed it
        source.set_result(5)
    loop.closes = True
    fut = as_future(source)
    assert loop.is_closed()
    if source_is_done:
        assert fut.wait(PATIENCE) == 5
    else:
        with pytest.raises(concurrent.futures.CancelledError, match=ENDED):
            fut.wait(PATIENCE)


@every_kind_of_loop
@pytest.mark.parametrize("outcome", [5, KeyError("foo")], ids=type)
def test_outcome_set_in_the_last_turn_of_a_loop_is_kept(new_loop, outcome):
    loop = new_loop()

    async def ends_in_the_last_turn():
        await asyncio.sleep(0)
        loop.stop()
        if isinstance(outcome, KeyError):
            raise outcome
        return outcome

    async def main():
        return as_future(asyncio.ensure_future(ends_in_the_last_turn()))

    fut = loop.run_until_complete(main())
    loop.run_forever()
    loop.close()
    if outcome == 5:
        assert fut.wait(PATIENCE) == 5
    else:
        assert fut.exception() is outcome


@pytest.mark.filterwarnings("ignore:unclosed event loop", "ignore:unclosed <socket")
def test_adopted_future_does_not_keep_an_abandoned_loop(collected, caplog):
    async def main():
        woken = asyncio.Event()
        asyncio.get_running_loop().call_later(10 * PATIENCE, woken.set)
        task = asyncio.ensure_future(woken.wait())
        await asyncio.sleep(0)
        return as_future(task)

    loop = asyncio.new_event_loop()
    fut = loop.run_until_complete(main())
    del loop
    collected()
    with pytest.raises(concurrent.futures.CancelledError, match=ENDED):
        fut.wait(PATIENCE)
    assert "Task was destroyed" in caplog.text


@every_kind_of_loop
def test_unfinished_task_fails_its_future_when_the_loop_ends(new_loop):
    loop = new_loop()

    async def main():
        task = asyncio.ensure_future(asyncio.Event().wait())
        await asyncio.sleep(0)
        return as_future(task)

    def cancel_all():
        for task in asyncio.all_tasks(loop):
            task.cancel()

    fut = loop.run_until_complete(main())
    cancel_all()  # like asyncio.run()
    loop.run_until_complete(returns(None))
    loop.close()
    with pytest.raises(asyncio.CancelledError):
        fut.wait(PATIENCE)


@on_asyncio
async def test_collected_asyncio_future_fails_its_adopted_future():
    fut = as_future(asyncio.get_running_loop().create_future())
    gc.collect()
    with pytest.raises(concurrent.futures.CancelledError, match="garbage-collected"):
        await asyncio.wait_for(fut, PATIENCE)


def test_collected_concurrent_future_fails_its_adopted_future():
    fut = as_future(concurrent.futures.Future())
    gc.collect()
    with pytest.raises(concurrent.futures.CancelledError, match="garbage-collected"):
        fut.wait(PATIENCE)


@every_kind_of_loop
@pytest.mark.parametrize("runs_before", [False, True])
def test_source_of_another_loop_of_this_thread_is_refused(new_loop, runs_before):
    loop = new_loop()
    source = loop.create_task(returns(5))
    if runs_before:
        source = loop.create_future()
        adopted, _ = loop.run_until_complete(adopt_pending(source))
    else:
        adopted = as_future(source)

    async def main():
        with pytest.raises(RuntimeError, match="attached to a different loop"):
            as_future(source)
        with pytest.raises(RuntimeError, match="attached to a different loop"):
            gather([source])
        with pytest.raises(RuntimeError, match="attached to a different loop"):
            gather([adopted])
        with pytest.raises(RuntimeError, match="attached to a different loop"):
            await asyncio.wait_for(adopted, PATIENCE)
        child = adopted.then(lambda fut: fut.value())
        with pytest.raises(RuntimeError, match="attached to a different loop"):
            await child

    async def trio_main():
        with pytest.raises(RuntimeError, match="attached to a different loop"):
            await adopted

    asyncio.run(main())
    trio.run(trio_main)
    if runs_before:
        loop.call_soon(source.set_result, 5)

    async def await_it():
        return await adopted, await as_future(source)

    assert loop.run_until_complete(await_it()) == (5, 5)
    assert asyncio.run(await_it()) == (5, 5)  # done, so any loop may read it
    loop.close()


@every_kind_of_loop
def test_full_stack_is_not_mistaken_for_a_closed_loop(new_loop):
    loop = new_loop()
    raised = 0
    for interrupt in interrupts(_asyncio, error=RecursionError, at="calls"):
        with interrupt:  # suppresses no other error
            as_future(loop.create_future())
        raised += interrupt.raised
    assert raised >= 10
    loop.close()


@on_asyncio
async def test_loop_in_another_thread_completes_an_awaited_future():
    loop, started = asyncio.new_event_loop(), Future()
    loop.call_soon(started.set_result, None)
    source = loop.create_future()
    async with alongside(loop.run_forever):
        await started
        fut = as_future(source)
        loop.call_soon_threadsafe(source.set_result, 5)
        assert await asyncio.wait_for(fut, PATIENCE) == 5
        loop.call_soon_threadsafe(loop.stop)
    loop.close()


@on_asyncio
async def test_loop_keeps_no_reference_to_a_completed_adoption(collected):
    fut, source = await adopt_pending()
    source.set_result(5)
    assert await fut == 5
    refs = weakref.ref(fut), weakref.ref(source)
    del fut, source
    collected()
    assert [ref() for ref in refs] == [None, None]


@on_asyncio
async def test_adopted_future_works_while_another_thread_imports_trio(monkeypatch):
    fut, source = await adopt_pending()
    begun = types.ModuleType("torchfut_aio._loops._trio")  # as before its first line has run
    monkeypatch.setitem(sys.modules, begun.__name__, begun)
    source.set_result(1)
    assert await fut == 1

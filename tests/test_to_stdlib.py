"""``as_concurrent``: copies of futures for code that requires a concurrent.futures.Future."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading
import weakref

import pytest
import uvloop

from torchfut_aio import Future, _core, _to_stdlib, as_future

from .accelerator import FIRST, NEW, SECOND, being_filled, completed_on, declared_or_not
from .explorer import interrupts
from .loops import on_asyncio
from .threads import PATIENCE, alongside, running, until


def test_as_concurrent_completes_like_its_source():
    kept, failed, done = Future(), Future(), Future()
    error, done_error = ValueError("foo"), StopIteration("kept as it is")
    copies = [kept.as_concurrent(), failed.as_concurrent()]
    assert not any(copy.done() for copy in copies)
    kept.set_result(5)
    failed.set_exception(error)
    done.set_exception(done_error)
    assert all(type(copy) is concurrent.futures.Future for copy in copies)
    assert copies[0].result(0) == 5
    assert copies[1].exception(0) is error
    assert done.as_concurrent().exception(0) is done_error
    assert kept.as_concurrent().result(0) == 5


def test_concurrent_futures_functions_accept_as_concurrent():
    fut = Future()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        both = [fut.as_concurrent(), pool.submit(pow, 2, 10)]
        with running(lambda: fut.set_result(5)):
            done, left = concurrent.futures.wait(both, PATIENCE)
        assert {future.result() for future in done} == {5, 1024}
        assert not left
        assert set(concurrent.futures.as_completed(both, PATIENCE)) == set(both)


@pytest.mark.parametrize("function", [concurrent.futures.wait, concurrent.futures.as_completed])
def test_concurrent_futures_functions_refuse_a_plain_future(function):
    fut = Future()
    with pytest.raises(AttributeError, match=r"pass fut\.as_concurrent\(\)"):
        list(function([fut]))
    assert not hasattr(fut, "_condition")


@on_asyncio
async def test_asyncio_wrap_future_accepts_as_concurrent():
    fut = Future()
    wrapped = asyncio.wrap_future(fut.as_concurrent())
    async with alongside(lambda: fut.set_result(5)):
        assert await wrapped == 5


def test_as_concurrent_can_be_adopted_back():
    fut = Future()
    back = as_future(fut.as_concurrent())
    fut.set_result(5)
    assert back.wait(PATIENCE) == 5


@pytest.mark.parametrize("kind", [asyncio.CancelledError, concurrent.futures.CancelledError, None])
def test_cancelled_future_cancels_its_as_concurrent(kind):
    fut = Future()
    before = fut.as_concurrent()
    with running(lambda: concurrent.futures.wait([before], PATIENCE)):
        fut.set_exception(kind()) if kind else fut.cancel()
    assert before.cancelled()
    assert fut.as_concurrent().cancelled()
    assert concurrent.futures.wait([fut.as_concurrent()], PATIENCE).not_done == set()


def test_running_as_concurrent_gets_the_cancellation_as_an_error():
    fut = Future()
    copy = fut.as_concurrent()
    assert copy.set_running_or_notify_cancel()  # from now on it cannot be cancelled
    fut.cancel("enough")
    assert copy.exception(0) is fut.exception()


def test_cancelling_as_concurrent_leaves_the_future_unchanged(caplog):
    fut = Future()
    copy = fut.as_concurrent()
    assert "callbacks=1" in repr(fut)
    assert copy.cancel()
    assert repr(fut) == "<Future pending waiters=0 callbacks=0>"
    assert concurrent.futures.wait([copy], 0).not_done == set()
    fut.set_result(5)
    assert copy.cancelled()
    assert not caplog.records


def test_exactly_one_of_completion_and_cancellation_wins(caplog):
    for _ in range(300):
        fut = Future()
        copy = fut.as_concurrent()
        returned = []
        with running(lambda: fut.set_result(5), lambda: returned.append(copy.cancel())):
            pass
        assert concurrent.futures.wait([copy], 0).not_done == set()
        assert returned == [copy.cancelled()]
        assert copy.cancelled() or copy.result(0) == 5
    assert not caplog.records


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("cancelled", [True, False])
def test_done_future_and_as_concurrent_do_not_keep_each_other(cancelled):
    class Value:
        pass

    fut, value = Future(), Value()
    copy = fut.as_concurrent()
    if cancelled:
        copy.cancel()
    fut.set_result(value)
    ref, copy_ref, value_ref = weakref.ref(fut), weakref.ref(copy), weakref.ref(value)
    del fut, value
    assert ref() is None
    del copy
    assert copy_ref() is None
    assert value_ref() is None


def test_pending_as_concurrent_without_references_is_collected():
    fut = Future()
    ref = weakref.ref(fut.as_concurrent())
    fut_ref = weakref.ref(fut)
    del fut
    gc.collect()
    assert ref() is None
    assert fut_ref() is None


# ------------------------------------------------------------------------- accelerators


@pytest.mark.device
@declared_or_not
def test_as_concurrent_completes_when_the_kernels_are_done(accelerator, producer, devices):
    fut = Future(devices=devices)
    copy = fut.as_concurrent()
    with producer:
        fut.set_result(being_filled(accelerator))
    assert concurrent.futures.wait([copy], 0.02).done == set()
    assert not copy.done()
    accelerator.wake()
    assert copy.result(PATIENCE).tolist() == NEW


@pytest.mark.device
@pytest.mark.several_devices
@pytest.mark.parametrize("devices", [(FIRST, SECOND), (SECOND, FIRST)])
def test_as_concurrent_waits_for_the_kernels_of_every_device(accelerator, devices):
    fut = Future()
    early = being_filled(accelerator, devices[0])
    accelerator.wake()
    fut.set_result([early, being_filled(accelerator, devices[1])])
    copy = fut.as_concurrent()
    assert concurrent.futures.wait([copy], 0.02).done == set()
    accelerator.wake()
    assert [tensor.tolist() for tensor in copy.result(PATIENCE)] == [NEW, NEW]


@pytest.mark.device
@pytest.mark.usefixtures("accelerator")
def test_as_concurrent_raises_the_error_of_a_failed_kernel(accelerator, producer):
    fut = Future()
    with producer:
        value = being_filled(accelerator)
        accelerator.fail("the kernel failed")
        fut.set_result(value)
    copy = fut.as_concurrent()
    accelerator.wake()
    with pytest.raises(RuntimeError, match="the kernel failed"):
        copy.result(PATIENCE)


@pytest.mark.device
def test_cancelling_as_concurrent_during_kernels_wakes_waiters(accelerator, producer):
    fut = completed_on(producer, accelerator, None)
    copy = fut.as_concurrent()
    assert copy.cancel()
    assert concurrent.futures.wait([copy], 0).not_done == set()
    accelerator.wake()
    assert fut.wait().tolist() == NEW
    until(lambda: not [t for t in threading.enumerate() if "torchfut_aio watcher" in t.name])


# --------------------------------------------------------------------------- interrupts


@pytest.mark.parametrize(("error", "at"), [(KeyboardInterrupt, "signals"), (MemoryError, "calls")])
def test_interrupted_completion_leaves_no_as_concurrent_pending(error, at):
    for interrupt in interrupts(_to_stdlib, _core, error=error, at=at):
        fut = Future()
        copy, other = fut.as_concurrent(), fut.then(lambda f: f.value())
        with interrupt:
            fut.set_result(5)
        fut.try_set_result(5)
        if interrupt.raised is not None:
            until(lambda: copy.done() and other.done())
        assert copy.done()
        assert copy.exception(0) is None or isinstance(copy.exception(0), error)
        assert other.done()
        other.exception()  # retrieve it, or it is logged


async def copy_of(fut):
    copy = fut.as_asyncio()
    copy.add_done_callback(lambda copy: copy.exception())  # as of a task that awaits it
    return copy


async def several_turns():
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("new_loop", [asyncio.SelectorEventLoop, uvloop.new_event_loop])
def test_interrupted_as_asyncio_still_completes(new_loop, nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()
    loop, lost = new_loop(), 0
    loop.set_exception_handler(lambda *_: None)
    for interrupt in interrupts(_to_stdlib):
        fut = Future()
        copy = loop.run_until_complete(copy_of(fut))
        with running(lambda fut=fut: fut.set_result(5)):
            pass
        with interrupt:
            loop.run_until_complete(several_turns())
        loop.run_until_complete(several_turns())
        lost += not copy.done()
    loop.close()
    assert lost <= 1  # at the entry of the callback, the call is asyncio's to lose


@on_asyncio
async def test_copy_of_a_value_being_filled_is_freed_at_once(accelerator, producer, no_collector):
    fut = completed_on(producer, accelerator, None)
    copy = fut.as_asyncio()
    dropped = weakref.ref(copy)
    accelerator.wake()
    await copy
    del copy
    await asyncio.sleep(0)
    assert dropped() is None

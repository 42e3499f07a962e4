"""Futures in threads: each promise of torch's documentation, and where torch breaks it."""

from __future__ import annotations

import asyncio
import copy
import pickle
import time
import traceback
import warnings
from fractions import Fraction

import anyio
import pytest
import torch

import torchfut_aio
from torchfut_aio import Future, InvalidStateError

from .threads import PATIENCE, running, until


def test_a_future_is_a_torch_future():
    assert isinstance(Future(), torch.futures.Future)
    assert isinstance(Future[int](), torch._C.Future)


def test_constructor_takes_only_keyword_arguments():
    with pytest.raises(TypeError):
        Future([])


def test_constructor_refuses_a_device_missing_from_this_build():
    with pytest.raises((RuntimeError, ValueError)):
        Future(devices=["no-such-device:0"])


@pytest.mark.parametrize("devices", ["cpu:0", 0, torch.device("cpu")])
def test_constructor_refuses_a_single_device_without_a_list(devices):
    with pytest.raises(TypeError, match=r"devices must be a list of devices, such as \["):
        Future(devices=devices)


# ------------------------------------------------------------------ done, value, wait


@pytest.mark.parametrize("value", [None, 0, "text", [1, 2], torch.ones(2)], ids=repr)
def test_wait_and_value_return_the_object_that_was_set(value):
    fut = Future()
    assert not fut.done()
    fut.set_result(value)
    assert fut.done()
    assert fut.wait() is value
    assert fut.value() is value
    assert fut.exception() is None


def test_wait_blocks_until_another_thread_sets_the_result():
    fut = Future()
    got = []
    with running(lambda: got.append(fut.wait())):
        until(lambda: "waiters=1" in repr(fut))
        assert not got
        fut.set_result(5)
    assert got == [5]


def test_future_wakes_any_number_of_threads():
    fut = Future()
    got = []
    with running(*[lambda: got.append(fut.wait())] * 20):
        until(lambda: "waiters=20" in repr(fut))
        fut.set_result(5)
    assert got == [5] * 20


def test_error_reaches_every_reader_unchanged():
    fut = Future()
    error = ValueError("foo")
    fut.set_exception(error)
    assert fut.done()
    assert fut.exception() is error
    for read in (fut.wait, fut.value):
        with pytest.raises(ValueError, match="foo") as caught:
            read()
        assert caught.value is error


def test_an_error_reaches_a_thread_that_waits():
    fut = Future()
    error = ValueError("foo")
    caught = []

    def wait():
        try:
            fut.wait()
        except ValueError as e:
            caught.append(e)

    with running(wait):
        until(lambda: "waiters=1" in repr(fut))
        fut.set_exception(error)
    assert caught == [error]


@pytest.mark.parametrize("read", ["value", "exception"])
def test_reading_a_pending_future_raises_a_clear_error(read):
    fut = Future()
    with pytest.raises(InvalidStateError, match="pending") as caught:
        getattr(fut, read)()
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, asyncio.InvalidStateError)


def test_traceback_does_not_grow_with_repeated_reads():
    fut = Future()
    try:
        raise ValueError("foo")
    except ValueError as error:
        fut.set_exception(error)

    def frames():
        with pytest.raises(ValueError, match="foo") as caught:
            fut.wait()
        return len(traceback.extract_tb(caught.value.__traceback__))

    first = frames()
    assert [frames() for _ in range(50)] == [first] * 50


def test_traceback_shows_where_the_error_was_raised():
    def raising_function():
        raise ValueError("foo")

    fut = Future()
    try:
        raising_function()
    except ValueError as error:
        fut.set_exception(error)
    for _ in range(2):
        with pytest.raises(ValueError, match="foo") as caught:
            fut.wait()
        names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert "raising_function" in names


# ------------------------------------------------------------------- the second setter


@pytest.mark.parametrize("second", ["result", "exception"])
@pytest.mark.parametrize("first", ["result", "exception"])
def test_second_outcome_is_refused_and_the_first_is_kept(first, second):
    def outcome(kind, text):
        return text if kind == "result" else ValueError(text)

    fut = Future()
    kept = outcome(first, "first")
    getattr(fut, f"set_{first}")(kept)
    with pytest.raises(InvalidStateError, match="Future can only be marked completed once"):
        getattr(fut, f"set_{second}")(outcome(second, "second"))
    if first == "result":
        assert fut.wait() == fut.value() == torch._C.Future.wait(fut) == "first"
    else:
        assert fut.exception() is kept
        with pytest.raises(ValueError, match="first"):
            torch._C.Future.wait(fut)


def test_exactly_one_of_racing_setters_wins():
    for _ in range(300):
        fut = Future()
        won = []

        def set_to(name, fut=fut, won=won):
            try:
                if name % 2:
                    fut.set_result(name)
                else:
                    fut.set_exception(ValueError(name))
            except InvalidStateError:
                return
            won.append(name)

        with running(*[lambda name=name: set_to(name) for name in range(4)]):
            pass
        [winner] = won
        assert (fut.wait() if winner % 2 else fut.exception().args[0]) == winner


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), asyncio.CancelledError(), GeneratorExit()]
)
def test_set_exception_accepts_any_base_exception(error):
    fut = Future()
    fut.set_exception(error)
    assert fut.exception() is error
    with pytest.raises(type(error)):
        fut.wait()


class Double:
    """Like a mock: its ``__class__`` is an exception type, but it is no exception."""

    __class__ = ValueError


@pytest.mark.parametrize("thing", ["text", None, 5, ValueError, Double()], ids=type)
def test_set_exception_with_a_non_exception_raises_type_error(thing):
    fut = Future()
    with pytest.raises(TypeError, match="exception"):
        fut.set_exception(thing)
    assert not fut.done()
    fut.set_result(1)
    assert fut.wait() == 1


def test_exception_passed_to_set_result_is_a_result():
    fut = Future()
    error = ValueError("a value")
    fut.set_result(error)
    assert fut.wait() is fut.value() is error
    assert fut.exception() is None


# ----------------------------------------------------------------- timeouts and signals


@pytest.mark.parametrize(
    "timeout",
    [0, -1, 0.01, -float("inf"), Fraction(1, 100), -(10**400)],
    ids=["0", "-1", "0.01", "-inf", "fraction", "-huge"],
)
def test_wait_that_times_out_leaves_the_future_unchanged(timeout):
    fut = Future()
    with pytest.raises(TimeoutError, match=r"within .* s; it stays pending"):
        fut.wait(timeout)
    assert not fut.done()
    assert "waiters=0" in repr(fut)
    fut.set_result(1)
    assert fut.wait(timeout) == 1


def test_wait_with_a_timeout_returns_at_completion():
    fut = Future()
    got = []
    with running(lambda: got.append(fut.wait(timeout=PATIENCE)), lambda: fut.set_result(5)):
        pass
    assert got == [5]


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 10**400], ids=["inf", "huge", "too huge"])
def test_timeout_beyond_the_platform_limit_waits_for_ever(timeout):
    fut = Future()
    got = []
    with running(lambda: got.append(fut.wait(timeout=timeout))):
        until(lambda: "waiters=1" in repr(fut))
        fut.set_result(5)
    assert got == [5]


@pytest.mark.parametrize(
    ("timeout", "error"), [("3", TypeError), (1j, TypeError), (float("nan"), ValueError)]
)
def test_wait_refuses_an_invalid_timeout(timeout, error):
    fut = Future()
    with pytest.raises(error, match="timeout must be a number of seconds"):
        fut.wait(timeout)
    fut.set_result(1)
    with pytest.raises(error, match="timeout must be a number of seconds"):
        fut.wait(timeout)


@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_ctrl_c_interrupts_a_wait_and_leaves_no_waiter_behind(timeout, ctrl_c):
    fut = Future()

    def interrupt():
        until(lambda: "waiters=1" in repr(fut))
        ctrl_c()

    with running(interrupt), pytest.raises(KeyboardInterrupt):
        fut.wait(timeout)
    assert "pending waiters=0" in repr(fut)


# -------------------------------------------------------------------- the blocked loop


async def waits(fut):
    return fut.wait(timeout=0.01)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_wait_warns_on_a_thread_that_runs_an_event_loop(nothing_blocks_a_loop, backend):
    nothing_blocks_a_loop.deactivate()
    with pytest.warns(torchfut_aio.BlockingWaitWarning, match="await") as caught:
        with pytest.raises(TimeoutError):
            anyio.run(waits, Future(), backend=backend)
    assert issubclass(caught[0].category, RuntimeWarning)
    assert caught[0].filename == __file__


def test_wait_is_silent_where_it_does_not_block():
    async def main():
        done = Future()
        done.set_result(5)
        assert done.wait() == 5
        with pytest.raises(TimeoutError):
            Future().wait(timeout=0)
        got = []
        done.add_done_callback(lambda fut: got.append(fut.wait()))
        assert got == [5]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main())
        with pytest.raises(TimeoutError):
            Future().wait(timeout=0.01)


# -------------------------------------------------------------------------- the rest


def test_slow_setter_of_the_torch_documentation_works():
    def slow_set_future(fut, value):
        time.sleep(0.05)
        fut.set_result(value)

    fut = Future()
    with running(lambda: slow_set_future(fut, torch.ones(2) * 3)):
        assert torch.equal(fut.wait(), torch.full((2,), 3.0))


def test_repr_shows_the_state_and_the_number_of_waiters():
    fut = Future()
    assert repr(fut) == "<Future pending waiters=0 callbacks=0>"
    fut.add_done_callback(print)
    fut.then(lambda fut: None)
    assert repr(fut) == "<Future pending waiters=0 callbacks=2>"
    fut.remove_done_callback(print)
    with running(fut.wait):
        until(lambda: "waiters=1" in repr(fut))
        fut.set_result("x" * 1000)
    assert repr(fut).startswith("<Future done result='xxx")
    assert len(repr(fut)) < 200
    failed = Future()
    failed.set_exception(ValueError("foo"))
    assert repr(failed) == "<Future done error=ValueError('foo')>"
    tensor = Future()
    tensor.set_result([torch.ones(2, 3)])
    assert repr(tensor) == "<Future done result=[<tensor (2, 3) torch.float32 cpu>]>"


@pytest.mark.parametrize("write", [pickle.dumps, copy.copy, copy.deepcopy])
def test_pickling_a_future_is_refused_like_in_torch(write, tmp_path):
    fut = Future()
    with pytest.raises(RuntimeError, match=r"Can not pickle torch\.futures\.Future"):
        write(fut)
    with pytest.raises(RuntimeError, match=r"Can not pickle torch\.futures\.Future"):
        torch.save([fut], tmp_path / "future")

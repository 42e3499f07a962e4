"""Callbacks and chains: which thread runs them, when, in which order, and their errors."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import dataclasses
import gc
import itertools
import logging
import pickle
import threading
import traceback
import weakref

import pytest
import torch

from torchfut_aio import CallbackError, Future, InvalidStateError
from torchfut_aio._core import _callbacks

from .explorer import interrupts
from .threads import PATIENCE, running, until


def raiser(error):
    def callback(fut):
        raise error

    return callback


# ------------------------------------------------------------------------ when and how


def test_callback_runs_in_the_setter_thread_with_the_future():
    fut = Future()
    seen = []
    fut.add_done_callback(lambda f: seen.append((f, f.done(), threading.current_thread())))
    assert seen == []
    thread = threading.Thread(target=fut.set_result, args=(5,))
    thread.start()
    thread.join()
    assert seen == [(fut, True, thread)]


def test_a_callback_on_a_done_future_runs_inline():
    fut = Future()
    fut.set_exception(ValueError("foo"))
    seen = []
    fut.add_done_callback(seen.append)
    assert seen == [fut]
    assert fut.then(lambda f: "ran").value() == "ran"


def test_callbacks_and_continuations_run_in_order():
    fut = Future()
    order = []
    for n in range(0, 30, 2):
        fut.add_done_callback(lambda f, n=n: order.append(n))
        fut.then(lambda f, n=n: order.append(n + 1))
    fut.set_result(None)
    assert order == list(range(30))


def test_waiting_threads_are_woken_before_callbacks_run():
    fut = Future()
    woken = threading.Event()
    order = []
    fut.add_done_callback(lambda f: order.append(woken.wait(PATIENCE)))

    def wait():
        fut.wait()
        woken.set()

    with running(wait):
        until(lambda: "waiters=1" in repr(fut))
        fut.set_result(None)
    assert order == [True]


def test_callback_added_twice_runs_twice():
    fut = Future()
    seen = []
    fut.add_done_callback(seen.append)
    fut.add_done_callback(seen.append)
    fut.set_result(None)
    assert seen == [fut, fut]


def test_callback_can_add_callbacks_to_its_future():
    fut = Future()
    seen = []
    fut.add_done_callback(lambda f: f.add_done_callback(seen.append))
    fut.set_result(None)
    assert seen == [fut]


def test_callback_can_wait_for_a_future_that_it_completes():
    # So deep that the callback that completes the future is deferred.
    def deeper(n):
        fut = Future()
        child = fut.then(lambda f: deeper(n - 1) if n else 0)
        fut.set_result(None)
        return child.wait(timeout=PATIENCE) + 1

    assert deeper(60) == 61


def test_callback_on_a_done_future_runs_inline_at_any_depth():
    inline = []

    def deeper(n):
        fut = Future()
        fut.add_done_callback(lambda f: deeper(n - 1) if n else None)
        fut.set_result(None)
        inline.append(fut.then(lambda f: "ran").done())

    deeper(40)
    assert len(inline) == 41
    assert all(inline)


@pytest.mark.parametrize("method", ["add_done_callback", "then"])
@pytest.mark.parametrize("callback", [None, 5])
def test_callback_must_be_callable(method, callback):
    fut = Future()
    with pytest.raises(TypeError, match="must be callable"):
        getattr(fut, method)(callback)
    assert "callbacks=0" in repr(fut)


def test_racing_adders_and_setters_run_each_callback_once():
    for _ in range(200):
        fut = Future()
        ran = []

        def add(fut=fut, ran=ran):
            for n in range(20):
                fut.add_done_callback(lambda f, n=n: ran.append(n))

        with running(add, add, lambda fut=fut: fut.set_result(None), add):
            pass
        assert sorted(ran) == sorted(list(range(20)) * 3)


# ---------------------------------------------------------------------------- removing


def test_remove_done_callback_returns_the_number_removed():
    fut = Future()
    seen = []

    class Method:
        def call(self, f):
            seen.append("method")

    method = Method()
    fut.add_done_callback(seen.append)
    fut.add_done_callback(method.call)
    fut.add_done_callback(seen.append)
    child = fut.then(seen.append)
    assert fut.remove_done_callback(seen.append) == 2
    assert fut.remove_done_callback(seen.append) == 0
    assert fut.remove_done_callback(method.call) == 1  # equal, not identical
    assert fut.remove_done_callback(print) == 0
    fut.set_result(None)
    assert seen == [fut]
    assert child.done()
    assert fut.remove_done_callback(seen.append) == 0


# ------------------------------------------------------------------------------ errors


def test_raising_callback_is_logged_and_affects_nothing_else(caplog):
    fut = Future()
    seen = []
    fut.add_done_callback(raiser(ValueError("the culprit")))
    fut.add_done_callback(seen.append)
    fut.add_done_callback(lambda: None)  # takes no argument
    with caplog.at_level(logging.ERROR, logger="torchfut_aio"):
        fut.set_result(5)
    assert seen == [fut]
    assert fut.wait() == 5
    first, second = caplog.records
    assert first.name == "torchfut_aio"
    assert "the culprit" in caplog.text
    assert "Traceback" in caplog.text
    assert "raiser" in caplog.text
    assert second.exc_info[0] is TypeError


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_in_a_callback_reaches_the_setter_at_the_end(interrupt):
    fut = Future()
    seen = []
    fut.add_done_callback(raiser(interrupt()))
    fut.add_done_callback(seen.append)
    with pytest.raises(interrupt):
        fut.set_result(5)
    assert seen == [fut]
    assert fut.wait() == 5


def test_error_in_then_has_the_types_of_torch_and_the_callback():
    class Custom(Exception):
        def __init__(self, code, *, hint):
            super().__init__(f"code {code}")
            self.code, self.hint = code, hint

    error = Custom(7, hint="try again")
    fut = Future()
    fut.set_result(1)
    child = fut.then(raiser(error))
    with pytest.raises(RuntimeError, match=r"^Got the following error when running the callback: "):
        child.wait()
    with pytest.raises(Custom, match="Custom: code 7") as caught:
        child.wait()
    assert isinstance(caught.value, CallbackError)
    assert caught.value.__cause__ is error
    assert (caught.value.code, caught.value.hint) == (7, "try again")
    assert caught.value.args == ("code 7",)
    assert caught.value.__cause__.__traceback__ is not None


def test_failed_future_is_the_cause_of_its_childrens_errors():
    error = ValueError("foo")
    fut = Future()
    child = fut.then(lambda f: f.wait())
    fut.set_exception(error)
    assert isinstance(child.exception(), ValueError)
    assert isinstance(child.exception(), CallbackError)
    assert child.exception().__cause__ is error


def test_callback_error_passes_unchanged_through_another_then():
    fut = Future()
    first = fut.then(raiser(ValueError("foo")))
    last = first.then(lambda f: f.wait()).then(lambda f: f.value())
    fut.set_result(None)
    assert last.exception() is first.exception()


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(2),
        asyncio.CancelledError("by me"),
        concurrent.futures.CancelledError(),
        GeneratorExit(),
    ],
    ids=repr,
)
def test_interrupts_and_cancellation_pass_unchanged_through_then(error):
    fut = Future()
    child = fut.then(raiser(error))
    fut.set_result(None)
    assert child.exception() is error


class Slotted(Exception):
    __slots__ = ("code",)

    def __init__(self, text):
        super().__init__(text)
        self.code = 7


class Demanding(Exception):
    def __init_subclass__(cls, *, must_be_given):
        pass


class Unprintable(Exception):
    def __str__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("error", "own_type"),
    [
        (KeyError("k"), KeyError),
        (OSError(2, "No such file", "name"), FileNotFoundError),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), UnicodeDecodeError),
        (ImportError("no", name="m", path="p"), ImportError),
        (torch.OutOfMemoryError("oom"), torch.OutOfMemoryError),
        (RuntimeError("r"), RuntimeError),
        (MemoryError("m"), MemoryError),
        (BlockingIOError(11, "would block", 3), BlockingIOError),
        (InvalidStateError("i"), asyncio.InvalidStateError),
        (Slotted("s"), Slotted),
        (Unprintable("u"), Unprintable),
        (StopIteration(3), CallbackError),
        (Demanding("d"), CallbackError),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_an_error_of_any_type_arrives_as_a_callback_error(error, own_type):
    fut = Future()
    child = fut.then(raiser(error))
    fut.set_result(None)
    got = child.exception()
    assert isinstance(got, CallbackError)
    assert isinstance(got, RuntimeError)
    assert isinstance(got, own_type)
    assert got.__cause__ is error
    assert str(got).startswith("Got the following error when running the callback: ")
    assert type(error).__name__ in str(got)
    assert got.args == error.args
    if isinstance(error, BlockingIOError):
        assert (got.errno, got.characters_written) == (11, 3)
    elif isinstance(error, OSError):
        assert (got.errno, got.strerror, got.filename) == (2, "No such file", "name")
    if isinstance(error, ImportError):
        assert (got.name, got.path) == ("m", "p")
    if isinstance(error, Slotted):
        assert got.code == 7
    if isinstance(error, UnicodeDecodeError):
        assert (got.start, got.reason) == (0, "bad")


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


def test_frozen_dataclass_error_is_the_cause_of_a_callback_error():
    error = Frozen(7)
    fut = Future()
    child = fut.then(raiser(error))
    fut.set_result(None)
    assert isinstance(child.exception(), CallbackError)
    assert child.exception().code == 7
    assert child.exception().__cause__ is error


def test_traceback_does_not_grow_along_a_chain():
    fut = last = Future()
    for _ in range(100):
        last = last.then(lambda f: f.value())
    try:
        raise ValueError("foo")
    except ValueError as error:
        fut.set_exception(error)
    with pytest.raises(ValueError, match="foo") as caught:
        last.wait()
    assert len(traceback.extract_tb(caught.value.__traceback__)) < 10
    cause = caught.value.__cause__
    assert cause is fut.exception()
    assert len(traceback.extract_tb(cause.__traceback__)) < 10


@pytest.mark.parametrize("copied", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_a_callback_error_survives_pickling(copied):
    fut = Future()
    child = fut.then(raiser(KeyError("k")))
    fut.set_result(None)
    got = copied(child.exception())
    assert isinstance(got, CallbackError)
    assert isinstance(got, KeyError)
    assert str(got) == str(child.exception())
    assert str(copied(CallbackError("plain"))) == "plain"


def test_child_completed_by_others_keeps_its_outcome(caplog):
    fut = Future()
    child = fut.then(lambda f: "late")
    child.set_result("early")
    fut.set_result(None)
    assert child.wait() == "early"
    assert "Future can only be marked completed once" in caplog.text


# --------------------------------------------------------------------- class and chains


def test_child_has_the_class_of_its_parent():
    class Ours(Future):
        pass

    class Demanding(Future):
        def __init__(self, name):
            super().__init__()

    fut = Ours()
    child = fut.then(lambda f: f.value() + 1)
    fut.set_result(1)
    assert type(child) is type(fut.then(lambda f: None)) is Ours
    assert child.wait() == 2
    assert type(Demanding("needs a name").then(lambda f: None)) is Future


@pytest.mark.parametrize("length", [20, 100_000])
def test_chain_can_have_any_length(length):
    fut = last = Future()
    for _ in range(length):
        last = last.then(lambda f: f.value() + 1)
    fut.set_result(0)
    assert last.value() == length


def test_error_passes_through_a_long_chain():
    fut = last = Future()
    for _ in range(10_000):
        last = last.then(lambda f: f.value())
    fut.set_exception(KeyError("k"))
    assert isinstance(last.exception(), KeyError)


def test_pending_long_chain_can_be_garbage_collected():
    fut = last = Future()
    for _ in range(100_000):
        last = last.then(lambda f: f.value())
    ref = weakref.ref(last)
    del fut, last
    gc.collect()
    assert ref() is None


def test_callbacks_can_complete_any_number_of_futures_in_turn():
    futures = [Future() for _ in range(20_000)]
    for this, following in itertools.pairwise(futures):
        this.add_done_callback(lambda f, following=following: following.set_result(None))
    futures[0].set_result(None)
    assert all(fut.done() for fut in futures)


def test_then_returns_a_future_result_without_unwrapping_it():
    inner, fut = Future(), Future()
    child = fut.then(lambda f: inner)
    fut.set_result(None)
    assert child.wait() is inner


def test_finaliser_can_complete_the_first_future_of_a_thread():
    def complete(what):
        fut = Future()
        fut.add_done_callback(lambda _: ran.append(what))
        fut.set_result(None)

    for interrupt in interrupts(_callbacks, thread="new", do=lambda: complete("finaliser")):
        ran = []
        thread = threading.Thread(target=complete, args=("thread",), name="new")
        with interrupt:
            thread.start()
            thread.join(PATIENCE)
        assert sorted(ran) == ["finaliser"] * (interrupt.where is not None) + ["thread"], interrupt

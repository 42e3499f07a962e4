"""A completion reaches all waiters and callbacks, even if it is interrupted."""

from __future__ import annotations

import logging
import os
import sys
import threading

import pytest
import torch

from torchfut_aio import (
    Future,
    InvalidStateError,
    _as_completed,
    _core,
    _future,
    _many,
    _to_stdlib,
    as_completed,
    collect_all,
    gather,
)

from .explorer import interrupts
from .threads import PATIENCE, until

# 1: every point.
EVERY = int(os.environ.get("TORCHFUT_AIO_TEST_EVERY", "1"))

MODULES = (_core, _future, _to_stdlib, _many, _as_completed)

errors = pytest.mark.parametrize(
    ("error", "at"),
    [(KeyboardInterrupt, "signals"), (MemoryError, "calls"), (RecursionError, "calls")],
    ids=["interrupt", "memory", "recursion"],
)


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Disable logging: these tests make callbacks fail."""
    caplog.set_level(logging.CRITICAL, "torchfut_aio")


class Waiter:
    woken = 0

    def wake(self, _waiter):
        self.woken += 1


class Dependants:
    """One object of each kind that depends on a future."""

    def __init__(self, fut):
        self.waiter, self.ran = Waiter(), []
        if not _core.add_waiter(fut, self.waiter, self.waiter):
            self.waiter.woken = True  # the future was already done
        fut.add_done_callback(self.ran.append)
        self.child = fut.then(lambda fut: "child")
        self.grandchild = self.child.then(lambda child: "grandchild")
        self.gathered, self.collected = gather([fut, fut]), collect_all([fut])
        self.completed = as_completed([fut])

    def futures(self):
        return [self.child, self.grandchild, self.gathered, self.collected]

    def check_completed(self, fut):
        until(lambda: all(future.done() for future in self.futures()))
        until(lambda: self.waiter.woken)
        until(lambda: torch._C.Future.done(fut))
        assert len(self.ran) <= 1
        assert next(self.completed) is fut
        assert not _core.waiters_of(fut)

    def check_untouched(self):
        assert not any(future.done() for future in self.futures())
        assert not self.waiter.woken
        assert not self.ran


@errors
@pytest.mark.parametrize("outcome", [5, ValueError("foo")], ids=["value", "error"])
def test_interrupted_set_result_is_complete_or_undone(outcome, error, at):
    completed = untouched = 0
    for interrupt in interrupts(*MODULES, every=EVERY, error=error, at=at):
        fut = Future()
        dependants = Dependants(fut)
        setter = fut.set_exception if isinstance(outcome, Exception) else fut.set_result
        with interrupt:
            setter(outcome)
        if fut.done():
            dependants.check_completed(fut)
            completed += 1
        else:
            dependants.check_untouched()
            setter(outcome)
            dependants.check_completed(fut)
            untouched += 1
        assert (fut.exception() or fut.value()) is outcome
    assert completed > untouched > 0


def test_interrupted_long_chain_completes_to_its_end():
    for interrupt in interrupts(*MODULES, every=17 * EVERY):
        fut = last = Future()
        for _ in range(40):  # deeper than completions nest
            last = last.then(lambda parent: parent.value())
        with interrupt:
            fut.set_result(5)
        assert last.done() == fut.done()


def test_interrupt_during_error_logging_is_raised(caplog):
    class Interrupting(logging.Handler):
        def emit(self, record):
            raise KeyboardInterrupt

    caplog.set_level(logging.ERROR, "torchfut_aio")
    fut, ran = Future(), []
    fut.add_done_callback(lambda fut: 1 / 0)
    fut.add_done_callback(ran.append)
    handler = Interrupting()
    logging.getLogger("torchfut_aio").addHandler(handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fut.set_result(5)
    finally:
        logging.getLogger("torchfut_aio").removeHandler(handler)
    assert ran == [fut]


def test_combined_future_completed_by_others_keeps_its_outcome(caplog):
    caplog.set_level(logging.ERROR, "torchfut_aio")
    for combine in (gather, collect_all):
        for outcome in (5, ValueError("foo")):
            part = Future()
            combined = combine([part])
            combined.set_result("mine")
            setter = part.set_exception if isinstance(outcome, Exception) else part.set_result
            setter(outcome)
            assert combined.value() == "mine"
    assert not caplog.records


@pytest.mark.parametrize("outcome", [5, ValueError("foo")], ids=["value", "error"])
def test_one_of_two_interleaved_setters_wins(outcome):
    won, lost = set(), set()
    other = None

    def set_other():
        try:
            fut.set_result("other")
        except InvalidStateError:
            lost.add("other")
        else:
            won.add("other")

    for interrupt in interrupts(*MODULES, every=EVERY, do=set_other):
        fut = Future()
        dependants = Dependants(fut)
        setter = fut.set_exception if isinstance(outcome, Exception) else fut.set_result
        won, lost = set(), set()
        try:
            with interrupt:
                setter(outcome)
        except InvalidStateError:
            lost.add("one")
        else:
            won.add("one")
        assert len(won) == 1
        assert not won & lost
        other = fut.exception() or fut.value()
        assert (other is outcome) == (won == {"one"})
        dependants.check_completed(fut)


def test_completion_at_any_step_of_adding_waiters_wakes_them():
    for interrupt in interrupts(*MODULES, every=EVERY, do=lambda: fut.set_result(5)):
        fut = Future()
        with interrupt:
            dependants = Dependants(fut)
        if not fut.done():
            fut.set_result(5)
        dependants.check_completed(fut)
        assert dependants.ran == [fut]


def test_waiters_added_at_any_step_of_a_completion_are_woken():
    late = []

    def follow():
        late.append(fut.then(lambda fut: fut.value()))
        late.append(gather([fut]))

    for interrupt in interrupts(*MODULES, every=EVERY, do=follow):
        fut = Future()
        with interrupt:
            fut.set_result(5)
        assert [child.value() for child in late if child.done()] == [5, [5]][: len(late)]
        late.clear()


def test_callback_removed_during_completion_is_run_or_removed():
    def remove():
        removed.append(fut.remove_done_callback(ran.append))

    for interrupt in interrupts(*MODULES, every=EVERY, do=remove):
        fut, ran, removed = Future(), [], []
        fut.add_done_callback(ran.append)
        with interrupt:
            fut.set_result(5)
        assert len(ran) + sum(removed) == 1


class Incomparable(_core.FunctionCallback):
    def __eq__(self, other):
        raise AssertionError("compared: each with each, that would be quadratic")

    __hash__ = object.__hash__


def test_waiters_and_callbacks_are_never_compared():
    fut, waiter = Future(), Waiter()
    callbacks = [Incomparable(print) for _ in range(3)]
    _core.add_waiter(fut, waiter, waiter)
    for callback in callbacks:
        _core.add_callback(fut, callback)
    waiters, found = _core.waiters_of(fut), _core.callbacks_of(fut)
    assert [id(each) for each, _ in waiters] == [id(waiter)]
    assert [*map(id, found)] == [*map(id, callbacks)]
    assert repr(fut) == "<Future pending waiters=1 callbacks=3>"


@errors
def test_interrupted_wait_leaves_no_waiter_behind(error, at):
    for interrupt in interrupts(*MODULES, every=EVERY, error=error, at=at):
        fut = Future()
        with interrupt, pytest.raises((TimeoutError, error)):
            fut.wait(timeout=0)
        assert repr(fut) == "<Future pending waiters=0 callbacks=0>"


@pytest.mark.parametrize("late", [0, 2])
def test_interrupted_as_completed_can_be_resumed(late):
    for interrupt in interrupts(*MODULES, every=EVERY):
        futures = [Future() for _ in range(4)]
        completed = as_completed(futures)
        for fut in futures[late:]:
            fut.set_result(None)
        yielded = []
        with interrupt:
            for fut in completed:
                yielded.append(fut)
                if len(yielded) == 4 - late:
                    for other in futures[:late]:
                        other.set_result(None)
        for other in futures:
            if not other.done():
                other.set_result(None)
        yielded += completed
        # A run that was interrupted just as it yielded a future may have lost that future.
        assert len(yielded) >= 3
        assert len(set(yielded)) == len(yielded)
        assert set(yielded) <= set(futures)


@pytest.mark.parametrize("left", [*range(1, 60), 100, 130, 500])
def test_completion_on_a_full_stack_completes_all_dependants(left):
    def nested(frames):
        if frames:
            nested(frames - 1)
        else:
            fut.set_result(1)

    fut = last = Future()
    for _ in range(40):
        last = last.then(lambda parent: parent.value())
    gathered = gather([last, fut])
    # The first start of a thread may import modules: not on the deep stack.
    threading.Thread(target=lambda: None).start()
    at = len(traceback_of_this_thread())
    try:
        nested(sys.getrecursionlimit() - at - left)
    except RecursionError:
        if not fut.done():
            fut.set_result(1)
    until(lambda: last.done() and gathered.done())
    assert fut.value() == 1
    assert last.exception() is not None or last.value() == 1


def traceback_of_this_thread():
    frames, frame = [], sys._getframe()
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


class RaisesForItsClass:
    @property
    def __class__(self):
        raise RuntimeError("outside of its context")


class RaisesForAll:
    def __getattribute__(self, name):
        raise RuntimeError("outside of its context")


class RaisesForTorch:
    @classmethod
    def __torch_function__(cls, *args):
        raise RuntimeError("no torch functions")


@pytest.mark.parametrize("kind", [RaisesForItsClass, RaisesForAll, RaisesForTorch])
def test_value_can_be_any_object(kind):
    value = kind()
    fut = Future()
    child, gathered = fut.then(lambda fut: fut.value()), gather([fut])
    fut.set_result(value)
    assert fut.wait(PATIENCE) is value
    assert child.wait(PATIENCE) is value
    assert gathered.wait(PATIENCE)[0] is value

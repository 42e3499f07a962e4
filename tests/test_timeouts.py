"""``with_timeout``: futures with a deadline, and the one thread for all deadlines."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import itertools
import math
import sys
import threading
import time
import weakref
from contextlib import suppress
from types import SimpleNamespace

import anyio
import pytest
import torch

from torchfut_aio import (
    Future,
    InvalidStateError,
    NotAFutureError,
    _core,
    _threads,
    _timeouts,
    as_future,
    gather,
    with_timeout,
)

from . import explorer, forks
from .accelerator import NEW, being_filled
from .loops import on_asyncio, on_every_loop
from .threads import (
    PATIENCE,
    alongside,
    cannot_start,
    no_thread_starts,
    running,
    until,
    worker_named,
)
from .waiting import Reader, polled

SOON, LATER = 0.001, 3600.0  # seconds
IDLE = "<Future pending waiters=0 callbacks=0>"


class Stop(Exception):
    pass


class Value:
    pass


def timers():
    return [t for t in threading.enumerate() if t.name == "torchfut_aio timeouts"]


@pytest.fixture(autouse=True)
def timer():
    """The timer, whose thread must end."""
    timer = worker_named("torchfut_aio timeouts")
    yield timer
    until(lambda: not timers())
    assert not timer.work


def sleeps(timer):
    """Return True if the timer's thread sleeps until a deadline."""
    latest = SimpleNamespace(when=sys.float_info.max)
    return not timer.needs_wakeup(latest)


@pytest.fixture
def pending_timeout(timer):
    """A source with a pending timeout, so that the timer's thread exists."""
    source = Future()
    with_timeout(source, LATER)
    yield source
    source.set_result(None)


# --------------------------------------------------------------------------- outcomes


def test_with_timeout_completes_like_its_source():
    value, error = Value(), Stop()
    works, fails = Future(), Future()
    on_time, failed = with_timeout(works, LATER), with_timeout(fails, LATER)
    works.set_result(value)
    fails.set_exception(error)
    assert type(on_time) is Future
    assert on_time.wait(timeout=0) is value
    assert failed.exception() is error


def test_timeout_error_names_the_number_of_seconds():
    with pytest.raises(
        TimeoutError, match=r"^the future was not done within 0\.015 s; it stays pending$"
    ):
        with_timeout(Future(), 0.015).wait(PATIENCE)


def test_timeout_does_not_expire_early():
    start = time.monotonic()
    late = with_timeout(Future(), 0.05)
    with pytest.raises(TimeoutError, match="not done"):
        late.wait(PATIENCE)
    assert time.monotonic() - start >= 0.05


def test_expired_timeout_leaves_its_source_unchanged():
    source = Future()
    late = with_timeout(source, SOON)
    until(late.done)
    assert repr(source) == IDLE
    source.set_result("late")
    assert source.value() == "late"
    assert type(late.exception()) is TimeoutError


def test_deadlines_expire_in_order():
    expired, late, between = [], [], {}
    for seconds in (0.2, 0.1, 0.3, 0.15):
        before = time.monotonic()
        late.append(with_timeout(Future(), seconds).then(lambda _, s=seconds: expired.append(s)))
        between[seconds] = before + seconds, time.monotonic() + seconds
    gather(late).wait(PATIENCE)
    assert sorted(expired) == sorted(between)
    for one, next_one in itertools.combinations(expired, 2):
        # If the machine stopped in between, the order is not known.
        assert between[one][0] < between[next_one][1]


def test_an_earlier_deadline_does_not_wait_for_a_later_one(pending_timeout, timer):
    until(lambda: sleeps(timer))
    late = with_timeout(Future(), SOON)
    assert type(late.then(Future.exception).wait(PATIENCE / 2)) is TimeoutError


def test_timeouts_of_the_same_source_are_independent():
    source = Future()
    early, late = with_timeout(source, SOON), with_timeout(source, LATER)
    until(early.done)
    source.set_result(5)
    assert type(early.exception()) is TimeoutError
    assert late.value() == 5


def test_nested_timeout_expires_at_the_earlier_deadline():
    source = Future()
    outer = with_timeout(with_timeout(source, SOON), LATER)
    with pytest.raises(TimeoutError, match=r"within 0\.001 s"):
        outer.wait(PATIENCE)
    inner = with_timeout(source, LATER)
    with pytest.raises(TimeoutError, match=r"within 0\.001 s"):
        with_timeout(inner, SOON).wait(PATIENCE)
    assert repr(inner) == IDLE
    source.set_result(None)


@pytest.mark.parametrize("seconds", [0, -1, -math.inf, 0.0, False])
def test_zero_timeout_succeeds_only_for_a_done_source(seconds):
    pending, done, failed = Future(), Future(), Future()
    done.set_result(5)
    failed.set_exception(Stop())
    assert type(with_timeout(pending, seconds).exception()) is TimeoutError
    assert repr(pending) == IDLE
    assert with_timeout(done, seconds).value() == 5
    assert type(with_timeout(failed, seconds).exception()) is Stop
    assert not timers()


@pytest.mark.parametrize("seconds", [math.inf, 10**400])
def test_infinite_timeout_starts_no_thread(seconds):
    source = Future()
    fut = with_timeout(source, seconds)
    assert not timers()
    source.set_result(5)
    assert fut.value() == 5


def test_timeout_of_none_sets_no_deadline(timer):
    source = Future()
    fut = with_timeout(source, None)
    assert not timer.work
    source.set_result(5)
    assert fut.value() == 5


@pytest.mark.parametrize("seconds", [1e10, 1e300, threading.TIMEOUT_MAX, sys.float_info.max])
def test_timeout_longer_than_the_clock_range_is_accepted(seconds, timer):
    source = Future()
    fut = with_timeout(source, seconds)
    until(lambda: sleeps(timer))
    assert times_out()
    source.set_result(5)
    assert fut.value() == 5


@pytest.mark.parametrize("seconds", ["1", [1], 1j])
def test_with_timeout_refuses_an_invalid_number_of_seconds(seconds):
    source = Future()
    with pytest.raises(TypeError, match="seconds"):
        with_timeout(source, seconds)
    assert repr(source) == IDLE


def test_with_timeout_refuses_nan():
    source = Future()
    with pytest.raises(ValueError, match="NaN"):
        with_timeout(source, math.nan)
    assert repr(source) == IDLE


def test_with_timeout_refuses_non_futures():
    with pytest.raises(NotAFutureError):
        with_timeout("text", 1)
    with pytest.raises(NotAFutureError):
        with_timeout(None, 1)
    assert not timers()


def completed_before_its_time(source, value):
    """Return a timeout of ``source``, completed with ``value`` shortly before its deadline."""
    seconds = SOON
    while True:
        fut = with_timeout(source, seconds)
        with suppress(InvalidStateError):  # the deadline has passed
            fut.set_result(value)
            return fut
        seconds *= 2


def test_future_with_a_timeout_can_be_completed_by_others(caplog):
    source, slow = Future(), Future()
    on_time, late = with_timeout(source, LATER), completed_before_its_time(slow, "mine")
    on_time.set_result("mine")
    source.set_result("its own")
    until(lambda: not timers())  # the deadline of the other one has passed
    assert on_time.value() == late.value() == "mine"
    assert repr(slow) == IDLE
    assert not caplog.records


def test_future_with_a_timeout_can_be_chained():
    on_time = with_timeout(Future(), SOON).then(lambda fut: type(fut.exception()).__name__)
    assert on_time.wait(PATIENCE) == "TimeoutError"


# ------------------------------------------------------------------- other kinds, loops


@pytest.mark.parametrize("kind", [torch.futures.Future, concurrent.futures.Future])
def test_with_timeout_adopts_other_kinds_of_future(kind):
    source, slow = kind(), kind()
    fut, late = with_timeout(source, LATER), with_timeout(slow, SOON)
    source.set_result(5)
    assert fut.wait(PATIENCE) == 5
    with pytest.raises(TimeoutError, match="not done"):
        late.wait(PATIENCE)
    assert repr(as_future(slow)) == IDLE


@on_asyncio
async def test_with_timeout_adopts_an_asyncio_future():
    loop = asyncio.get_running_loop()
    source, slow = loop.create_future(), loop.create_future()
    fut, late = with_timeout(source, LATER), with_timeout(slow, SOON)
    source.set_result(5)
    assert await fut == 5
    with pytest.raises(TimeoutError, match="not done"):
        await late
    assert not slow.done()


@on_every_loop
async def test_future_with_a_timeout_can_be_awaited():
    source = Future()
    fut, late = with_timeout(source, LATER), with_timeout(Future(), SOON)
    async with alongside(lambda: source.set_result(5)):
        assert await fut == 5
    with anyio.fail_after(PATIENCE), pytest.raises(TimeoutError, match="not done within"):
        await late


@on_every_loop
@pytest.mark.device
@pytest.mark.parametrize("when", ["before", "after"])
async def test_future_with_a_timeout_is_ready_with_its_source(accelerator, producer, when):
    source = Future()
    if when == "before":
        fut = with_timeout(source, LATER)
    with producer:
        source.set_result(being_filled(accelerator))
    if when == "after":
        fut = with_timeout(source, LATER)
    reader = Reader(fut)
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await polled()
        assert fut.done()
        assert reader.outcome is None
        accelerator.wake()
    assert reader.outcome is source.value()
    assert reader.outcome.tolist() == NEW


# ------------------------------------------------------------------------- the thread


def test_timeouts_share_one_thread():
    sources = [Future() for _ in range(1000)]
    most = []
    for source in sources:
        with_timeout(source, LATER)
        most.append(len(timers()))
    assert set(most) == {1}
    for source in sources:
        source.set_result(None)


def test_timeouts_set_by_many_threads_share_one_thread():
    active, most = [], 0

    def callback(fut):
        nonlocal most
        # Not in with_timeout(), which runs callbacks if the deadline has already passed.
        if threading.current_thread() in timers():
            active.append(fut)
            most = max(most, len(active))
            time.sleep(0.0001)  # time for another thread, if there were one
            active.remove(fut)

    for _ in range(20):
        futures = []

        def client():
            for n in range(20):
                source = Future()
                futures.append(with_timeout(source, SOON if n % 2 else LATER))
                futures[-1].add_done_callback(callback)
                if not n % 2:
                    source.set_result(n)

        with running(*[client] * 4):
            pass
        until(lambda: all(fut.done() for fut in futures))
        # Threads that start at the same moment agree on one timer thread. Another may be ending.
        until(lambda: not timers())
    assert most == 1


def test_timer_thread_ends_when_all_sources_have_completed():
    sources = [Future() for _ in range(10)]
    for source in sources:
        with_timeout(source, LATER)
    assert timers()
    for source in sources:
        source.set_result(None)
    until(lambda: not timers())


def test_timer_thread_ends_when_all_timeouts_have_expired():
    late = [with_timeout(Future(), SOON) for _ in range(10)]
    until(lambda: not timers())
    assert all(type(fut.exception()) is TimeoutError for fut in late)


def test_timeout_of_a_done_source_starts_no_thread():
    source = Future()
    source.set_result(5)
    assert with_timeout(source, LATER).value() == 5
    assert not timers()


def test_timer_thread_can_restart_any_number_of_times(timer):
    for _ in range(200):
        source = Future()
        fut, late = with_timeout(source, LATER), with_timeout(Future(), 1e-6)
        source.set_result(5)
        assert fut.value() == 5
        assert type(late.then(Future.exception).wait(PATIENCE)) is TimeoutError
    until(lambda: not timers())
    # Items may have been added while the thread was ending: the next thread takes them.
    source = Future()
    with_timeout(source, LATER)
    until(lambda: not timer.new)
    source.set_result(None)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, Stop, GeneratorExit])
def test_raising_callback_does_not_end_the_timer_thread(kind, pending_timeout, caplog):
    def callback(fut):
        if threading.current_thread() in timers():
            raise kind
        return "it was over already"

    failed, seconds = None, SOON
    while failed is None or failed.exception() is None:
        late = with_timeout(Future(), seconds)
        late.add_done_callback(callback)
        failed = late.then(callback)
        until(failed.done)
        seconds *= 2
        assert seconds < PATIENCE
    assert isinstance(failed.exception(), kind)
    assert type(with_timeout(Future(), SOON).then(Future.exception).wait(PATIENCE)) is TimeoutError


def test_raising_repr_does_not_end_the_timer_thread(pending_timeout):
    class RaisingRepr(Future):
        def __repr__(self):
            raise Stop

    first = with_timeout(RaisingRepr(), SOON)
    late = with_timeout(Future(), SOON).then(Future.exception)
    assert type(late.wait(PATIENCE)) is TimeoutError
    assert type(first.exception()) is TimeoutError


def test_failed_timer_thread_start_fails_only_one_timeout():
    source = Future()
    with no_thread_starts():
        with pytest.raises(RuntimeError, match="can't start new thread"):
            with_timeout(source, SOON)
    assert repr(source) == IDLE
    assert type(with_timeout(source, SOON).then(Future.exception).wait(PATIENCE)) is TimeoutError


def test_failed_timer_thread_start_leaves_no_deadline_behind(timer):
    with no_thread_starts():
        with pytest.raises(RuntimeError, match="can't start new thread"):
            with_timeout(Future(), LATER)
    assert not timer.work
    assert not timer.new


def test_concurrent_timeout_expires_or_raises_without_a_thread(monkeypatch):
    outcomes = []

    def other():
        try:
            outcomes.append(with_timeout(Future(), SOON))
        except RuntimeError as error:
            outcomes.append(error)

    def start_other_first(thread):
        patch.undo()
        with running(other):
            pass
        cannot_start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_other_first)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            with_timeout(Future(), SOON)
    [outcome] = outcomes
    if isinstance(outcome, Future):
        raised = outcome.then(Future.exception).wait(PATIENCE)
        assert isinstance(raised, (TimeoutError, RuntimeError))


# --------------------------------------------------------------------------- interrupts


def times_out():
    """Return whether timeouts work."""
    late = with_timeout(Future(), SOON).then(Future.exception)
    return isinstance(late.wait(PATIENCE), TimeoutError)


@pytest.mark.parametrize("seconds", [SOON, LATER, 0])
def test_interrupted_with_timeout_leaves_nothing_with_its_source(seconds):
    for interrupt in explorer.interrupts(_timeouts, _threads):
        source = Future()
        with interrupt:
            fut = with_timeout(source, seconds)
        assert interrupt.raised == (interrupt.where is not None), interrupt
        if interrupt.raised:
            assert repr(source) == IDLE, interrupt
        elif seconds == LATER:
            source.set_result(5)
            assert fut.value() == 5
        else:
            fut.then(Future.exception).wait(PATIENCE)
        assert times_out(), interrupt
        until(lambda: not timers())


def test_interrupted_with_timeout_loses_no_other_timeouts():
    def set_another_and_interrupt():
        with running(lambda: others.append(with_timeout(source, LATER))):
            pass
        raise KeyboardInterrupt

    for interrupt in explorer.interrupts(_timeouts, _threads, do=set_another_and_interrupt):
        source, others = Future(), []
        with suppress(KeyboardInterrupt), interrupt:
            with_timeout(Future(), SOON)
        assert len(others) == (interrupt.where is not None)
        assert not any(other.done() for other in others), interrupt
        source.set_result(5)
        assert all(other.value() == 5 for other in others), interrupt
        until(lambda: not timers())


def test_interrupted_completion_leaves_no_timeout_pending(timer):
    for interrupt in explorer.interrupts(_timeouts, _threads):
        source = Future()
        fut = with_timeout(source, LATER)
        with interrupt:
            source.set_result(5)
        assert fut.done(), interrupt
        assert not timer.work, interrupt
        until(lambda: not timers())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_memory_error_in_the_timer_leaves_no_future_pending():
    for interrupt in explorer.interrupts(
        _timeouts, _threads, error=MemoryError, at="calls", thread="torchfut_aio timeouts"
    ):
        with interrupt:
            late = [with_timeout(Future(), SOON) for _ in range(2)]
            until(lambda: interrupt.where or not timers())
        assert times_out(), interrupt  # starts a thread if the other one died before its first line
        until(lambda: all(fut.done() for fut in late))
        until(lambda: not timers())


@pytest.mark.parametrize("has_thread", [False, True])
def test_real_ctrl_c_does_not_stop_later_timeouts(has_thread):
    printed = forks.output(f"""
        import logging, signal, sys, time
        from torchfut_aio import Future, with_timeout
        from torchfut_aio._threads import workers

        logging.getLogger("torchfut_aio.unretrieved").disabled = True
        sys.unraisablehook = lambda _: None  # threading has weak references with callbacks

        def interrupt(signum, frame):
            if armed:
                armed.clear()
                raise KeyboardInterrupt

        def attempt():
            with_timeout(Future(), 0.0001)
            while armed:
                pass

        armed, interrupts = [], 0
        signal.signal(signal.SIGALRM, interrupt)
        kept = with_timeout(Future(), 3600) if {has_thread} else None
        for n in range(300):
            give_up = time.monotonic() + 30
            while kept is None and any(worker.threads() for worker in workers()):
                assert time.monotonic() < give_up
            try:
                armed.append(True)
                signal.setitimer(signal.ITIMER_REAL, (n % 60 * 5 + 1) * 1e-6)
                attempt()
            except KeyboardInterrupt:
                interrupts += 1
            late = with_timeout(Future(), 0.0001).then(lambda fut: type(fut.exception()))
            assert late.wait(30) is TimeoutError
        print(interrupts)
    """)
    assert int(printed) > 200


# ----------------------------------------------------------------------------- memory


def test_completed_timeout_keeps_no_object_alive(pending_timeout, timer):
    until(lambda: sleeps(timer))

    def completed():
        source, value = Future(), Value()
        fut = with_timeout(source, LATER)
        source.set_result(value)
        return [weakref.ref(thing) for thing in (source, value, fut)]

    refs = completed()
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def test_expired_timeout_keeps_no_object_alive(pending_timeout):
    source = Future()
    late = with_timeout(source, SOON)
    until(late.done)
    refs = [weakref.ref(source), weakref.ref(late)]
    del source, late
    until(lambda: gc.collect() is not None and not any(ref() for ref in refs))
    assert [ref() for ref in refs] == [None] * 2


def deadlines():
    return sum(issubclass(type(thing), _core.DoneCallback) for thing in gc.get_objects())


def test_completed_timeouts_do_not_accumulate(pending_timeout, timer):
    for n in range(20_000):
        source = Future()
        with_timeout(source, LATER)
        source.set_result(n)
    assert len(timer.work) == 1
    until(lambda: len(timer.new) < 2_000)
    until(lambda: deadlines() < 4_000)


def test_timer_thread_drops_timeouts_completed_while_it_slept(pending_timeout, timer):
    sources = [Future() for _ in range(5_000)]
    for source in sources:
        with_timeout(source, LATER)
    with_timeout(Future(), SOON)
    until(lambda: not timer.new)  # the thread has taken all
    for source in sources:
        source.set_result(None)
    late = with_timeout(Future(), SOON)  # wakes the thread
    until(lambda: deadlines() < 2_000)
    assert isinstance(late.then(Future.exception).wait(PATIENCE), TimeoutError)


def test_timeout_expires_without_other_references_to_its_source():
    late = with_timeout(Future(), SOON)
    gc.collect()
    with pytest.raises(TimeoutError, match="not done"):
        late.wait(PATIENCE)


# ------------------------------------------------------------------------------ races


def test_exactly_one_of_completion_and_expiry_wins():
    for n in range(300):
        source, ran = Future(), []
        seconds = n % 10 * 2e-5
        fut = with_timeout(source, seconds)
        fut.add_done_callback(ran.append)
        with running(lambda: source.set_result(n)):
            pass
        until(lambda: ran)
        if fut.exception() is None:
            assert fut.value() == n
        else:
            assert type(fut.exception()) is TimeoutError
        until(lambda: not timers())
        assert ran == [fut]


def test_racing_completions_and_expiries_are_never_lost(timer):
    for _ in range(10):
        sources = [Future() for _ in range(200)]
        futures = [with_timeout(fut, n * 2e-5) for n, fut in enumerate(sources)]
        with running(
            lambda: [fut.set_result(n) for n, fut in enumerate(sources[::2])],
            lambda: [fut.set_result(n) for n, fut in enumerate(sources[1::2])],
        ):
            pass
        until(lambda: all(fut.done() for fut in futures))
        for fut in futures:
            assert fut.exception() is None or type(fut.exception()) is TimeoutError
        until(lambda: not timers())
        assert not timer.work


def test_finalisers_can_complete_sources_and_set_timeouts():
    made = []

    class Finalised:
        def __init__(self):
            self.me = self  # a cycle: only the collector frees it, at any allocation
            self.source = Future()
            made.append(with_timeout(self.source, LATER))

        def __del__(self):
            self.source.set_result("finalised")
            made.append(with_timeout(Future(), SOON))

    threshold = gc.get_threshold()
    gc.set_threshold(7)
    try:

        def client():
            for _ in range(300):
                Finalised()
                source = Future()
                made.append(with_timeout(source, LATER))
                source.set_result(5)

        with running(client, client):
            pass
    finally:
        gc.set_threshold(*threshold)

    def all_are_done():
        gc.collect()  # does nothing while another thread's collector runs a finaliser
        return all(fut.done() for fut in made)

    until(all_are_done)
    assert len(made) == 2 * 300 * 3


# -------------------------------------------------------------------------- processes


def test_interpreter_exits_at_once_with_a_pending_timeout():
    printed = forks.output("""
        import atexit, threading, time
        from torchfut_aio import Future, with_timeout

        kept = with_timeout(Future(), 3600)
        print([t.name for t in threading.enumerate()][1:])
    """)
    assert printed == "['torchfut_aio timeouts']\n"


def test_forked_child_can_set_timeouts():
    printed = forks.output("""
        import os, sys, warnings
        from torchfut_aio import Future, with_timeout

        kept = with_timeout(Future(), 3600)  # so the parent has a thread, and the child has not
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
        try:
            with_timeout(Future(), 0.01).wait(30)
        except TimeoutError as error:
            print(str(error).partition("was")[2].strip(), flush=True)
        if not child:
            os._exit(0)
    """)
    assert printed == "not done within 0.01 s; it stays pending\n" * 2


def test_timeout_inherited_by_a_forked_child_expires_there():
    printed = forks.output("""
        import os, warnings
        from torchfut_aio import Future, with_timeout

        source = Future()
        late, on_time = with_timeout(source, 0.1), with_timeout(source, 3600)
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
        print(late.then(lambda fut: type(fut.exception()).__name__).wait(30), flush=True)
        source.set_result(5)
        print(on_time.value(), flush=True)
        if not child:
            os._exit(0)
    """)
    assert printed == "TimeoutError\n5\n" * 2


def test_with_timeout_of_none_is_checked_like_its_source():
    async def main(fut):
        await fut

    loop = asyncio.new_event_loop()
    source = loop.create_future()  # of a loop that does not run
    other = asyncio.new_event_loop()
    try:
        pending = with_timeout(as_future(source), None)
        with pytest.raises(RuntimeError):
            other.run_until_complete(asyncio.wait_for(main(pending), PATIENCE))
    finally:
        other.close()
        loop.close()

"""``with_timeout``: a future with a deadline, and the one thread that looks after them."""

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

import anyio
import pytest
import torch

from torchfut_aio import (
    Future,
    InvalidStateError,
    NotAFutureError,
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
def timer(monkeypatch):
    """A timer for each test, so that what goes wrong with it does so in one; it has to end."""
    timer = _timeouts._Timer("torchfut_aio timeouts")
    monkeypatch.setattr(_timeouts, "_timer", timer)
    yield timer
    until(lambda: not timers())
    assert not timer.work


@pytest.fixture
def looked_after(timer):
    """A timeout that is pending meanwhile, so that the thread is there."""
    source = Future()
    with_timeout(source, LATER)
    yield source
    source.set_result(None)


# --------------------------------------------------------------------------- outcomes


def test_it_completes_as_its_source_does():
    value, error = Value(), Stop()
    works, fails = Future(), Future()
    on_time, failed = with_timeout(works, LATER), with_timeout(fails, LATER)
    works.set_result(value)
    fails.set_exception(error)
    assert type(on_time) is Future
    assert on_time.wait(timeout=0) is value
    assert failed.exception() is error


def test_it_fails_in_time_and_tells_after_how_many_seconds():
    with pytest.raises(
        TimeoutError, match=r"^the future was not done within 0\.015 s; it stays pending$"
    ):
        with_timeout(Future(), 0.015).wait(PATIENCE)


def test_it_does_not_fail_before_its_time():
    start = time.monotonic()
    late = with_timeout(Future(), 0.05)
    with pytest.raises(TimeoutError, match="not done"):
        late.wait(PATIENCE)
    assert time.monotonic() - start >= 0.05


def test_what_has_timed_out_leaves_its_source_as_it_was():
    source = Future()
    late = with_timeout(source, SOON)
    until(late.done)
    assert repr(source) == IDLE
    source.set_result("late")
    assert source.value() == "late"
    assert type(late.exception()) is TimeoutError


def test_deadlines_come_in_the_order_of_time():
    came, late, between = [], [], {}
    for seconds in (0.2, 0.1, 0.3, 0.15):
        before = time.monotonic()
        late.append(with_timeout(Future(), seconds).then(lambda _, s=seconds: came.append(s)))
        between[seconds] = before + seconds, time.monotonic() + seconds
    gather(late).wait(PATIENCE)
    assert sorted(came) == sorted(between)
    for one, next_one in itertools.combinations(came, 2):
        # On a machine that stopped for long in between, another order may be the right one.
        assert between[one][0] < between[next_one][1]


def test_an_earlier_deadline_does_not_wait_for_a_later_one(looked_after, timer):
    until(lambda: timer._wakes_at < math.inf)  # the thread sleeps until the later one
    late = with_timeout(Future(), SOON)
    assert type(late.then(Future.exception).wait(PATIENCE / 2)) is TimeoutError


def test_several_timeouts_of_one_source_are_each_their_own():
    source = Future()
    early, late = with_timeout(source, SOON), with_timeout(source, LATER)
    until(early.done)
    source.set_result(5)
    assert type(early.exception()) is TimeoutError
    assert late.value() == 5


def test_a_timeout_of_a_timeout_ends_with_the_earlier_of_both():
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
def test_without_any_time_only_what_is_done_is_in_time(seconds):
    pending, done, failed = Future(), Future(), Future()
    done.set_result(5)
    failed.set_exception(Stop())
    assert type(with_timeout(pending, seconds).exception()) is TimeoutError
    assert repr(pending) == IDLE
    assert with_timeout(done, seconds).value() == 5
    assert type(with_timeout(failed, seconds).exception()) is Stop
    assert not timers()


@pytest.mark.parametrize("seconds", [math.inf, 10**400])
def test_for_ever_takes_no_thread(seconds):
    source = Future()
    fut = with_timeout(source, seconds)
    assert not timers()
    source.set_result(5)
    assert fut.value() == 5


def test_none_is_no_deadline(timer):
    source = Future()
    fut = with_timeout(source, None)
    assert not timer.work
    source.set_result(5)
    assert fut.value() == 5


@pytest.mark.parametrize("seconds", [1e10, 1e300, threading.TIMEOUT_MAX, sys.float_info.max])
def test_longer_than_a_clock_can_count_is_fine(seconds, timer):
    source = Future()
    fut = with_timeout(source, seconds)
    until(lambda: timer._wakes_at > threading.TIMEOUT_MAX / 2)
    source.set_result(5)
    assert fut.value() == 5


@pytest.mark.parametrize("seconds", ["1", [1], 1j])
def test_what_is_no_number_of_seconds_is_refused(seconds):
    source = Future()
    with pytest.raises(TypeError, match="seconds"):
        with_timeout(source, seconds)
    assert repr(source) == IDLE


def test_nan_is_refused():
    source = Future()
    with pytest.raises(ValueError, match="NaN"):
        with_timeout(source, math.nan)
    assert repr(source) == IDLE


def test_what_is_no_future_is_refused():
    with pytest.raises(NotAFutureError):
        with_timeout("text", 1)
    with pytest.raises(NotAFutureError):
        with_timeout(None, 1)
    assert not timers()


def completed_before_its_time(source, value):
    """A timeout of ``source`` that was completed with ``value`` shortly before it was over."""
    seconds = SOON
    while True:
        fut = with_timeout(source, seconds)
        with suppress(InvalidStateError):  # it was over
            fut.set_result(value)
            return fut
        seconds *= 2


def test_somebody_else_may_complete_it(caplog):
    source, slow = Future(), Future()
    on_time, late = with_timeout(source, LATER), completed_before_its_time(slow, "mine")
    on_time.set_result("mine")
    source.set_result("its own")
    until(lambda: not timers())  # the deadline of the other is over
    assert on_time.value() == late.value() == "mine"
    assert repr(slow) == IDLE
    assert not caplog.records


def test_it_chains():
    on_time = with_timeout(Future(), SOON).then(lambda fut: type(fut.exception()).__name__)
    assert on_time.wait(PATIENCE) == "TimeoutError"


# ------------------------------------------------------------------- other kinds, loops


@pytest.mark.parametrize("kind", [torch.futures.Future, concurrent.futures.Future])
def test_other_kinds_of_future_are_adopted(kind):
    source, slow = kind(), kind()
    fut, late = with_timeout(source, LATER), with_timeout(slow, SOON)
    source.set_result(5)
    assert fut.wait(PATIENCE) == 5
    with pytest.raises(TimeoutError, match="not done"):
        late.wait(PATIENCE)
    assert repr(as_future(slow)) == IDLE


@on_asyncio
async def test_an_asyncio_future_is_adopted():
    loop = asyncio.get_running_loop()
    source, slow = loop.create_future(), loop.create_future()
    fut, late = with_timeout(source, LATER), with_timeout(slow, SOON)
    source.set_result(5)
    assert await fut == 5
    with pytest.raises(TimeoutError, match="not done"):
        await late
    assert not slow.done()


@on_every_loop
async def test_it_is_awaited_like_any_future():
    source = Future()
    fut, late = with_timeout(source, LATER), with_timeout(Future(), SOON)
    async with alongside(lambda: source.set_result(5)):
        assert await fut == 5
    with anyio.fail_after(PATIENCE), pytest.raises(TimeoutError, match="not done within"):
        await late


@on_every_loop
@pytest.mark.device
@pytest.mark.parametrize("when", ["before", "after"])
async def test_its_value_is_ready_when_that_of_its_source_is(accelerator, producer, when):
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


def test_one_thread_looks_after_any_number_of_timeouts():
    sources = [Future() for _ in range(1000)]
    most = []
    for source in sources:
        with_timeout(source, LATER)
        most.append(len(timers()))
    assert set(most) == {1}
    for source in sources:
        source.set_result(None)


def test_one_thread_serves_many_threads_at_once():
    serving, most = [], 0

    def served(fut):
        nonlocal most
        if threading.current_thread() in timers():  # and not at once, where it was over already
            serving.append(fut)
            most = max(most, len(serving))
            time.sleep(0.0001)  # for another thread, if there were one
            serving.remove(fut)

    for _ in range(20):
        futures = []

        def client():
            for n in range(20):
                source = Future()
                futures.append(with_timeout(source, SOON if n % 2 else LATER))
                futures[-1].add_done_callback(served)
                if not n % 2:
                    source.set_result(n)

        with running(*[client] * 4):
            pass
        until(lambda: all(fut.done() for fut in futures))
        # Those that start at the same moment agree on one. Another may be about to end.
        until(lambda: not timers())
    assert most == 1


def test_the_thread_ends_when_everything_has_completed():
    sources = [Future() for _ in range(10)]
    for source in sources:
        with_timeout(source, LATER)
    assert timers()
    for source in sources:
        source.set_result(None)
    until(lambda: not timers())


def test_the_thread_ends_when_everything_has_timed_out():
    late = [with_timeout(Future(), SOON) for _ in range(10)]
    until(lambda: not timers())
    assert all(type(fut.exception()) is TimeoutError for fut in late)


def test_a_source_that_is_done_takes_no_thread():
    source = Future()
    source.set_result(5)
    assert with_timeout(source, LATER).value() == 5
    assert not timers()


def test_the_thread_comes_and_goes_any_number_of_times(timer):
    for _ in range(200):
        source = Future()
        fut, late = with_timeout(source, LATER), with_timeout(Future(), 1e-6)
        source.set_result(5)
        assert fut.value() == 5
        assert type(late.then(Future.exception).wait(PATIENCE)) is TimeoutError
    until(lambda: not timers())
    # What is left was put while the thread was on its way out: the next one takes it.
    source = Future()
    with_timeout(source, LATER)
    until(timer._wakeups.empty)
    source.set_result(None)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, Stop, GeneratorExit])
def test_what_a_callback_raises_does_not_stop_the_thread(kind, looked_after, caplog):
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


def test_a_source_whose_repr_raises_does_not_stop_the_thread(looked_after):
    class Shy(Future):
        def __repr__(self):
            raise Stop

    shy = with_timeout(Shy(), SOON)
    late = with_timeout(Future(), SOON).then(Future.exception)
    assert type(late.wait(PATIENCE)) is TimeoutError
    assert type(shy.exception()) is TimeoutError


def test_a_thread_that_cannot_be_started_is_one_timeouts_error():
    source = Future()
    with no_thread_starts():
        with pytest.raises(RuntimeError, match="can't start new thread"):
            with_timeout(source, SOON)
    assert repr(source) == IDLE
    assert type(with_timeout(source, SOON).then(Future.exception).wait(PATIENCE)) is TimeoutError


def test_a_thread_that_cannot_be_started_leaves_no_deadline_behind(timer):
    with no_thread_starts():
        with pytest.raises(RuntimeError, match="can't start new thread"):
            with_timeout(Future(), LATER)
    assert not timer.work
    assert not timer.new


def test_who_relied_on_a_thread_that_cannot_be_started_times_out_or_is_told(monkeypatch):
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
        told = outcome.then(Future.exception).wait(PATIENCE)
        assert isinstance(told, (TimeoutError, RuntimeError))


# --------------------------------------------------------------------------- interrupts


def times_out():
    """Tells whether timeouts work."""
    late = with_timeout(Future(), SOON).then(Future.exception)
    return isinstance(late.wait(PATIENCE), TimeoutError)


@pytest.mark.parametrize("seconds", [SOON, LATER, 0])
def test_interrupted_with_timeout_leaves_nothing_with_its_source(seconds):
    for strike in explorer.strikes(_timeouts, _threads):
        source = Future()
        with strike:
            fut = with_timeout(source, seconds)
        assert strike.raised == (strike.where is not None), strike
        if strike.raised:
            assert repr(source) == IDLE, strike
        elif seconds == LATER:
            source.set_result(5)
            assert fut.value() == 5
        else:
            fut.then(Future.exception).wait(PATIENCE)
        assert times_out(), strike
        until(lambda: not timers())


def test_whoever_is_struck_while_setting_a_timeout_takes_none_away_from_other_threads():
    def set_another_and_strike():
        with running(lambda: others.append(with_timeout(source, LATER))):
            pass
        raise KeyboardInterrupt

    for strike in explorer.strikes(_timeouts, _threads, do=set_another_and_strike):
        source, others = Future(), []
        with suppress(KeyboardInterrupt), strike:
            with_timeout(Future(), SOON)
        assert len(others) == (strike.where is not None)
        assert not any(other.done() for other in others), strike
        source.set_result(5)
        assert all(other.value() == 5 for other in others), strike
        until(lambda: not timers())


def test_whoever_is_struck_while_completing_a_source_leaves_no_timeout_pending(timer):
    for strike in explorer.strikes(_timeouts, _threads):
        source = Future()
        fut = with_timeout(source, LATER)
        with strike:
            source.set_result(5)
        assert fut.done(), strike
        assert not timer.work, strike
        until(lambda: not timers())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_runs_out_of_memory_at_any_step_leaves_no_future_pending():
    for strike in explorer.strikes(
        _timeouts, _threads, error=MemoryError, at="calls", thread="torchfut_aio timeouts"
    ):
        with strike:
            late = [with_timeout(Future(), SOON) for _ in range(2)]
            until(lambda: strike.where or not timers())
        assert times_out(), strike  # which starts a thread, if that one died before its first line
        until(lambda: all(fut.done() for fut in late))
        until(lambda: not timers())


@pytest.mark.parametrize("there_is_a_thread", [False, True])
def test_a_real_ctrl_c_stops_no_later_timeout(there_is_a_thread):
    printed = forks.output(f"""
        import logging, signal, sys, time
        from torchfut_aio import Future, _timeouts, with_timeout

        logging.getLogger("torchfut_aio.unretrieved").disabled = True
        sys.unraisablehook = lambda _: None  # threading has weak references with callbacks

        def strike(signum, frame):
            if armed:
                armed.clear()
                raise KeyboardInterrupt

        def attempt():
            with_timeout(Future(), 0.0001)
            while armed:
                pass

        armed, strikes = [], 0
        signal.signal(signal.SIGALRM, strike)
        kept = with_timeout(Future(), 3600) if {there_is_a_thread} else None
        for n in range(300):
            give_up = time.monotonic() + 30
            while kept is None and _timeouts._timer.threads():
                assert time.monotonic() < give_up
            try:
                armed.append(True)
                signal.setitimer(signal.ITIMER_REAL, (n % 60 * 5 + 1) * 1e-6)
                attempt()
            except KeyboardInterrupt:
                strikes += 1
            late = with_timeout(Future(), 0.0001).then(lambda fut: type(fut.exception()))
            assert late.wait(30) is TimeoutError
        print(strikes)
    """)
    assert int(printed) > 200


# ----------------------------------------------------------------------------- memory


def test_a_completed_timeout_keeps_nothing_alive(looked_after, timer):
    until(lambda: timer._wakes_at < math.inf)  # the thread sleeps

    def completed():
        source, value = Future(), Value()
        fut = with_timeout(source, LATER)
        source.set_result(value)
        return [weakref.ref(thing) for thing in (source, value, fut)]

    refs = completed()
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def test_a_timeout_that_is_over_keeps_nothing_alive(looked_after):
    source = Future()
    late = with_timeout(source, SOON)
    until(late.done)
    refs = [weakref.ref(source), weakref.ref(late)]
    del source, late
    until(lambda: gc.collect() is not None and not any(ref() for ref in refs))
    assert [ref() for ref in refs] == [None] * 2


def deadlines():
    return sum(type(thing) is _timeouts._Deadline for thing in gc.get_objects())


def test_any_number_of_completed_timeouts_do_not_pile_up(looked_after, timer):
    for n in range(20_000):
        source = Future()
        with_timeout(source, LATER)
        source.set_result(n)
    assert len(timer.work) == 1
    until(lambda: len(timer.new) < 2_000 and timer._wakeups.empty())
    assert deadlines() < 4_000


def test_the_thread_does_not_keep_what_completed_while_it_slept(looked_after, timer):
    sources = [Future() for _ in range(5_000)]
    for source in sources:
        with_timeout(source, LATER)
    with_timeout(Future(), SOON)
    until(lambda: not timer.new)  # it knows of all
    for source in sources:
        source.set_result(None)
    late = with_timeout(Future(), SOON)  # it wakes
    until(lambda: deadlines() < 2_000)
    assert isinstance(late.then(Future.exception).wait(PATIENCE), TimeoutError)


def test_a_source_forgotten_by_all_times_out_nevertheless():
    late = with_timeout(Future(), SOON)
    gc.collect()
    with pytest.raises(TimeoutError, match="not done"):
        late.wait(PATIENCE)


# ------------------------------------------------------------------------------ races


def test_of_completion_and_expiry_exactly_one_wins():
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


def test_of_many_racing_completions_and_expiries_none_is_lost(timer):
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


def test_finalisers_may_complete_sources_and_set_timeouts_in_the_middle_of_anything():
    made = []

    class Finalised:
        def __init__(self):
            self.me = self  # for the collector to find, at any allocation
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
        gc.collect()  # it does nothing while another thread's collector calls a finaliser
        return all(fut.done() for fut in made)

    until(all_are_done)
    assert len(made) == 2 * 300 * 3


# -------------------------------------------------------------------------- processes


def test_the_interpreter_exits_at_once_with_a_timeout_pending():
    printed = forks.output("""
        import atexit, threading, time
        from torchfut_aio import Future, with_timeout

        kept = with_timeout(Future(), 3600)
        print([t.name for t in threading.enumerate()][1:])
    """)
    assert printed == "['torchfut_aio timeouts']\n"


def test_a_forked_child_has_timeouts_of_its_own():
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


def test_a_timeout_that_a_forked_child_inherits_fires_there_too():
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

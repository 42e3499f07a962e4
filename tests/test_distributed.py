"""Collectives, RPC and DDP between real processes: calling, serving, awaiting."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import gc
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import anyio
import anyio.from_thread
import pytest
import sniffio
import torch
import torch.distributed as dist
import trio
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from torchfut_aio import BlockingWaitWarning, Future, NotAFutureError, _threads, as_future
from torchfut_aio.distributed import (
    _background_loop,
    async_comm_hook,
    async_rpc,
    serve_on,
    shutdown,
)

from . import explorer, forks, services
from .accelerator import FIRST, NEW, being_filled, read_on_current_stream
from .cluster import LOOPS, Cluster
from .loops import on_every_loop
from .threads import PATIENCE, no_thread_starts, running, until

every_loop = pytest.mark.parametrize("loop", LOOPS)
needs_rpc = pytest.mark.usefixtures("tensorpipe")


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def pair(request, tensorpipe):
    """Two processes whose async functions run on that kind of loop."""
    with Cluster(2, uvloop=request.param == "uvloop") as cluster:
        cluster.loop = request.param
        yield cluster


@pytest.fixture(scope="module")
def four():
    with Cluster(4, rpc=False) as cluster:
        yield cluster


# ------------------------------------------------------------------ collectives


@every_loop
def test_await_of_any_collective_returns_its_result(four, loop):
    for rank, found in enumerate(four.everywhere(services.collectives, loop)):
        assert torch.equal(found["all_reduce"], torch.full((4,), 10.0))
        assert found["broadcast"].item() == 3
        assert found["all_gather"].tolist() == [0, 1, 2, 3]
        assert found["reduce_scatter"].item() == sum(4 * n + rank for n in range(4))
        assert found["all_to_all"].tolist() == [0, 1, 2, 3]
        assert found["irecv"].item() == (rank - 1) % 4


@every_loop
@pytest.mark.parametrize("functional", [False, True])
def test_await_of_a_collective_lasts_until_all_ranks_join(four, loop, functional):
    if functional and torch.__version__ < "2.13":
        pytest.skip("this PyTorch waits for it only in the thread that began it: see below")
    wait = services.all_reduce_that_waits_for_others
    for early, total in four.everywhere(wait, loop, functional):
        assert (early, total) == (False, 4)


@pytest.mark.skipif(torch.__version__ >= "2.13", reason="it can be awaited")
@pytest.mark.usefixtures("group_of_one")
def test_unawaitable_functional_collective_is_refused():
    source = services.all_reduce(True)
    with pytest.raises(NotAFutureError, match="async_op=True"):
        as_future(source)
    assert source.trigger_wait().item() == 1


def test_collective_fails_when_a_peer_dies_and_the_loop_runs_on():
    with Cluster(2, rpc=False) as cluster:
        cluster.start(0, services.all_reduce_without_the_last, "uvloop")
        cluster.kill(1)
        assert cluster.result(0) == "RuntimeError"


# -------------------------------------------------------------------- RPC: callers


@every_loop
@pytest.mark.parametrize("function", [services.fails, services.fails_later, services.fails_at_once])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("value", "builtins.ValueError"),
        ("key", "builtins.KeyError"),
        ("type", "builtins.TypeError"),
        ("odd", "tests.services.Odd"),
    ],
)
def test_a_remote_error_keeps_its_type_and_its_traceback(pair, loop, function, kind, expected):
    name, text = pair.call(0, services.failure, loop, function, kind)
    assert name == expected
    assert text.startswith("On WorkerInfo(id=1, name=worker1):\n")
    assert "in fails\n" in text
    assert "Traceback (most recent call last)" in text


@pytest.mark.parametrize("ask", [services.failure, services.failure_of_a_reference])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("local", "builtins.RuntimeError"),
        ("none", "builtins.RuntimeError"),
        ("main", "builtins.RuntimeError"),
        ("module", "builtins.RuntimeError"),
        ("group", "builtins.RuntimeError"),
        ("terse", "tests.services.Terse"),
        ("noted", "builtins.KeyError"),
    ],
)
def test_async_function_error_of_any_type_reaches_the_caller(pair, ask, kind, expected):
    name, text = pair.call(0, ask, "asyncio", services.fails_later, kind)
    assert name == expected
    assert text.startswith("On WorkerInfo(id=1, name=worker1):\n")
    assert "in fails\n" in text
    if kind == "group":
        assert "of_no_other_process.<locals>.Local: wrong" in text
        assert "KeyError: 'k'" in text
    if kind == "noted":
        assert "\na note\n" in text


@every_loop
def test_await_of_a_remote_value_does_not_block_the_loop(pair, loop):
    assert pair.call(0, services.value_of_a_reference, loop) == (False, 7)


@every_loop
@pytest.mark.parametrize("function", [services.fails, services.fails_later])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("value", "builtins.ValueError"),
        ("key", "builtins.KeyError"),
        ("type", "builtins.TypeError"),
        ("odd", "tests.services.Odd"),
    ],
)
def test_remote_value_raises_the_same_error_as_a_call(pair, loop, function, kind, expected):
    name, text = pair.call(0, services.failure_of_a_reference, loop, function, kind)
    assert name == expected
    assert text.startswith("On WorkerInfo(id=1, name=worker1):\n")
    assert "Traceback (most recent call last)" in text


def test_many_remote_errors_each_keep_their_traceback(pair):
    # The callee's future may be freed before PyTorch asks for its value.
    for text in pair.call(0, services.failures, services.fails_at_once, 500):
        assert "in fails\n" in text


def test_error_raised_at_the_caller_is_not_logged_at_the_callee(pair):
    pair.call(1, services.collect_unretrieved_errors)
    assert len(pair.call(0, services.failures, services.fails_at_once, 50)) == 50
    pair.call(1, services.drop_the_error_of_a_direct_call)
    [error] = pair.call(1, services.unretrieved_errors)
    assert error.startswith("Odd(")


def test_the_error_of_an_async_function_keeps_its_text(pair):
    _, text = pair.call(0, services.failure, "asyncio", services.fails_later, "value")
    assert text.endswith("ValueError: wrong: 'ü' \n x\n")


@every_loop
def test_rpc_call_that_times_out_raises_timeout_error(pair, loop):
    failure = functools.partial(services.failure, timeout=0.2)
    name, text = pair.call(0, failure, loop, services.blocks)
    pair.call(1, services.release)
    assert name == "builtins.TimeoutError"
    assert "200 ms" in text


@needs_rpc
def test_callee_death_fails_the_call_within_the_timeout():
    with Cluster(3) as cluster:
        cluster.call(0, services.call_and_keep, services.never)
        cluster.call(1, services.wait_until_started)
        cluster.start(0, services.kept)
        cluster.kill(1)
        name, text = cluster.result(0)
        assert name == "ConnectionError", text  # and not TimeoutError
        # A graceful shutdown would wait for the dead process.
        cluster.start(0, services.shut_down, False, True)
        cluster.start(2, services.shut_down, False, True)
        assert [cluster.result(0), cluster.result(2)] == [[], []]


# -------------------------------------------------------------------- RPC: callees


def test_async_functions_run_on_one_loop_in_the_background(pair):
    first, again = (pair.call(0, services.call, services.where, n) for n in (1, 2))
    assert (first[0], again[0]) == (1, 2)
    assert first[1:] == again[1:]
    _, library, loop, thread = first
    assert (library, thread) == ("asyncio", "torchfut_aio background loop")
    assert loop.partition(".")[0] == ("uvloop" if pair.loop == "uvloop" else "asyncio")


@every_loop
def test_thousands_of_calls_run_concurrently_on_one_thread(pair, loop):
    assert pair.call(0, services.many_calls, loop, 5000) == 1


def test_tensors_and_keywords_are_sent_there_and_back(pair):
    scaled = pair.call(0, functools.partial(services.call, by=3), services.scaled, torch.ones(2))
    assert torch.equal(scaled, torch.tensor([3.0, 3.0]))


def test_methods_static_methods_and_references_work(pair):
    assert pair.call(0, services.through_a_reference) == [40, 41, 42, 8, "Service", 10, "Service"]


def test_async_function_raising_system_exit_fails_only_its_call(pair):
    name, text = pair.call(0, services.failure, "asyncio", services.exits)
    assert name == "builtins.RuntimeError"
    assert "SystemExit" in text
    assert "not really" in text
    assert pair.call(0, services.call, services.where, 3)[0] == 3


@every_loop
def test_async_functions_run_on_the_portal_of_serve_on(pair, loop):
    pair.call(1, services.serve_on_portal, loop)
    answer, library, kind, thread = pair.call(0, services.call, services.where, 1)
    pair.call(1, services.stop_portal)
    assert answer == 1
    assert library == ("trio" if loop == "trio" else "asyncio")
    assert (kind.partition(".")[0] == "uvloop") == (loop == "uvloop")
    assert thread != "torchfut_aio background loop"
    assert pair.call(0, services.call, services.where, 2)[3] == "torchfut_aio background loop"


@needs_rpc
@pytest.mark.parametrize("ours", [True, False])
def test_graceful_shutdown_completes_calls_in_flight(ours):
    with Cluster(2) as cluster:
        cluster.call(0, services.call_and_keep, services.sleeps, 0.3)
        cluster.call(1, services.wait_until_started)
        left = cluster.everywhere(services.shut_down, True, ours)
        assert cluster.call(0, services.kept) == ("float", "0.3")
        assert left[0] == []
        assert left[1] == ([] if ours else ["torchfut_aio background loop"])


@needs_rpc
@pytest.mark.parametrize("ours", [True, False])
def test_ungraceful_shutdown_fails_calls_in_flight(ours):
    with Cluster(2) as cluster:
        cluster.call(0, services.call_and_keep, services.never)
        cluster.call(1, services.wait_until_started)
        cluster.call(1, services.shut_down, False, ours)
        name, text = cluster.call(0, services.kept)
        # The callee sends the reason, or its connection ends before that; in time in either case.
        assert name in ("CancelledError", "ConnectionError")
        assert "was shut down" in text or "eof" in text or "closed" in text
        cluster.call(0, services.shut_down, False, ours)


EXITS = """
import asyncio, threading, torch.distributed.rpc as rpc
from torchfut_aio import as_future
from torchfut_aio.distributed import async_rpc

started = threading.Semaphore(0)

@async_rpc
async def never():
    started.release()
    try:
        await asyncio.Event().wait()
    finally:
        print("cleaned up")

options = rpc.TensorPipeRpcBackendOptions(init_method="file://FOLDER/rpc")
rpc.init_rpc("worker", rank=0, world_size=1, rpc_backend_options=options)
futures = [as_future(rpc.rpc_async("worker", never)), never()]
for _ in futures:
    assert started.acquire(timeout=60)
print("exits")
"""


@needs_rpc
def test_process_can_exit_with_calls_in_flight(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(EXITS.replace("FOLDER", str(tmp_path)))
    done = forks.run(path, filters="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["exits", "cleaned up", "cleaned up"]


# ----------------------------------------------------- RPC: what needs no other process


@contextmanager
def background_loop_ends():
    yield
    shutdown()
    assert "torchfut_aio background loop" not in [t.name for t in threading.enumerate()]


@async_rpc
async def double(x):
    await anyio.sleep(0.001)
    return 2 * x


@async_rpc
async def hangs():
    await anyio.sleep_forever()


@async_rpc
async def here():
    return sniffio.current_async_library()


@async_rpc
async def thread_of_call():
    return threading.get_ident()


mine = contextvars.ContextVar("mine", default="none")


@async_rpc
async def context_of_call():
    return mine.get()


async def exit_now():
    sys.exit("for good")


@async_rpc
async def exits_beside():
    task = asyncio.ensure_future(exit_now())
    await asyncio.sleep(PATIENCE)
    await task


stubborn = []


@async_rpc
async def ignores_cancellation(release):
    stubborn.append(release)
    while not release.is_set():
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.001)
    return "done"


def background_threads():
    return [t for t in threading.enumerate() if t.name == "torchfut_aio background loop"]


def background_thread():
    [thread] = background_threads()
    return thread


def test_async_rpc_function_called_directly_returns_a_future():
    with background_loop_ends():
        assert double(21).wait(PATIENCE) == 42


def test_background_loop_restarts_after_a_shutdown():
    with background_loop_ends():
        assert double(1).wait(PATIENCE) == 2
        shutdown()
        assert double(2).wait(PATIENCE) == 4


def test_ungraceful_shutdown_cancels_calls_with_a_reason():
    with background_loop_ends():
        for _ in range(100):  # sometimes before the loop has started
            fut = hangs()
            shutdown(graceful=False)
            assert fut.done()
            assert "was shut down" in str(fut.exception())


def test_calls_from_many_threads_complete_during_shutdown():
    with background_loop_ends():
        futures = []

        def call():
            for n in range(200):
                futures.append(double(n))

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            shutdown(graceful=False)
        for thread in threads:
            thread.join()
        shutdown(graceful=False)
        assert len(futures) == 800
        assert all(fut.done() for fut in futures)


@needs_rpc
@every_loop
def test_stopped_portal_fails_later_calls_and_is_refused(loop):
    with anyio.from_thread.start_blocking_portal(**LOOPS[loop]) as portal:
        serving = serve_on(portal)
        assert double(1).wait(PATIENCE) == 2
    assert isinstance(double(1).exception(), concurrent.futures.CancelledError)
    with serving:
        pass
    with pytest.raises(RuntimeError, match="not running"):
        serve_on(portal)


@needs_rpc
@every_loop
def test_running_calls_are_cancelled_when_serve_on_exits(loop):
    with anyio.from_thread.start_blocking_portal(**LOOPS[loop]) as portal:
        with serve_on(portal):
            fut = hangs()
            assert here().wait(PATIENCE) == ("trio" if loop == "trio" else "asyncio")
            assert not fut.done()
        with pytest.raises(concurrent.futures.CancelledError, match="hangs was cancelled"):
            fut.wait(PATIENCE)


@needs_rpc
@every_loop
def test_ungraceful_shutdown_cancels_calls_on_a_portal(loop):
    with anyio.from_thread.start_blocking_portal(**LOOPS[loop]) as portal, serve_on(portal):
        fut = hangs()
        shutdown(graceful=False)
        with pytest.raises(concurrent.futures.CancelledError, match="hangs was cancelled"):
            fut.wait(PATIENCE)


class LosesACall(asyncio.SelectorEventLoop):
    """Drops a call, as when KeyboardInterrupt is raised just before it runs."""

    loses = False

    def call_soon_threadsafe(self, *args, **kwargs):
        handle = super().call_soon_threadsafe(*args, **kwargs)
        if self.loses:
            self.loses = False
            handle.cancel()
        return handle


@needs_rpc
def test_serve_on_cancels_calls_if_the_loop_loses_a_callback():
    with anyio.from_thread.start_blocking_portal(
        backend_options={"loop_factory": LosesACall}
    ) as portal:
        loop = portal.call(asyncio.get_running_loop)
        with serve_on(portal):
            fut = hangs()
            assert here().wait(PATIENCE) == "asyncio"
            loop.loses = True
        assert not loop.loses
        with pytest.raises(concurrent.futures.CancelledError, match="hangs was cancelled"):
            fut.wait(PATIENCE)


@needs_rpc
def test_call_made_while_a_trio_run_ends_fails_alone():
    futures = []

    async def calls_when_it_is_cancelled():
        try:
            await trio.sleep_forever()
        finally:
            futures.append(double(1))

    async def main():
        async with anyio.from_thread.BlockingPortal() as portal:
            trio.lowlevel.spawn_system_task(calls_when_it_is_cancelled)
            return serve_on(portal)

    with trio.run(main):
        pass
    with pytest.raises(concurrent.futures.CancelledError, match="its event loop ended"):
        futures[0].wait(PATIENCE)


@on_every_loop
@needs_rpc
async def test_application_can_serve_and_call_on_its_own_loop():
    async with anyio.from_thread.BlockingPortal() as portal:
        with serve_on(portal):
            assert await here() == sniffio.current_async_library()
            assert await thread_of_call() == threading.get_ident()


@needs_rpc
def test_second_portal_serves_after_the_first_is_left_early():
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(anyio.from_thread.start_blocking_portal()) for _ in range(2)
        )
        serving = serve_on(first)
        with serve_on(second):
            serving.__exit__(None, None, None)
            assert thread_of_call().wait(PATIENCE) == second.call(threading.get_ident)


@needs_rpc
def test_call_does_not_run_in_the_context_of_its_caller():
    mine.set("of the caller")
    with background_loop_ends():
        assert context_of_call().wait(PATIENCE) == "none"
        with anyio.from_thread.start_blocking_portal() as portal, serve_on(portal):
            assert context_of_call().wait(PATIENCE) == "none"


def test_finaliser_can_call_during_another_call():
    with background_loop_ends():
        futures = []

        class Notifies:
            def __init__(self):
                self.me = self

            def __del__(self):
                futures.append(double(len(futures)))

        threshold = gc.get_threshold()
        gc.set_threshold(50)
        try:
            give_up = time.monotonic() + PATIENCE
            calls = 0
            # This thread runs no finalisers while another one runs the collector.
            while calls < 2000 or len(futures) == calls:
                assert time.monotonic() < give_up, "no finaliser has called"
                Notifies()
                futures.append(double(calls))
                calls += 1
        finally:
            gc.set_threshold(*threshold)
        gc.collect()  # or the rest would call during a later test
        for fut in futures:
            assert fut.wait(PATIENCE) is not None


def test_signal_handler_can_call_and_shut_down():
    with background_loop_ends():
        futures, handled = [], 0

        def handler(number, frame):
            nonlocal handled
            futures.append(double(1))
            shutdown(graceful=False)
            handled += 1
            # No interval timer: if the handler is slower than the interval, nothing else would run.
            signal.setitimer(signal.ITIMER_REAL, 0.01)

        before = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        try:
            give_up = time.monotonic() + PATIENCE
            while len(futures) < 500 or handled < 5:
                assert time.monotonic() < give_up, "no signal has come"
                futures.append(double(len(futures)))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        shutdown(graceful=False)
        assert all(fut.done() for fut in futures)


def call_during_thread_start(monkeypatch, function):
    """Call ``function`` within the call that starts the background loop."""
    start = threading.Thread.start

    def starts(thread):
        if thread.name == "torchfut_aio background loop":
            monkeypatch.setattr(threading.Thread, "start", start)
            function()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starts)


def test_shutdown_waits_for_a_thread_about_to_start(monkeypatch):
    shutting_down, futures, ended = threading.Event(), [], []

    def shuts_down():
        shutting_down.set()
        shutdown(graceful=False)
        ended.append(not background_threads())

    def wait():
        beside.start()
        assert shutting_down.wait(PATIENCE)
        beside.join(0.05)  # it must keep waiting

    beside = threading.Thread(target=shuts_down)
    with background_loop_ends():
        call_during_thread_start(monkeypatch, wait)
        futures.append(double(1))
        beside.join(PATIENCE)
        assert ended == [True]
        assert futures[0].done()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_calls_succeed_after_system_exit_ended_the_loop():
    with background_loop_ends():
        fut = exits_beside()
        until(lambda: not _background_loop.is_running())
        assert fut.done()
        assert double(2).wait(PATIENCE) == 4
        until(lambda: len(background_threads()) == 1)  # the other thread is ending


def test_call_raises_if_the_loop_thread_cannot_start():
    with background_loop_ends():
        with no_thread_starts():
            with pytest.raises(RuntimeError, match="can't start new thread"):
                double(1)
        assert double(2).wait(PATIENCE) == 4


@pytest.mark.parametrize("has_loop", [False, True])
def test_interrupted_call_loses_itself_and_no_other(has_loop):
    with background_loop_ends():
        for interrupt in explorer.interrupts(_background_loop, _threads):
            if has_loop:
                assert double(0).wait(PATIENCE) == 0
            else:
                shutdown()
            with interrupt:
                fut = double(1)
            assert interrupt.raised == (interrupt.where is not None), interrupt
            assert interrupt.raised or fut.wait(PATIENCE) == 2, interrupt
            assert double(2).wait(PATIENCE) == 4, interrupt


@pytest.mark.parametrize("has_loop", [False, True])
def test_interrupted_call_loses_no_call_of_other_threads(has_loop):
    def call_beside_and_interrupt():
        with running(lambda: others.append(double(3))):
            pass
        raise KeyboardInterrupt

    with background_loop_ends():
        for interrupt in explorer.interrupts(
            _background_loop, _threads, do=call_beside_and_interrupt
        ):
            others = []
            if has_loop:
                assert double(0).wait(PATIENCE) == 0
            else:
                shutdown()
            with suppress(KeyboardInterrupt), interrupt:
                double(1)
            assert all(other.wait(PATIENCE) == 6 for other in others), interrupt


def test_shutdown_at_any_step_of_a_call_loses_no_call():
    def call_and_shut_down():
        with running(lambda: others.append(double(3)), lambda: others.append(hangs())):
            pass
        shutdown(graceful=False)

    with background_loop_ends():
        for interrupt in explorer.interrupts(_background_loop, _threads, do=call_and_shut_down):
            others = []
            with interrupt:
                others.append(double(1))
            until(lambda: all(other.done() for other in others))
            assert len(others) == (1 if interrupt.where is None else 3), interrupt
            shutdown(graceful=False)


@async_rpc
async def calls_when_it_is_cancelled(started):
    try:
        started.set()
        await anyio.sleep_forever()
    finally:
        await double(1)


def test_call_from_a_task_that_a_shutdown_cancels_is_cancelled(caplog):
    with background_loop_ends():
        started = threading.Event()
        fut = calls_when_it_is_cancelled(started)
        assert started.wait(PATIENCE)
        shutdown(graceful=False)
        assert isinstance(fut.exception(), concurrent.futures.CancelledError)
        assert not caplog.text  # no warning that a task has not ended


def test_forked_child_has_a_separate_background_loop():
    program = """
import asyncio, os
from torchfut_aio import distributed

@distributed.async_rpc
async def double(x):
    return 2 * x

@distributed.async_rpc
async def hangs():
    await asyncio.sleep(3600)

hanging = hangs()
assert double(1).wait(60) == 2
if child := os.fork():
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)
print(double(2).wait(60))
distributed.shutdown()
print(distributed._background_loop.is_running())
"""
    # From Python 3.12 on, a fork beside other threads emits a warning.
    assert forks.output(program, filters="ignore") == "4\nFalse\n0\n"


def test_a_function_that_ignores_its_cancellation_is_reported(monkeypatch, caplog):
    monkeypatch.setattr(_background_loop, "_TIMEOUT", 0.05)
    release = threading.Event()
    fut = ignores_cancellation(release)
    until(lambda: stubborn)
    shutdown()
    assert "still runs cancelled tasks" in caplog.text
    assert "ignores_cancellation" in caplog.text
    thread = background_thread()
    release.set()
    assert fut.wait(PATIENCE) == "done"
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("decorate", "thing", "message"),
    [
        (async_rpc, print, "async def"),
        (async_rpc, None, "async def"),
        (async_rpc, double, "pass the async function itself"),
        (async_rpc, staticmethod(double), "pass the async function itself"),
        (async_comm_hook, print, "async def"),
        (async_comm_hook(overlap=True), classmethod(double), "pass the async function itself"),
    ],
)
def test_async_rpc_refuses_non_async_functions(decorate, thing, message):
    with pytest.raises(TypeError, match=message):
        decorate(thing)


def test_serve_on_refuses_objects_other_than_portals():
    with pytest.raises(TypeError, match="BlockingPortal"):
        serve_on("portal")


@on_every_loop
async def test_a_shutdown_on_a_loop_warns_that_it_blocks():
    with pytest.warns(BlockingWaitWarning, match="anyio.to_thread"):
        shutdown()


# --------------------------------------------------------------------------- DDP


def same(trained):
    """Return whether losses and weights are those of plain DDP, bit for bit."""
    (losses, weights), (plain_losses, plain_weights) = trained
    pairs = zip(weights, plain_weights)
    return losses == plain_losses and all(torch.equal(ours, plain) for ours, plain in pairs)


def test_async_hook_trains_bit_for_bit_like_plain_ddp(four):
    trained = four.everywhere(services.trained, services.mean, None, 10)
    assert all(same(one) for one in trained)


def test_compressing_hook_equals_fp16_compress_hook(four, gloo_of_half):
    trained = four.everywhere(services.trained, services.halved, None, 5, fp16_compress_hook)
    assert all(same(one) for one in trained)


def test_hook_collectives_start_in_the_same_order_on_every_rank(four):
    trained = four.everywhere(services.trained_with_pauses, 3)
    assert all(same(one) for one in trained)


@pytest.mark.parametrize("hook", [services.mean, services.overlapping_mean])
def test_hooks_train_a_model_with_unused_parameters(four, hook):
    trained = four.everywhere(services.trained_with_unused_parameters, hook, 5)
    assert all(same(one) for one in trained)


@pytest.mark.parametrize("hook", [services.mean, services.overlapping_mean, services.in_two_groups])
def test_hooks_do_not_mix_with_collectives_of_the_model(four, hook):
    trained = four.everywhere(services.trained_with_collectives, hook, 20)
    assert all(same(one) for one in trained)


def test_hook_can_send_to_and_receive_from_other_ranks(four):
    hooks = services.of_neighbours, None, 5, services.neighbours_hook
    trained = four.everywhere(services.trained, *hooks)
    assert all(same(one) for one in trained)


def test_hooks_overlap_on_request(four):
    for trained, most in four.everywhere(services.most_at_once, 2):
        assert same(trained)
        assert most > 1


@pytest.mark.parametrize(("bucket", "times"), [(0, 4), (1, 3)])  # at first there is one bucket
@pytest.mark.parametrize("how", ["raises", "raises at once"])
def test_backward_raises_the_error_of_a_hook(four, how, bucket, times):
    for raised in four.everywhere(services.broken, how, bucket):
        assert raised == [("Odd", "(3, 4)")] * times


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("list", "TypeError", "tests.services.breaks returned a list"),
        ("half", "ValueError", "bucket.buffer() has"),
    ],
)
def test_hook_must_return_a_tensor_of_the_bucket_size(four, how, kind, message):
    for raised in four.everywhere(services.broken, how, 0):
        assert len(raised) == 4
        for name, text in raised:
            assert name == kind
            assert message in text


def test_backward_raises_the_error_of_a_future_from_a_hook(group_of_one):
    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 2))
    kept = []

    def hook(state, bucket):
        kept.append(Future())
        kept[-1].set_exception(services.Odd(5, 6))
        return kept[-1]

    ddp.register_comm_hook(None, hook)
    with pytest.raises(services.Odd) as caught:
        ddp(torch.ones(3, 4)).sum().backward()
    assert caught.value is kept[0].exception()


# ---------------------------------------------------------------------- accelerators


@async_rpc
async def enqueues_a_read(tensor):
    return read_on_current_stream(tensor)


@pytest.mark.device
def test_async_function_can_use_tensors_not_yet_filled(accelerator, producer):
    with background_loop_ends():
        with producer:
            fut = enqueues_a_read(being_filled(accelerator))
        until(fut.done)
        assert not producer.query()
        accelerator.wake()
        torch.accelerator.synchronize(FIRST)
        assert fut.value().tolist() == NEW


@pytest.mark.device
def test_work_without_a_future_is_done_with_its_kernels(accelerator):
    enqueued = threading.Event()

    class Enqueues(NoFuture):
        def wait(self, timeout=None):
            accelerator.sleep(PATIENCE)  # like NCCL, which orders the current stream
            enqueued.set()
            return super().wait(timeout)

    work = Enqueues()
    work.finished.set()
    fut = as_future(work)
    assert enqueued.wait(PATIENCE)
    with pytest.raises(TimeoutError):
        fut.wait(0.1)
    accelerator.wake()
    assert fut.wait(PATIENCE) is None


# ------------------------------------------------------------------- works of other backends


class NoFuture(dist.Work):
    """A work without a future: the only way to await it is to block."""

    def __init__(self):
        super().__init__()
        self.finished = threading.Event()
        self.error = None

    def wait(self, timeout=None):
        self.finished.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return True


def test_thread_waiting_for_a_work_without_a_future_ends():
    work = NoFuture()
    fut = as_future(work)
    assert not fut.done()
    work.finished.set()
    assert fut.wait(PATIENCE) is None
    for thread in threading.enumerate():
        if thread.name == "torchfut_aio wait":
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_error_of_a_work_without_a_future_reaches_its_future():
    work = NoFuture()
    work.error = ValueError("foo")
    fut = as_future(work)
    work.finished.set()
    with pytest.raises(ValueError, match="foo"):
        fut.wait(PATIENCE)

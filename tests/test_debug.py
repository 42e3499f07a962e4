"""The list of waiters, recordings and their traces, and that they leave nothing behind."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import gc
import json
import pathlib
import re
import threading
import time
import weakref
from contextlib import suppress
from types import SimpleNamespace

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from torchfut_aio import (
    Batcher,
    Future,
    StreamClosedError,
    ValueStream,
    _core,
    as_completed,
    debug,
    distributed,
    gather,
    set_results,
    start_soon,
    task_local_state,
    with_timeout,
)
from torchfut_aio.debug import PendingFuture, PendingStream, Recording, Waiter, pending_futures
from torchfut_aio.serving._stream import state_of
from torchfut_aio.serving._stream_state import StreamState

from . import forks
from .explorer import interrupts
from .loops import on_asyncio, on_every_loop
from .threads import PATIENCE, has_gil, needs_gil, until
from .waiting import eventually

ROOT = pathlib.Path(__file__).parents[1]


def waiting_for(future):
    """Return the kinds and names of the future's waiters."""
    return [(each.kind, each.name) for each in listed(future).waiters]


def listed_futures():
    return [pending for pending in pending_futures() if isinstance(pending, PendingFuture)]


def listed(future):
    (found,) = [pending for pending in listed_futures() if pending.future is future]
    return found


def listed_stream(stream):
    """Return the entry of the stream; None if nothing waits for it."""
    streams = [each for each in pending_futures() if isinstance(each, PendingStream)]
    return next((each for each in streams if each.stream is stream), None)


def places_of(waiters):
    """Return where the tasks wait, without line numbers."""
    return [each.where and each.where.rpartition(":")[0] for each in waiters]


def seen_at(*places):
    """Return what `places_of` returns here: without a GIL, other threads cannot inspect a task."""
    return [*places] if has_gil else [None] * len(places)


shows_places = needs_gil("other threads cannot inspect where a task waits")


def log(future):
    pass


async def spawn(group, function, name):
    """Start a task of that name; return when it waits."""
    group.start_soon(function, name=name)
    await anyio.wait_all_tasks_blocked()


# ------------------------------------------------------------------------------ the list


@on_every_loop
async def test_pending_futures_names_waiting_tasks():
    future = Future()

    async def wait():
        await future

    async with anyio.create_task_group() as group:
        await spawn(group, wait, "request 1")
        await spawn(group, wait, "request 2")
        assert waiting_for(future) == [("task", "request 1"), ("task", "request 2")]
        future.set_result(5)


def test_pending_futures_names_blocked_threads():
    future = Future()
    threads = [threading.Thread(target=future.wait, name=f"worker {n}") for n in range(2)]
    for thread in threads:
        thread.start()
    expected = [("thread", "worker 0"), ("thread", "worker 1")]
    until(lambda: sorted(waiting_for(future), key=str) == expected)
    future.set_result(5)
    for thread in threads:
        thread.join(PATIENCE)


def test_pending_futures_names_callbacks_and_children():
    future = Future()
    future.add_done_callback(log)
    child = future.then(log)
    gathered = gather([future])
    of_log = ("callback", f"{__name__}.log")
    assert waiting_for(future)[:2] == [of_log, of_log]
    ((kind, name),) = waiting_for(future)[2:]
    assert kind == "callback"
    assert name.startswith("torchfut_aio.")
    assert waiting_for(child) == waiting_for(gathered) == []


@on_every_loop
async def test_pending_futures_names_the_task_in_as_completed():
    futures = [Future(), Future()]

    async def wait():
        async for _ in as_completed(futures):
            pass

    async with anyio.create_task_group() as group:
        await spawn(group, wait, "request 1")
        for future in futures:
            ((kind, name),) = waiting_for(future)
            assert kind == "callback"
            waits = f"as_completed() for task request 1{' in wait, test_debug.py:' * has_gil}"
            assert name.startswith(waits)
        set_results(futures, [1, 2])


def test_pending_futures_names_the_thread_in_as_completed():
    future = Future()
    thread = threading.Thread(target=lambda: [*as_completed([future])], name="worker")
    thread.start()
    until(lambda: waiting_for(future) == [("callback", "as_completed() for thread worker")])
    future.set_result(5)
    thread.join(PATIENCE)
    idle = as_completed([unfinished := Future()])
    assert waiting_for(unfinished) == [("callback", "as_completed()")]
    del idle


def test_done_future_is_not_listed():
    future = Future()
    future.set_result(5)
    assert not any(pending.future is future for pending in listed_futures())


def test_pending_future_prints_one_line_per_waiter():
    future = Future()
    future.add_done_callback(log)
    assert str(listed(future)) == (
        f"<Future pending waiters=0 callbacks=1>\n  callback {__name__}.log"
    )


def test_waiters_have_no_start_time_without_a_recording():
    future = Future()
    future.add_done_callback(log)
    assert [each.since for each in listed(future).waiters] == [None]


def test_pending_futures_keeps_no_future_alive(no_collector):
    future = Future()
    future.add_done_callback(log)
    ref = weakref.ref(future)
    listed(future)
    del future
    assert ref() is None


def test_uninitialised_objects_are_not_listed():
    uninitialised = Future.__new__(Future)
    assert not any(pending.future is uninitialised for pending in listed_futures())
    uninitialised = ValueStream.__new__(ValueStream), StreamState.__new__(StreamState)
    assert listed_stream(uninitialised[0]) is None


# ------------------------------------------------------------------------ where tasks wait


async def numbers(future):
    yield 1
    await future


class Request:
    """An awaitable that awaits a future."""

    def __init__(self, future):
        self.future = future

    def __await__(self):
        return self.run().__await__()

    async def run(self):
        await self.future


@contextlib.asynccontextmanager
async def session(future):
    await future
    yield


async def in_a_coroutine(future):
    await future


async def in_one_within_another(future):
    await in_a_coroutine(future)


async def in_an_async_generator(future):
    async for _ in numbers(future):
        pass


async def in_anext_with_a_default(future):
    values = numbers(future)
    await anext(values)
    await anext(values, None)


async def in_the_end_of_an_async_generator(future):
    async def closing():
        try:
            yield 1
        finally:
            await future

    values = closing()
    await anext(values)
    await values.aclose()


async def in_an_awaitable(future):
    await Request(future)


async def in_a_context_manager(future):
    async with session(future):
        pass


async def in_a_library(future):
    with anyio.fail_after(PATIENCE):
        await future.stream_ordered()


@task_local_state
async def in_a_state_of_its_own(future):
    await future


@on_every_loop
@shows_places
@pytest.mark.parametrize(
    ("function", "place"),
    [
        (in_a_coroutine, "in_a_coroutine"),
        (in_one_within_another, "in_a_coroutine"),
        (in_an_async_generator, "numbers"),
        (in_anext_with_a_default, "numbers"),
        (in_the_end_of_an_async_generator, "closing"),
        (in_an_awaitable, "Request.run"),
        (in_a_context_manager, "session"),
        (in_a_library, "in_a_library"),
        (in_a_state_of_its_own, "in_a_state_of_its_own"),
    ],
)
async def test_task_is_listed_with_its_waiting_function(function, place):
    future = Future()
    async with anyio.create_task_group() as group:
        group.start_soon(function, future)
        await anyio.wait_all_tasks_blocked()
        assert places_of(listed(future).waiters) == [f"{place}, test_debug.py"]
        future.set_result(5)


@shows_places
def test_a_ddp_hook_is_listed_with_its_place():
    @distributed.async_comm_hook
    async def hook(future, bucket):
        await in_a_coroutine(future)
        return bucket.buffer()

    future, buffer = Future(), torch.ones(1)
    hooked = hook(future, SimpleNamespace(index=lambda: 0, buffer=lambda: buffer))
    assert places_of(listed(future).waiters) == ["in_a_coroutine, test_debug.py"]
    future.set_result(5)
    assert hooked.wait(PATIENCE) is buffer
    distributed.shutdown()


@on_every_loop
@shows_places
async def test_task_is_listed_with_its_waiting_line():
    future, another = Future(), Future()
    first = in_two_steps.__code__.co_firstlineno

    async with anyio.create_task_group() as group:
        group.start_soon(in_two_steps, future, another)
        await anyio.wait_all_tasks_blocked()
        (waiter,) = listed(future).waiters
        assert waiter.where == f"in_two_steps, test_debug.py:{first + 1}"
        assert str(listed(future)).endswith(f" in {waiter.where}")
        future.set_result(5)
        await anyio.wait_all_tasks_blocked()
        (waiter,) = listed(another).waiters
        assert waiter.where == f"in_two_steps, test_debug.py:{first + 2}"
        another.set_result(5)


async def in_two_steps(future, another):
    await future
    await another


@on_asyncio
@shows_places
async def test_unnamed_task_is_listed_with_its_place():
    future = Future()
    task = asyncio.create_task(in_a_coroutine(future))
    await asyncio.sleep(0)
    line = str(listed(future)).splitlines()[1]
    place = r"in in_a_coroutine, test_debug\.py:\d+"
    assert re.fullmatch(rf"  task {task.get_name()} {place}", line)
    future.set_result(5)
    await task


@on_asyncio
async def test_task_with_only_library_frames_has_no_place():
    future = Future()
    task = asyncio.ensure_future(future)  # asyncio wraps it in a new coroutine
    await asyncio.sleep(0)
    assert waiting_for(future) == [("task", task.get_name())]
    assert places_of(listed(future).waiters) == [None]
    future.set_result(5)
    await task


@on_every_loop
async def test_threads_and_callbacks_have_no_place():
    future = Future()
    future.add_done_callback(log)
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, future.wait)
        await eventually(lambda: len(listed(future).waiters) == 2)
        assert places_of(listed(future).waiters) == [None, None]
        future.set_result(5)


def test_thread_not_started_by_python_has_no_name():
    future, ended = Future(), threading.Event()

    def wait():
        future.wait()
        ended.set()

    _thread.start_new_thread(wait, ())
    until(lambda: waiting_for(future) == [("thread", None)])
    assert str(listed(future)).endswith("\n  thread of unknown name")
    future.set_result(5)
    assert ended.wait(PATIENCE)


# ------------------------------------------------------------------- the items of batchers


class Gate:
    """A function for batchers, sync or async, that returns once the gate is open."""

    def __init__(self):
        self.open = threading.Event()

    def run(self, items):
        assert self.open.wait(PATIENCE)
        return items

    async def run_async(self, items):
        await eventually(self.open.is_set)
        return items


def gated(function):
    return Batcher(function, max_batch_size=1, max_queue_size=9, name="embed")


@on_every_loop
@pytest.mark.parametrize("kind", ["run", "run_async"])
async def test_an_item_is_listed_with_the_name_of_its_batcher(kind):
    gate = Gate()
    async with gated(getattr(gate, kind)) as batcher:
        running, queued = batcher.submit(1), batcher.submit(2)
        await eventually(lambda: batcher.statistics().running == 1)
        assert listed(running).where == "running in batcher embed"
        assert listed(queued).where == "queued in batcher embed"
        assert str(listed(queued)).endswith("\n  queued in batcher embed")
        gate.open.set()
        assert await gather([running, queued]) == [1, 2]


def test_future_outside_a_batcher_has_no_place():
    assert listed(future := Future()).where is None
    assert str(listed(future)) == "<Future pending waiters=0 callbacks=0>"


# ---------------------------------------------------------------------------- streams


@on_every_loop
@pytest.mark.parametrize("how", ["async for", "aget"])
async def test_stream_is_listed_with_its_waiting_tasks(how):
    empty, full = ValueStream(), ValueStream(max_size=1)
    values = aiter(full)
    full.put(1)

    async def read():
        if how == "aget":
            with contextlib.suppress(StreamClosedError):
                await empty.aget()
        async for _ in empty:
            pass

    async def write():
        await full.aput(2)

    async with anyio.create_task_group() as group:
        assert listed_stream(empty) is None
        await spawn(group, read, "reader")
        await spawn(group, write, "writer")
        ((reader,), ()) = listed_stream(empty).readers, listed_stream(empty).writers
        ((), (writer,)) = listed_stream(full).readers, listed_stream(full).writers
        assert (reader.kind, reader.name) == ("task", "reader")
        assert (writer.kind, writer.name) == ("task", "writer")
        assert places_of([reader, writer]) == seen_at("read, test_debug.py", "write, test_debug.py")
        shown = f"{listed_stream(empty)}\n{listed_stream(full)}"
        assert shown.splitlines() == [
            "<ValueStream open size=0>",
            f"  {reader}, reads",
            "<ValueStream open size=1/1>",
            f"  {writer}, writes",
        ]
        empty.close()
        assert await anext(values) == 1
    assert listed_stream(empty) is listed_stream(full) is None


def test_stream_is_listed_with_its_waiting_threads():
    for read, event in ((list, ValueStream.close), (ValueStream.get, lambda stream: stream.put(1))):
        stream = ValueStream(max_size=1)
        reader = threading.Thread(target=read, args=(stream,), name="reader")
        reader.start()
        until(lambda: listed_stream(stream) is not None)
        assert listed_stream(stream).waiters == (Waiter(kind="thread", name="reader"),)
        assert str(listed_stream(stream)).endswith("\n  thread reader, reads")
        event(stream)
        reader.join(PATIENCE)
    full = ValueStream(max_size=1)
    values = iter(full)
    full.put(1)
    writer = threading.Thread(target=full.put, args=(2,), name="writer")
    writer.start()
    until(lambda: listed_stream(full) is not None)
    assert listed_stream(full).writers == (Waiter(kind="thread", name="writer"),)
    assert str(listed_stream(full)).endswith("\n  thread writer, writes")
    assert next(values) == 1
    writer.join(PATIENCE)


def test_readers_of_a_dropped_stream_are_listed(no_collector):
    def only_reader():
        streams = [each for each in pending_futures() if isinstance(each, PendingStream)]
        return [
            each for each in streams if each.readers == (Waiter(kind="thread", name="only_reader"),)
        ]

    stream = ValueStream()
    state = state_of(stream)
    reader = threading.Thread(target=list, args=(iter(stream),), name="only_reader")
    reader.start()
    del stream
    until(only_reader)
    (found,) = only_reader()
    assert found.stream is None
    assert str(found) == "<ValueStream dropped by its producer>\n  thread only_reader, reads"
    state.close(None)
    reader.join(PATIENCE)


# ------------------------------------------------------- futures that are internal to the package


@on_every_loop
async def test_internal_futures_are_not_listed():
    gate, rpc_may_end = Gate(), threading.Event()

    @distributed.async_rpc
    async def handler():
        await anyio.to_thread.run_sync(rpc_may_end.wait, PATIENCE)

    before = {pending.future for pending in listed_futures()}
    async with gated(gate.run) as batcher, gated(gate.run_async) as async_batcher:
        ours = [batcher.submit(1), async_batcher.submit(1), handler()]
        ours.append(with_timeout(ours[0], PATIENCE))
        async with anyio.from_thread.BlockingPortal() as portal:
            never = Future()
            ours += [never, start_soon(portal, in_a_coroutine, never)]
            statistics = batcher.statistics, async_batcher.statistics
            await eventually(lambda: all(each().running == 1 for each in statistics))
            await eventually(lambda: bool(listed(never).waiters))
            now = {pending.future for pending in listed_futures()}
            assert now - before == set(ours)
            never.set_result(5)
            rpc_may_end.set()
            gate.open.set()
            await gather(ours)
    await anyio.to_thread.run_sync(distributed.shutdown)


# ----------------------------------------------------------------- since when, while recording


@on_every_loop
async def test_recording_knows_the_start_time_of_waiting_tasks():
    future = Future()

    async def wait():
        await future

    with Recording():
        before = time.perf_counter()
        async with anyio.create_task_group() as group:
            await spawn(group, wait, "request 1")
            after = time.perf_counter()
            (waiter,) = listed(future).waiters
            assert (waiter.kind, waiter.name) == ("task", "request 1")
            assert places_of([waiter]) == seen_at("wait, test_debug.py")
            assert before <= waiter.since <= after
            assert f"{waiter}, for " in str(listed(future))
            future.set_result(5)


def test_recording_knows_the_start_of_threads_and_callbacks():
    future = Future()
    with Recording():
        before = time.perf_counter()
        future.add_done_callback(log)
        thread = threading.Thread(target=future.wait, name="worker")
        thread.start()
        until(lambda: ("thread", "worker") in waiting_for(future))
        assert all(before <= each.since <= time.perf_counter() for each in listed(future).waiters)
        future.set_result(5)
        thread.join(PATIENCE)


def test_pending_futures_lists_the_oldest_wait_first():
    unknown, second, first = Future(), Future(), Future()
    unknown.add_done_callback(log)
    with Recording():
        first.add_done_callback(log)
        second.add_done_callback(log)
        ours = [p.future for p in listed_futures() if p.future in (first, second, unknown)]
    assert ours == [first, second, unknown]


# --------------------------------------------------------------- recording changes no behaviour


@on_every_loop
async def test_recording_does_not_affect_values_and_errors():
    with Recording():
        futures = [Future() for _ in range(3)]
        failed = Future()
        threading.Thread(target=set_results, args=(futures, [1, 2, 3])).start()
        assert await gather(futures) == [1, 2, 3]
        threading.Thread(target=failed.set_exception, args=(ValueError("foo"),)).start()
        with pytest.raises(ValueError, match="foo"):
            await failed
        assert await futures[0] == 1


@on_every_loop
async def test_recorded_wait_that_times_out_leaves_no_waiter():
    future = Future()
    with Recording():
        with anyio.move_on_after(0.001):
            await future
        with pytest.raises(TimeoutError):
            await anyio.to_thread.run_sync(future.wait, 0.001)
    assert not future.has_waiters()


def test_recorded_callbacks_can_be_removed():
    future = Future()
    with Recording():
        future.add_done_callback(log)
        copy = future.as_concurrent()
        assert future.remove_done_callback(log) == 1
        assert copy.cancel()
        assert not future.has_waiters()


def test_recorded_callback_error_names_the_callback(caplog):
    future = Future()
    with Recording():
        future.add_done_callback(lambda fut: 1 / 0)
        child = future.then(lambda fut: 1 / 0)
        future.set_result(5)
        with pytest.raises(ZeroDivisionError):
            child.wait()
    assert f"callback {__name__}." in caplog.text


@on_every_loop
async def test_waiter_added_during_a_recording_is_woken_afterwards():
    future, got = Future(), []

    async def wait():
        got.append(await future)

    async with anyio.create_task_group() as group:
        with Recording():
            await spawn(group, wait, "request 1")
            future.add_done_callback(lambda fut: got.append("callback"))
        future.set_result(5)
    assert sorted(got, key=str) == [5, "callback"]


def test_recording_keeps_no_future_or_value_alive(no_collector):
    class Value:
        pass

    with Recording():
        future, value = Future(), Value()
        refs = [weakref.ref(future), weakref.ref(value)]
        future.add_done_callback(log)
        future.set_result(value)
        del future, value
        assert [ref() for ref in refs] == [None, None]


def test_pending_future_is_collected_during_a_recording(collected):
    with Recording():
        future = Future()
        future.add_done_callback(lambda fut, future=future: None)
        ref = weakref.ref(future)
        del future
        collected()
        assert ref() is None


def methods():
    """Return every method that a recording may replace."""
    return [{**vars(kind)} for kind in (Future, _core.FunctionCallback, _core.ThenCallback)]


def test_an_ended_recording_leaves_every_method_as_it_was():
    before = methods()
    with suppress(ZeroDivisionError), Recording():
        assert methods() != before
        raise ZeroDivisionError
    assert methods() == before


def test_only_one_recording_can_be_active():
    with Recording():
        recording = methods()
        with pytest.raises(RuntimeError, match="another Recording is on"), Recording():
            pass
        assert methods() == recording
    with Recording():
        pass


@pytest.mark.parametrize(("at", "error"), [("signals", KeyboardInterrupt), ("calls", MemoryError)])
def test_an_interrupted_completion_wakes_all_while_recording(at, error):
    before = methods()
    for interrupt in interrupts(debug, at=at, error=error):
        with Recording():
            future = Future()
            waiter = threading.Thread(target=future.wait)
            waiter.start()
            until(future.has_waiters)
            children = [future.then(lambda fut: 6), gather([future])]
            with interrupt:
                future.set_result(5)
            if not future.done():
                future.set_result(5)
            waiter.join(PATIENCE)
            assert not waiter.is_alive()
            until(lambda children=children: all(child.done() for child in children))
            values = [child.exception() or child.value() for child in children]
            if interrupt.where is None:
                assert values == [6, [5]]
    assert methods() == before


# -------------------------------------------------------------------------------- the trace


async def shown_by(recording, tmp_path):
    return await anyio.to_thread.run_sync(Shown, recording, tmp_path)


class Shown:
    """A trace, as Perfetto would show it."""

    def __init__(self, recording, tmp_path, **options):
        path = tmp_path / "trace.json"
        recording.save(path, **options)
        self.events = json.loads(path.read_text())["traceEvents"]
        self.lines = {
            e["tid"]: e["args"]["name"] for e in self.events if e.get("name") == "thread_name"
        }

    def on(self, line):
        """Return the names of the slices on the line of that name, in order."""
        return [e["name"] for e in self.slices(line)]

    def slices(self, line):
        found = [e for e in self.events if e["ph"] == "X" and self.lines.get(e["tid"]) == line]
        return sorted(found, key=lambda event: event["ts"])


@on_every_loop
async def test_trace_shows_wait_completion_and_resumption(tmp_path):
    future = Future()

    async def wait():
        await future

    with Recording() as recording:
        async with anyio.create_task_group() as group:
            await spawn(group, wait, "request 1")
            worker = threading.Thread(target=future.set_result, args=(5,), name="worker")
            worker.start()
    shown = await shown_by(recording, tmp_path)
    assert shown.on("task request 1") == ["waits", "has yet to go on"]
    (completes,) = shown.slices("thread worker")
    waits, yet = shown.slices("task request 1")
    assert waits["ts"] + waits["dur"] == pytest.approx(completes["ts"]) == yet["ts"]
    start, finish = [next(e for e in shown.events if e["ph"] == phase) for phase in "sf"]
    assert (start["id"], start["tid"]) == (finish["id"], completes["tid"])
    assert finish["tid"] == yet["tid"]


@on_every_loop
async def test_trace_shows_cancelled_and_pending_waits(tmp_path):
    future = Future()

    async def give_up():
        with anyio.move_on_after(0.001):
            await future

    async def wait():
        await future

    with Recording() as recording:
        async with anyio.create_task_group() as group:
            await spawn(group, wait, "patient")
            async with anyio.create_task_group() as others:
                others.start_soon(give_up, name="hasty")
            shown = await shown_by(recording, tmp_path)
            future.set_result(5)
    assert shown.on("task hasty") == ["waits, and gives up"]
    assert shown.on("task patient") == ["waits"]


def test_trace_shows_blocked_threads_and_callbacks(tmp_path):
    future = Future()
    with Recording() as recording:
        thread = threading.Thread(target=future.wait, name="blocked")
        thread.start()
        until(lambda: ("thread", "blocked") in waiting_for(future))
        future.add_done_callback(log)
        with pytest.raises(TimeoutError):
            future.wait(0.001)
        future.set_result(5)
        thread.join(PATIENCE)
    shown = Shown(recording, tmp_path)
    assert shown.on("thread blocked") == ["waits"]
    names = ["waits, and gives up", "completes", f"{__name__}.log"]
    assert shown.on("thread MainThread") == names


@on_asyncio
async def test_tasks_of_the_same_name_have_separate_trace_lines(tmp_path):
    futures = [Future() for _ in range(3)]

    async def wait(future):
        await future

    with Recording() as recording:
        for both in futures[:2], futures[2:]:
            tasks = [asyncio.create_task(wait(future), name="request") for future in both]
            await asyncio.sleep(0)
            set_results(both, both)
            await asyncio.gather(*tasks)
    shown = await shown_by(recording, tmp_path)
    assert list(shown.lines.values()).count("task request") == 2
    assert shown.on("task request").count("waits") == 3


@on_every_loop
async def test_await_of_a_just_completed_future_is_not_recorded(tmp_path):
    class Racing(Future):
        def done(self):
            was_done = super().done()
            self.try_set_result(5)  # right after it returned False
            return was_done

    with Recording() as recording:
        assert await Racing() == 5
    assert (await shown_by(recording, tmp_path)).events == []


def test_recording_keeps_the_last_events(tmp_path):
    with Recording(max_events=2) as recording:
        for _ in range(5):
            future = Future()
            future.add_done_callback(log)
            future.set_result(5)
    assert Shown(recording, tmp_path).on("thread MainThread") == [f"{__name__}.log"] * 2


def test_trace_shares_the_clock_of_the_pytorch_profiler(tmp_path):
    future = Future()

    def callback(fut):
        with record_function("within the callback"):
            torch.ones(3).sum()

    future.add_done_callback(log)
    with profile(activities=[ProfilerActivity.CPU]) as profiled, Recording() as recording:
        future.add_done_callback(callback)
        future.set_result(5)
    profiled.export_chrome_trace(str(tmp_path / "profile.json"))
    shown = Shown(recording, tmp_path, profile=tmp_path / "profile.json")
    (outer,) = [e for e in shown.events if e.get("name", "").endswith("locals>.callback")]
    (inner,) = [e for e in shown.events if e.get("name") == "within the callback"]
    assert (outer["pid"], outer["tid"]) == (inner["pid"], inner["tid"])
    # The profiler's clock and Python's differ by microseconds.
    assert outer["ts"] - 1e3 <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1e3


def test_pending_futures_can_be_called_while_others_complete():
    stop = threading.Event()

    def allocate_and_collect():
        while not stop.is_set():
            future = Future()
            future.add_done_callback(log)
            future.then(log)
            future.set_result(5)

    thread = threading.Thread(target=allocate_and_collect)
    thread.start()
    try:
        for _ in range(5):
            assert all(map(str, pending_futures()))
    finally:
        stop.set()
        thread.join(PATIENCE)
    gc.collect()


# Some threads list the waiters while others wait, wake and finish, and one allocates tuples.
STRESS = """
import asyncio, gc, os, random, sys, threading, trio, uvloop
from torchfut_aio import Future, ValueStream
from torchfut_aio.debug import pending_futures

sys.setswitchinterval(1e-5)
gc.freeze()  # exempt the objects that already exist
errors, found, stop = [], set(), threading.Event()

def watched(function, *args):
    def run():
        try:
            function(*args)
        except BaseException as error:
            errors.append(error)
            stop.set()
    return threading.Thread(target=run)

def list_waiters():
    for _ in range(ROUNDS):
        for pending in pending_futures():
            str(pending)
            for waiter in pending.waiters:
                found.add((waiter.kind, waiter.where and waiter.where.partition(",")[0]))
    stop.set()

def fill_tuples():
    while not stop.is_set():
        tuple(n for n in range(30))

async def numbers(future):
    yield await future

async def wait(future):
    async for _ in numbers(future):
        return

async def read(stream):
    async for _ in stream:
        pass

async def tasks(spawn, checkpoint):
    while not stop.is_set():
        futures, stream = [Future() for _ in range(9)], ValueStream()
        for future in futures:
            spawn(wait, future)
        spawn(read, stream)
        await checkpoint()
        await checkpoint()
        for future in futures:
            future.set_result(5)
        stream.close()
        await checkpoint()

async def on_asyncio():
    kept = []
    await tasks(lambda f, *a: kept.append(asyncio.ensure_future(f(*a))), lambda: asyncio.sleep(0))
    await asyncio.gather(*kept)

async def on_trio():
    async with trio.open_nursery() as nursery:
        await tasks(nursery.start_soon, trio.lowlevel.checkpoint)

def block():
    while not stop.is_set():
        future = Future()
        waker = threading.Thread(target=future.set_result, args=(5,))
        waker.start()
        future.wait()
        waker.join()

loops = [watched(asyncio.run, on_asyncio()), watched(uvloop.run, on_asyncio())]
loops += [watched(trio.run, on_trio), watched(block), watched(fill_tuples)]
threads = [*loops, watched(list_waiters), watched(list_waiters)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(errors, sorted(found, key=str))
"""


def test_pending_futures_does_not_disturb_other_threads():
    printed = forks.output(STRESS.replace("ROUNDS", "300"), filters="")
    errors, _, found = printed.partition(" ")
    assert errors == "[]", printed
    for (place,) in (seen_at("numbers"), seen_at("read")):
        assert str(("task", place)) in found


# ------------------------------------------------------------------------- what is documented


GUIDE = (ROOT / "docs" / "guides" / "seeing.md").read_text()
SHOWN = re.findall(
    r"```python\n(.*?)```\n(?:\nIt prints:\n\n```\n(.*?)```\n)?", GUIDE, flags=re.DOTALL
)


def printed_by(program, *arguments, folder):
    done = forks.run(program, *arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout  # torch's profiler writes to stderr


@shows_places
@pytest.mark.parametrize(("code", "expected"), SHOWN, ids=range(len(SHOWN)))
def test_debugging_guide_examples_print_the_stated_output(tmp_path, code, expected):
    (tmp_path / "app.py").write_text(code)
    printed = printed_by(pathlib.Path("app.py"), folder=tmp_path)
    assert printed == expected or not expected


def test_tracing_example_names_the_request_that_never_ends(tmp_path):
    printed = printed_by(ROOT / "examples" / "tracing.py", "trace.json", folder=tmp_path)
    place = r" in lost, tracing\.py:\d+" if has_gil else ""
    assert re.match(
        r"<Future pending waiters=1 callbacks=1>\n"
        rf"  task lost request{place}, for [\d.]+ s\n"
        r"  callback __main__.note, for [\d.]+ s\n"
        r"recorded \d+ kB",
        printed,
    )
    shown = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"waits", "completes", "has yet to go on"} <= {event["name"] for event in shown}


def test_equal_futures_have_separate_entries():
    class Equal(Future):
        def __eq__(self, other):
            raise TypeError("these cannot be compared")

    futures = [Equal(), Equal()]
    found = [each for each in pending_futures() if type(getattr(each, "future", None)) is Equal]
    assert len({*found}) == len(futures) == 2
    assert found[0] != found[1]

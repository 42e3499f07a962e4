"""Streams of values from threads to tasks: ``ValueStream``."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import gc
import itertools
import json
import multiprocessing
import pickle
import threading
import weakref
from collections import Counter, OrderedDict, deque

import anyio
import anyio.lowlevel
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from torchfut_aio import (
    BlockingWaitWarning,
    CancelledError,
    Future,
    StreamClosedError,
    ValueStream,
    _loops,
    _waiters,
)
from torchfut_aio.serving import _stream, _stream_state
from torchfut_aio.serving._stream import state_of

from .accelerator import FIRST, NEW, being_filled, read_on_current_stream, simulated_only
from .explorer import interrupts
from .loops import on_asyncio, on_every_loop
from .test_memory import Growth
from .threads import PATIENCE, alongside, running, until
from .waiting import Reader, eventually, polled, waiting

MODULES = (_stream, _stream_state, _waiters)


def room_in(stream):
    """Fill the stream, and return how many values had room."""
    return sum(iter(lambda: stream.try_put("fills it"), False))


async def read_all(stream):
    return [value async for value in stream]


# -------------------------------------------------------------------------- simple cases


@on_every_loop
async def test_task_reads_values_of_a_thread_in_order_until_the_end():
    stream = ValueStream()

    def produce():
        for n in range(100):
            stream.put(n)
        stream.put_many(range(100, 200))
        stream.close()

    with anyio.fail_after(PATIENCE):
        async with alongside(produce):
            assert await read_all(stream) == [*range(200)]
        assert await read_all(stream) == []  # the end stays


def test_thread_reads_values_of_a_thread_in_order_until_the_end():
    stream = ValueStream()

    def produce():
        with stream:
            for n in range(100):
                stream.put(n)

    with running(produce):
        assert [*stream] == [*range(100)]


@on_every_loop
async def test_task_waits_for_values_of_another_task():
    stream, got = ValueStream(max_size=2), []

    async def consume():
        with stream.listen() as values:
            async for value in values:
                got.append(value)

    async def produce():
        with stream:
            for n in range(50):
                await stream.aput(n)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tg:
            tg.start_soon(consume)
            tg.start_soon(produce)
    assert got == [*range(50)]
    assert stream.closed


@on_every_loop
async def test_async_with_on_a_stream_is_refused_without_losing_values():
    stream = ValueStream()
    stream.put(1)
    with pytest.raises(TypeError, match="asynchronous context manager"):
        async with stream:
            pass
    assert stream.listening
    assert not stream.closed
    assert stream.get() == 1


@on_every_loop
async def test_close_error_reaches_every_consumer_after_the_values():
    stream, error, got, raised = ValueStream(), ValueError("foo"), [], []
    stream.put_many(["a", "b"])

    async def consume():
        try:
            async for value in stream:
                got.append(value)
        except ValueError as caught:
            raised.append(caught)

    async with anyio.create_task_group() as tg:
        for _ in range(3):
            tg.start_soon(consume)
        await anyio.wait_all_tasks_blocked()
        assert got == ["a", "b"]
        stream.close(error)
        stream.close(KeyError("too late"))
    assert raised == [error] * 3
    with pytest.raises(ValueError, match="foo"):
        next(iter(stream))


def test_with_block_closes_the_stream_with_its_error():
    stream = ValueStream()
    with pytest.raises(ZeroDivisionError), stream:
        stream.put(1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(stream)


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
def test_stop_iteration_as_close_error_raises_runtime_error(kind):
    stream, error = ValueStream(), kind()
    stream.close(error)
    with pytest.raises(RuntimeError) as caught:
        list(stream)
    assert caught.value.__cause__ is error


@on_every_loop
async def test_cancelled_producer_does_not_cancel_its_consumers():
    stream, ends = ValueStream(), []

    async def produce():
        with stream:
            await stream.aput("first")
            await anyio.sleep_forever()

    async def consume(read):
        with pytest.raises(CancelledError, match="the producer of the stream was cancelled"):
            await read()
        await anyio.lowlevel.checkpoint()
        ends.append(read)

    async def get():
        while True:
            await stream.aget()

    async with anyio.create_task_group() as tg, anyio.create_task_group() as producers:
        tg.start_soon(consume, get)
        tg.start_soon(consume, lambda: read_all(stream))
        producers.start_soon(produce)
        await anyio.wait_all_tasks_blocked()
        producers.cancel_scope.cancel()
    assert len(ends) == 2


@pytest.mark.parametrize(
    "error", [GeneratorExit(), asyncio.CancelledError("foo"), CancelledError.OfAsyncio("foo")]
)
def test_task_ending_close_error_is_a_cancelled_error_in_threads(error):
    stream = ValueStream()
    stream.close(error)
    with pytest.raises(CancelledError) as caught:
        stream.get()
    assert caught.value.__cause__ is error
    assert not isinstance(caught.value, asyncio.CancelledError)


def test_closed_stream_refuses_values():
    stream = ValueStream()
    stream.put(1)
    with pytest.raises(TypeError):
        stream.close("an error")
    assert not stream.closed
    stream.close()
    for put in (stream.put, stream.try_put, lambda value: stream.put_many([value])):
        with pytest.raises(StreamClosedError, match="closed"):
            put(2)
    assert stream.closed
    assert stream.listening
    assert repr(stream) == "<ValueStream closed size=1>"
    assert list(stream) == [1]


def test_stream_methods_check_their_arguments():
    for wrong, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), ("1", TypeError)):
        with pytest.raises(error, match="max_size must be "):
            ValueStream(max_size=wrong)
    with pytest.raises(TypeError):
        ValueStream().put(1, timeout="1")
    with pytest.raises(ValueError, match="NaN"):
        ValueStream().put_many([1], timeout=float("nan"))
    for positional in (lambda s: s.put(1, True), lambda s: s.put_many([1], 1)):  # like queue.Queue
        with pytest.raises(TypeError, match="positional"):
            positional(ValueStream())
    stream = ValueStream(max_size=3)
    stream.put_many([1, 2], timeout=0)
    assert repr(stream) == "<ValueStream open size=2/3>"
    assert len(stream) == 2


def test_stream_accesses_no_attribute_of_a_value():
    class Silent:
        def __getattribute__(self, name):
            raise AssertionError(name)

        __hash__ = __eq__ = __repr__ = __bool__ = None

    stream, value = ValueStream(max_size=1), Silent()
    stream.put(value)
    assert "Silent" not in repr(stream)
    with pytest.raises(TimeoutError):
        stream.put(value, timeout=0)
    assert next(iter(stream)) is value


# -------------------------------------------------------------------------- bounded


def test_a_put_blocks_until_there_is_room():
    stream = ValueStream(max_size=2)
    stream.put_many([1, 2])
    values = iter(stream)
    with running(lambda: stream.put(3, timeout=PATIENCE)):
        until(lambda: waiting(stream) == (0, 1))
        assert len(stream) == 2
        assert next(values) == 1
    assert [next(values), next(values)] == [2, 3]


def test_put_that_times_out_reports_how_many_values_were_put():
    stream = ValueStream(max_size=3)
    stream.put(0)
    assert stream.try_put(1)
    with pytest.raises(TimeoutError, match=r"within 0.01 s: 1 of 3 values were put"):
        stream.put_many([2, 3, 4], timeout=0.01)
    with pytest.raises(TimeoutError, match=r"within 0 s: 0 of 1 values were put$"):
        stream.put(3, timeout=0)
    assert not stream.try_put(3)
    stream.close()
    assert list(stream) == [0, 1, 2]
    assert waiting(stream) == (0, 0)


@on_every_loop
async def test_aput_waits_for_room_and_can_be_cancelled():
    stream = ValueStream(max_size=1)
    await stream.aput(1)
    with anyio.move_on_after(0.01) as scope:
        await stream.aput(2)
    assert scope.cancelled_caught
    assert waiting(stream) == (0, 0)
    values = aiter(stream)
    async with anyio.create_task_group() as tg:
        tg.start_soon(stream.aput, 3)
        await anyio.wait_all_tasks_blocked()
        assert len(stream) == 1
        assert await anext(values) == 1
    assert await anext(values) == 3


@on_every_loop
async def test_put_to_a_full_stream_on_a_loop_warns(nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()
    stream = ValueStream(max_size=1)
    stream.put(1)
    with pytest.raises(TimeoutError):
        stream.put(2, timeout=0)
    with running(lambda: until(lambda: waiting(stream) == (0, 1)) or stream.get()):
        with pytest.warns(BlockingWaitWarning, match="aput"):
            stream.put(2)


def test_stream_limit_holds_for_concurrent_producers():
    stream, most = ValueStream(max_size=3), 0

    def produce():
        for n in range(200):
            if n % 3 == 0:
                stream.put_many([n, n], timeout=PATIENCE)
            else:
                stream.put(n, timeout=PATIENCE)

    values = iter(stream)
    with running(*[produce] * 4):
        for n, _ in enumerate(values):
            most = max(most, len(stream))
            if n == 4 * 267 - 1:
                break
    assert most <= 3
    assert room_in(stream) == 3


@on_every_loop
async def test_close_wakes_all_waiting_readers_and_writers():
    full, empty, ended = ValueStream(max_size=1), ValueStream(), []
    full.put(1)

    async def aput():
        with pytest.raises(StreamClosedError):
            await full.aput(2)
        ended.append("task")

    def put():
        with pytest.raises(StreamClosedError):
            full.put_many([2, 3])
        ended.append("thread")

    def read():
        ended.extend(empty)
        ended.append("thread")

    async def aread():
        ended.extend([value async for value in empty])
        ended.append("task")

    with anyio.fail_after(PATIENCE):
        async with alongside(put, read), anyio.create_task_group() as tg:
            tg.start_soon(aput)
            tg.start_soon(aread)
            await eventually(lambda: waiting(full) == (0, 2) and waiting(empty) == (2, 0))
            full.close()
            empty.close()
    assert sorted(ended) == ["task", "task", "thread", "thread"]
    assert list(full) == [1]


# ------------------------------------------------------------- several producers and readers


@on_every_loop
async def test_value_is_read_by_exactly_one_of_several_consumers():
    stream, got = ValueStream(max_size=5), []

    async def consume():
        async for value in stream:
            got.append(value)
            await anyio.lowlevel.checkpoint()

    def consume_in_thread():
        got.extend(stream)

    def produce(first):
        for n in range(first, first + 300):
            stream.put(n, timeout=PATIENCE)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tg:
            for _ in range(3):
                tg.start_soon(consume)
            async with alongside(consume_in_thread):
                async with alongside(lambda: produce(0), lambda: produce(300)):
                    pass
                stream.close()
    assert sorted(got) == [*range(600)]


def test_value_accepted_during_close_is_read():
    for n in range(200):
        stream, accepted, got = ValueStream(max_size=None if n % 2 else 4), Counter(), Counter()

        def produce(name, stream=stream, accepted=accepted):
            with contextlib.suppress(StreamClosedError):
                for n in range(1000):
                    stream.put((name, n), timeout=PATIENCE)
                    accepted[name, n] += 1

        def close(stream=stream, got=got):
            until(lambda: len(got) > 3)
            stream.close()

        with running(
            lambda produce=produce: produce(1),
            lambda produce=produce: produce(2),
            lambda got=got, stream=stream: got.update(stream),
            lambda got=got, stream=stream: got.update(stream),
            close,
        ):
            pass
        assert got == accepted


@on_every_loop
async def test_cancelled_reads_neither_lose_nor_repeat_values():
    stream, got = ValueStream(max_size=4), []
    values = aiter(stream)

    def produce():
        with stream:
            for n in range(500):
                stream.put(n, timeout=PATIENCE)

    async def consume(scope):
        with scope:
            async for value in values:
                got.append(value)

    with anyio.fail_after(PATIENCE):
        async with alongside(produce):
            for n in itertools.count():
                before = len(got)
                async with anyio.create_task_group() as tg:
                    scope = anyio.CancelScope()
                    tg.start_soon(consume, scope)
                    tg.start_soon(consume, anyio.CancelScope())
                    for _ in range(n % 4):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()
                    tg.cancel_scope.cancel()
                if len(got) >= 500:
                    break
                if len(got) == before:  # otherwise the loop would take the GIL from the producer
                    await eventually(lambda: len(stream) or stream.closed)
        async for value in values:
            got.append(value)
    assert got == [*range(500)]
    assert waiting(stream) == (0, 0)


def test_consumer_of_a_closed_loop_takes_no_value():
    stream, loop = ValueStream(), asyncio.new_event_loop()
    task = loop.create_task(read_all(stream))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    values, got = iter(stream), []
    with running(lambda: got.append(next(values))):
        until(lambda: waiting(stream) == (2, 0))
        stream.put(1)
    assert got == [1]
    task._log_destroy_pending = False


@on_asyncio
async def test_one_wake_up_covers_all_values_and_streams_of_a_loop(monkeypatch):
    streams = [ValueStream() for _ in range(30)]
    readers = [asyncio.ensure_future(read_all(stream)) for stream in streams]
    await asyncio.sleep(0)
    ours, asked = _loops.current_asyncio(), []
    call_soon = type(ours).call_soon

    def counted(self, function):
        asked.append(self)
        return call_soon(self, function)

    def produce():
        for stream in streams:
            stream.put_many(range(10))
            stream.close()

    monkeypatch.setattr(type(ours), "call_soon", counted)
    thread = threading.Thread(target=produce)
    thread.start()
    while thread.is_alive():  # the loop does not run
        pass
    assert asked == [ours]
    assert await asyncio.gather(*readers) == [[*range(10)]] * 30


# ------------------------------------------------------------------------ readers


@on_every_loop
async def test_put_raises_when_the_consumer_has_left_its_loop():
    stream = ValueStream(max_size=2)
    stream.put_many([1, 2])
    assert stream.listening

    def produce():
        with pytest.raises(StreamClosedError, match="nothing listens"):
            stream.put_many([3, 4, 5, 6], timeout=PATIENCE)

    async with alongside(produce):
        await eventually(lambda: waiting(stream) == (0, 1))
        async for _ in stream:
            break
    assert not stream.listening
    assert repr(stream) == "<ValueStream open size=0/2, nothing listens>"
    with pytest.raises(StreamClosedError, match="nothing listens"):
        stream.try_put(7)
    for read in (stream.listen, stream.__aiter__, stream.__iter__, stream.get):
        with pytest.raises(StreamClosedError, match=r"stay in one block: with stream.listen\(\)"):
            read()
    with pytest.raises(StreamClosedError, match="stay in one block"):
        await stream.aget()


@on_every_loop
async def test_put_raises_when_the_consumer_is_cancelled(no_collector):
    stream = ValueStream()

    async def consume():
        async for _ in stream:
            pass

    async with anyio.create_task_group() as tg:
        tg.start_soon(consume)
        await anyio.wait_all_tasks_blocked()
        assert stream.listening
        tg.cancel_scope.cancel()
    assert not stream.listening
    with pytest.raises(StreamClosedError):
        stream.put(1)


@on_every_loop
async def test_stop_listening_ends_all_loops_and_drops_the_rest():
    class Thing:
        pass

    stream, ended, thing = ValueStream(), [], Thing()

    async def consume():
        ended.append(await read_all(stream))

    async with anyio.create_task_group() as tg:
        tg.start_soon(consume)
        await anyio.wait_all_tasks_blocked()
        stream.stop_listening()
        stream.close(ValueError("nothing is there to raise it"))
    assert ended == [[]]
    assert not stream.listening

    stream, left = ValueStream(), weakref.ref(thing)
    stream.put(thing)
    del thing
    stream.stop_listening()
    assert left() is None


async def left_by_its_end(stream):
    with stream.listen():
        pass


async def left_by_break(stream):
    with stream.listen() as values:
        async for _ in values:
            break


async def left_by_an_error(stream):
    with contextlib.suppress(ZeroDivisionError):
        with stream.listen() as values:
            async for value in values:
                value / 0


async def left_by_a_cancellation(stream):
    with anyio.CancelScope() as scope, stream.listen() as values:
        await anext(values)
        scope.cancel()
        await anyio.sleep_forever()


@on_every_loop
@pytest.mark.parametrize(
    "leave", [left_by_its_end, left_by_break, left_by_an_error, left_by_a_cancellation]
)
async def test_end_of_a_listen_block_stops_listening(leave, no_collector):
    stream = ValueStream()
    stream.put_many([1, 2])
    await leave(stream)
    assert not stream.listening
    assert len(stream) == 0
    with pytest.raises(StreamClosedError, match="nothing listens"):
        stream.put(3)


@on_every_loop
async def test_listen_block_works_in_threads_and_survives_break():
    stream = ValueStream()
    stream.put_many([1, 2, 3])
    with stream.listen() as values:
        for value in values:
            assert value == 1
            break
        async for value in values:
            assert value == 2
            break
        assert stream.listening
        assert stream.get() == 3
    assert not stream.listening


def test_iterator_is_exhausted_after_its_listen_block():
    stream = ValueStream()
    stream.put(1)
    other = iter(stream)
    with stream.listen() as values:
        pass
    assert list(values) == []
    with values:  # again
        assert list(values) == []
    assert stream.listening
    assert next(other) == 1


def test_leaving_a_listen_block_after_the_end_changes_nothing():
    stream = ValueStream()
    with stream.listen() as values:
        stream.close()
        assert list(values) == []
    assert stream.listening
    assert list(stream) == []


def test_stream_listens_until_its_last_listener_is_dropped():
    stream = ValueStream()
    stream.put_many([1, 2, 3])
    first, second = iter(stream), iter(stream)
    assert next(first) == 1
    del first
    assert stream.listening
    for value in second:
        assert value == 2
        break
    assert next(second) == 3
    del second
    assert not stream.listening


def test_stream_read_to_its_end_can_be_read_again():
    stream = ValueStream()
    stream.close()
    assert list(stream) == list(stream) == []
    assert stream.listening
    stream.stop_listening()
    assert not stream.listening


def test_value_put_too_late_does_not_count_as_unread():
    stream = ValueStream()
    readers = [iter(stream)]

    class Values(OrderedDict):
        def __setitem__(self, *item):  # a put that has seen an open stream
            stream.close()
            assert list(readers[0]) == []
            super().__setitem__(*item)
            readers.clear()

    state_of(stream).values = Values()
    with pytest.raises(StreamClosedError):
        stream.put(1)
    assert list(stream) == []


@on_every_loop
async def test_read_without_listeners_raises_the_first_cause():
    for closed_first in (True, False):
        stream = ValueStream()
        if closed_first:
            stream.close()
        stream.stop_listening()
        stream.close()
        message = "the stream has ended" if closed_first else r"nothing listens .* listen\(\) block"
        for read in (stream.listen, stream.get):
            with pytest.raises(StreamClosedError, match=message):
                read()


def test_close_error_is_not_logged_without_listeners(caplog):
    for close_first in (True, False):
        stream = ValueStream()
        if close_first:
            stream.close(ValueError("foo"))
        stream.stop_listening()
        if not close_first:
            stream.close(ValueError("foo"))
    del stream
    gc.collect()
    assert not caplog.records


def test_unread_close_error_is_logged(caplog):
    stream = ValueStream()
    stream.close(ValueError("foo"))
    del stream
    gc.collect()
    assert "foo" in caplog.text


# ------------------------------------------------------------------------------- get, aget


@on_every_loop
async def test_get_reads_one_value_and_keeps_the_stream_open(no_collector):
    stream = ValueStream(max_size=5)
    stream.put_many([1, 2, 3, 4, 5])
    assert stream.get() == 1
    assert await stream.aget() == 2
    assert stream.listening
    stream.put_many([6, 7])
    assert len(stream) == 5
    values = aiter(stream)
    assert await anext(values) == 3
    assert [stream.get(), await stream.aget()] == [4, 5]
    stream.close()
    assert [value async for value in values] == [6, 7]


@on_every_loop
async def test_a_get_waits_for_a_value_in_threads_and_tasks():
    stream, got = ValueStream(), []

    async def aget():
        got.append(await stream.aget())

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tg:
            tg.start_soon(aget)
            async with alongside(lambda: got.append(stream.get())):
                await eventually(lambda: waiting(stream) == (2, 0))
                stream.put_many([1, 2])
    assert sorted(got) == [1, 2]
    assert waiting(stream) == (0, 0)


ENDS = {
    "close": (
        ValueStream.close,
        StreamClosedError,
        "been closed, and all its values have been read",
    ),
    "error": (lambda stream: stream.close(ZeroDivisionError("foo")), ZeroDivisionError, "foo"),
    "stop_listening": (ValueStream.stop_listening, StreamClosedError, "nothing listens"),
}


@on_every_loop
@pytest.mark.parametrize(("end", "expected", "text"), ENDS.values(), ids=ENDS)
async def test_close_wakes_all_gets_and_fails_later_ones(end, expected, text):
    stream, ended = ValueStream(), []

    def get():
        with pytest.raises(expected, match=text):
            stream.get()
        ended.append("thread")

    async def aget():
        with pytest.raises(expected, match=text):
            await stream.aget()
        ended.append("task")

    with anyio.fail_after(PATIENCE):
        async with alongside(get), anyio.create_task_group() as tg:
            tg.start_soon(aget)
            await eventually(lambda: waiting(stream) == (2, 0))
            end(stream)
    assert sorted(ended) == ["task", "thread"]
    await aget()
    get()
    assert stream.listening == (end is not ValueStream.stop_listening)


def test_get_that_times_out_leaves_no_waiter_and_loses_no_value():
    stream = ValueStream()
    for timeout in (0, -1, 0.01):
        shown = f"had no value within {max(timeout, 0):g} s$"
        with pytest.raises(TimeoutError, match=shown):
            stream.get(timeout=timeout)
        assert waiting(stream) == (0, 0)
    stream.put(1)
    assert stream.get(timeout=0) == 1
    with pytest.raises(TypeError, match="positional"):
        stream.get(5)
    with pytest.raises(TypeError, match="number of seconds"):
        stream.get(timeout="1")
    with pytest.raises(ValueError, match="NaN"):
        stream.get(timeout=float("nan"))


def test_gets_that_time_out_lose_no_value_and_no_wake_up():
    stream, got, n = ValueStream(max_size=2), [], 400

    def produce():
        with stream:
            for n_put in range(n):
                stream.put(n_put, timeout=PATIENCE)

    def get(timeout):
        with contextlib.suppress(StreamClosedError):
            while True:
                with contextlib.suppress(TimeoutError):
                    got.append(stream.get(timeout=timeout))

    with running(produce, lambda: get(1e-5), lambda: get(1e-4), lambda: get(PATIENCE)):
        pass
    assert sorted(got) == [*range(n)]
    assert waiting(stream) == (0, 0)


@on_every_loop
async def test_cancelled_aget_leaves_no_waiter_and_loses_no_value():
    stream, got, n = ValueStream(max_size=2), [], 200

    def produce():
        with stream:
            for n_put in range(n):
                stream.put(n_put, timeout=PATIENCE)

    async def get(scope):
        with scope:
            got.append(await stream.aget())

    with anyio.fail_after(PATIENCE):
        async with alongside(produce):
            for turns in itertools.count():
                async with anyio.create_task_group() as tg:
                    scope = anyio.CancelScope()
                    tg.start_soon(get, scope)
                    for _ in range(turns % 3):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()
                assert waiting(stream)[0] == 0
                if len(got) == n:
                    break
                await eventually(lambda: len(stream) or stream.closed)
    assert got == [*range(n)]


@on_every_loop
async def test_gets_and_loops_in_threads_and_tasks_share_the_values():
    stream, got = ValueStream(max_size=3), []

    def get():
        with contextlib.suppress(StreamClosedError):
            while True:
                got.append(stream.get(timeout=PATIENCE))

    async def aget():
        with contextlib.suppress(StreamClosedError):
            while True:
                got.append(await stream.aget())
                await anyio.lowlevel.checkpoint()

    async def consume():
        with stream.listen() as values:
            async for value in values:
                got.append(value)
                await anyio.lowlevel.checkpoint()

    def produce():
        with stream:
            for n in range(600):
                stream.put(n, timeout=PATIENCE)

    with anyio.fail_after(PATIENCE):
        async with alongside(get, lambda: got.extend(stream), produce):
            async with anyio.create_task_group() as tg:
                tg.start_soon(aget)
                tg.start_soon(consume)
    assert sorted(got) == [*range(600)]
    assert waiting(stream) == (0, 0)


@on_every_loop
async def test_a_get_from_an_empty_stream_on_a_loop_warns(nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()
    stream = ValueStream()
    with pytest.raises(TimeoutError):
        stream.get(timeout=0)
    with running(lambda: until(lambda: waiting(stream) == (1, 0)) or stream.put(1)):
        with pytest.warns(BlockingWaitWarning, match=r"aget\(\)") as caught:
            assert stream.get() == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("how", ["get", "aget"])
def test_close_error_raised_by_get_is_not_logged(how, caplog):
    stream = ValueStream()
    stream.close(ValueError("foo"))
    with pytest.raises(ValueError, match="foo"):
        stream.get() if how == "get" else asyncio.run(stream.aget())
    del stream
    gc.collect()
    assert not caplog.records


def test_first_get_raises_the_error_itself_and_keeps_no_frame(no_collector):
    class Thing:
        pass

    def fail():
        thing = Thing()
        kept.append(weakref.ref(thing))
        raise ValueError("foo")

    def read(stream):
        try:
            stream.get()
        except ValueError as caught:
            return id(caught)

    stream, kept = ValueStream(), []
    try:
        with stream:
            fail()
    except ValueError as error:
        raised = id(error)
    assert kept[0]() is not None  # not yet retrieved
    assert read(stream) == raised
    assert kept[0]() is None
    assert read(stream) != raised


class NeedsCode(Exception):
    def __init__(self, text, *, code):
        super().__init__(text)
        self.code = code


def of_json():
    with pytest.raises(ValueError, match="Expecting") as caught:
        json.loads("{")
    return caught.value


@pytest.mark.parametrize("make", [lambda: NeedsCode("foo", code=5), of_json], ids=["own", "json"])
def test_get_raises_the_same_uncopyable_error_each_time(make):
    stream, error = ValueStream(), make()
    stream.close(error)
    for _ in range(4):
        with pytest.raises(type(error)) as caught:
            stream.get()
        assert str(caught.value) == str(error)
        assert vars(caught.value) == vars(error)


def test_a_stream_keeps_no_frames_of_the_errors_in_a_group(no_collector):
    class Local:
        pass

    def produce(stream):
        local = Local()
        refs.append(weakref.ref(local))
        with contextlib.suppress(ExceptionGroup), stream:
            try:
                raise ValueError("foo")
            except ValueError as error:
                raise ExceptionGroup("of a task group", [error]) from None

    refs, stream = [], ValueStream()
    produce(stream)
    for _ in range(2):
        with contextlib.suppress(ExceptionGroup):
            stream.get()
        assert refs[0]() is None
    with pytest.raises(ExceptionGroup) as caught:
        stream.get()
    assert repr(caught.value.exceptions) == repr((ValueError("foo"),))


@on_every_loop
async def test_error_raised_by_get_stays_the_same_for_listeners():
    stream, error = ValueStream(), ValueError("foo")
    with stream.listen() as values:
        stream.close(error)
        for read in (stream.aget, stream.aget, lambda: anext(values)):
            with pytest.raises(ValueError, match="foo") as caught:
                await read()
            assert caught.value is error


# -------------------------------------------------------------------------- against a model


class StreamAgainstAModel(RuleBasedStateMachine):
    """Operations that do not wait, in any order."""

    def __init__(self):
        super().__init__()
        self.streams = [ValueStream(max_size=size) for size in (None, 1, 3)]
        self.blocks = [contextlib.ExitStack() for _ in self.streams]
        self.listeners = [
            block.enter_context(stream.listen()) for block, stream in zip(self.blocks, self.streams)
        ]
        self.loop = asyncio.new_event_loop()
        self.models = [deque() for _ in self.streams]
        self.limits = [10**9, 1, 3]
        self.ends = [None, None, None]
        self.left = [False] * 3
        self.count = 0

    which = st.integers(0, 2)

    def teardown(self):
        self.loop.close()
        for stream in self.streams:
            stream.stop_listening()  # an error that was not read would be logged

    def refuses(self, n):
        return self.ends[n] is not None or self.left[n]

    @rule(n=which)
    def try_put(self, n):
        self.count += 1
        if self.refuses(n):
            with pytest.raises(StreamClosedError):
                self.streams[n].try_put(self.count)
            return
        has_room = len(self.models[n]) < self.limits[n]
        assert self.streams[n].try_put(self.count) == has_room
        if has_room:
            self.models[n].append(self.count)

    @rule(n=which, number=st.integers(0, 4))
    def put_many(self, n, number):
        values = [*range(self.count, self.count + number)]
        self.count += number
        room = self.limits[n] - len(self.models[n])
        if self.refuses(n):
            expected = pytest.raises(StreamClosedError)
        elif number > room:
            message = f"{room} of {number}"
            expected = pytest.raises(TimeoutError, match=message)
        else:
            expected = contextlib.nullcontext()
        with expected:
            self.streams[n].put_many(values, timeout=0)
        if not self.refuses(n):
            self.models[n].extend(values[:room])

    @rule(n=which, error=st.sampled_from([None, ValueError("foo")]))
    def close(self, n, error):
        self.streams[n].close(error)
        if self.ends[n] is None:
            self.ends[n] = (error,)

    @rule(n=which)
    def stop(self, n):
        self.streams[n].stop_listening()
        self.left[n] = True
        self.models[n].clear()

    @rule(n=which)
    def read(self, n):
        if self.models[n]:
            assert next(self.listeners[n]) == self.models[n].popleft()
        elif self.refuses(n):
            error = None if self.left[n] else self.ends[n][0]
            with pytest.raises(StopIteration if error is None else type(error)):
                next(self.listeners[n])

    @rule(n=which)
    def get(self, n):
        self.check_get(n, lambda: self.streams[n].get(timeout=0))

    @rule(n=which)
    def aget(self, n):
        async def main():
            with anyio.fail_after(0):
                return await self.streams[n].aget()

        self.check_get(n, lambda: self.loop.run_until_complete(main()))

    def check_get(self, n, get):
        if self.models[n]:
            assert get() == self.models[n].popleft()
            return
        if self.refuses(n):
            error = None if self.left[n] else self.ends[n][0]
            expected = StreamClosedError if error is None else type(error)
        else:
            expected = TimeoutError
        with pytest.raises(expected):
            get()

    @rule(n=which)
    def another_listener(self, n):
        if self.left[n]:
            with pytest.raises(StreamClosedError):
                self.streams[n].listen()
        else:  # before the other one is removed
            with self.blocks[n]:
                self.blocks[n] = contextlib.ExitStack()
                self.listeners[n] = self.blocks[n].enter_context(self.streams[n].listen())

    @rule(n=which)
    def leave(self, n):
        left, self.listeners[n] = self.listeners[n], iter(())
        self.blocks[n].close()
        assert list(left) == []
        if self.ends[n] is None or self.models[n]:
            self.left[n] = True
            self.models[n].clear()
        if self.left[n]:
            self.listeners[n] = left
        else:
            self.listeners[n] = self.blocks[n].enter_context(self.streams[n].listen())

    @invariant()
    def every_stream_is_as_the_model(self):
        for n, stream in enumerate(self.streams):
            assert len(stream) == len(self.models[n])
            assert stream.closed == (self.ends[n] is not None)
            assert stream.listening == (not self.left[n])


StreamAgainstAModel.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None
)
TestStreamAgainstAModel = StreamAgainstAModel.TestCase


# ---------------------------------------------------------------------- interrupts


class Waiter:
    """It is its own waker."""

    woken = 0

    def wake(self, _waiter):
        self.woken += 1


@pytest.mark.parametrize("many", [False, True], ids=["put", "put_many"])
@pytest.mark.parametrize("max_size", [None, 5])
def test_an_interrupted_put_is_done_or_not_and_wakes_readers(max_size, many):
    done = not_done = 0
    for interrupt in interrupts(*MODULES):
        stream, reader = ValueStream(max_size=max_size), Waiter()
        values = iter(stream)
        stream.put("before")
        state_of(stream).readers.waiting[reader] = reader
        with interrupt:
            stream.put_many(["a", "b"]) if many else stream.put("a")
        if len(stream) > 1:
            done += 1
            until(lambda: reader.woken)
        else:
            not_done += 1
            assert interrupt.raised
        got = [next(values) for _ in range(len(stream))]
        assert got in (["before"], ["before", "a"], ["before", "a", "b"])
        assert max_size is None or room_in(stream) == max_size
    assert done
    assert not_done


READS = {
    "next": lambda stream, values, got: got.append(next(values)),
    "anext": lambda stream, values, got: got.append(at_once(values.__anext__())),
    "get": lambda stream, values, got: got.append(stream.get(timeout=0)),
    "aget": lambda stream, values, got: got.append(at_once(stream.aget())),
}


def at_once(coroutine):
    """Return the result of a coroutine that does not suspend."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    finally:
        coroutine.close()


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_an_interrupted_read_loses_no_value_and_no_wake_up(read):
    for interrupt in interrupts(*MODULES):
        stream, writer, got = ValueStream(max_size=2), Waiter(), []
        stream.put_many(["a", "b"])
        values = iter(stream)
        state_of(stream).writers.waiting[writer] = writer
        with interrupt:
            read(stream, values, got)
        assert len(got) + len(stream) == 2
        if got:
            assert writer.woken
        assert got + [next(values) for _ in range(len(stream))] == ["a", "b"]
        assert room_in(stream) == 2


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_interrupted_read_during_a_put_keeps_the_stream_limit(read):
    stream, got = ValueStream(max_size=1), []

    class Writer(Waiter):
        def wake(self, waiter):
            super().wake(waiter)
            if self.woken == 1:
                stream.put("b")  # in the slot of the value that is read
                raise KeyboardInterrupt

    writer = Writer()
    with stream.listen() as values:
        for _ in range(3):
            writer.woken = 0
            stream.put("a")
            state_of(stream).writers.waiting[writer] = writer
            with pytest.raises(KeyboardInterrupt):
                read(stream, values, got)
            for _ in range(2):
                assert not stream.try_put("too much")
                read(stream, values, got)
            assert got == ["a", "b"]
            got.clear()
            assert stream.try_put("c")
            assert not stream.try_put("too much")
            read(stream, values, got)
            got.clear()


@pytest.mark.parametrize("how", ["anext", "aget"])
def test_stream_works_after_an_interrupted_waiting_task(how):
    async def read(stream, values):
        return await (anext(values) if how == "anext" else stream.aget())

    for interrupt in interrupts(*MODULES):
        stream, loop = ValueStream(), asyncio.new_event_loop()
        values = aiter(stream)
        task = loop.create_task(read(stream, values))
        with running(lambda: stream.put("a")):
            with interrupt:
                loop.run_until_complete(task)
            if not task.done():
                loop.run_until_complete(asyncio.wait([task]))
        failed = task.exception() is not None
        assert len(stream) == failed
        loop.close()
        stream.close()
        assert list(values) == ["a"] * failed
        assert waiting(stream) == (0, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("end", ["close", "stop_listening", "drop", "block"])
def test_an_interrupted_end_wakes_all_or_can_be_repeated(end):
    ended = 0
    for interrupt in interrupts(*MODULES):
        stream, reader, writer = ValueStream(max_size=1), Waiter(), Waiter()
        stream.put(1)
        listeners = [iter(stream)]
        state_of(stream).readers.waiting[reader] = reader
        state_of(stream).writers.waiting[writer] = writer
        with interrupt:
            if end == "drop":
                listeners.clear()
            elif end == "block":
                with listeners[0]:
                    pass
            else:
                getattr(stream, end)()
        if stream.listening and not stream.closed:
            continue  # interrupted before it changed anything
        ended += 1
        until(lambda: reader.woken and writer.woken)
    assert ended


# Another thread, a signal handler or a finaliser may run between any two steps.


@pytest.mark.parametrize("second", ["put", "put_many", "read", "get", "close", "stop_listening"])
@pytest.mark.parametrize("first", ["put", "put_many", "read", "get"])
@pytest.mark.parametrize("max_size", [None, 4])
def test_interleaved_operations_read_or_refuse_each_value_once(max_size, first, second):
    for interrupt in interrupts(*MODULES, do=lambda: act(second, "d")):
        stream, accepted, got = ValueStream(max_size=max_size), ["a", "b"], []
        values = iter(stream)
        stream.put_many(["a", "b"])

        def act(kind, value, stream=stream, accepted=accepted, got=got, values=values):
            with contextlib.suppress(StreamClosedError, StopIteration):
                if kind == "put":
                    stream.put(value)
                    accepted.append(value)
                elif kind == "put_many":
                    stream.put_many([value])
                    accepted.append(value)
                elif kind == "read":
                    got.append(next(values))
                elif kind == "get":
                    got.append(stream.get(timeout=PATIENCE))
                else:
                    getattr(stream, kind)()

        with interrupt:
            act(first, "c")
        got += [next(values) for _ in range(len(stream))]
        if second == "stop_listening":
            assert set(got) <= set(accepted)
        else:
            assert sorted(got) == sorted(accepted)
            assert max_size is None or stream.closed or room_in(stream) == max_size
        assert len(set(got)) == len(got)


@pytest.mark.parametrize("end", ["close", "stop_listening"])
@pytest.mark.parametrize("max_size", [None, 4])
@pytest.mark.parametrize("many", [False, True], ids=["put", "put_many"])
def test_value_put_too_late_is_refused(many, max_size, end):
    def do():
        getattr(stream, end)()
        got.extend(stream if end == "close" else ())

    refusals = 0
    for interrupt in interrupts(*MODULES, at="instructions", do=do):
        stream, got, refused = ValueStream(max_size=max_size), [], []
        with interrupt:
            try:
                stream.put_many([1]) if many else stream.put(1)
            except StreamClosedError:
                refused.append(1)
        if interrupt.where is not None:
            assert len(stream) == 0, interrupt
            assert end == "stop_listening" or got + refused == [1], interrupt
        refusals += len(refused)
    assert refusals


def test_finaliser_can_put_and_close():
    stream = ValueStream()

    class Dropped:
        def __del__(self):
            with contextlib.suppress(StreamClosedError):
                stream.put("last words")
            stream.close()

    stream.put(Dropped())
    assert [kind.__name__ for kind in map(type, stream)] == ["Dropped", "str"]
    stream = ValueStream()
    stream.put(Dropped())
    stream.stop_listening()
    assert stream.closed
    assert not stream.listening


def test_ctrl_c_interrupts_a_blocked_put_and_a_read(ctrl_c):
    stream = ValueStream(max_size=1)

    def interrupt(whose):
        until(lambda: waiting(stream) == whose)
        ctrl_c()

    with running(lambda: interrupt((1, 0))), pytest.raises(KeyboardInterrupt):
        next(iter(values := iter(stream)))
    with running(lambda: interrupt((1, 0))), pytest.raises(KeyboardInterrupt):
        stream.get(timeout=PATIENCE)
    stream.put(1)
    with running(lambda: interrupt((0, 1))), pytest.raises(KeyboardInterrupt):
        stream.put(2)
    assert next(values) == 1
    assert waiting(stream) == (0, 0)


# -------------------------------------------------------------------------- memory


@on_every_loop
async def test_reads_that_time_out_keep_memory_flat():
    stream = ValueStream()
    values = aiter(stream)

    async def time_out(n):
        for _ in range(n):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await anext(values)

    await time_out(100)
    with Growth() as growth:
        await time_out(2_000)
    assert waiting(stream) == (0, 0)
    assert growth.bytes < 20_000


def test_values_that_pass_through_keep_memory_flat():
    stream = ValueStream(max_size=10)
    values = iter(stream)

    def rounds(n):
        for _ in range(n):
            stream.put_many(range(1000, 1010))
            for _ in range(10):
                next(values)

    rounds(100)
    with Growth() as growth:
        rounds(1000)
    assert growth.bytes < 20_000


def test_stream_of_an_abandoned_waiting_task_is_collected():
    stream = ValueStream()

    async def main(stream):
        stream_of_task = asyncio.ensure_future(read_all(stream))
        await asyncio.sleep(0)
        stream_of_task._log_destroy_pending = False

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main(stream))
    loop.close()
    ref = weakref.ref(stream)
    del stream
    gc.collect()
    assert ref() is None


def test_a_value_that_was_read_is_not_kept(no_collector):
    class Thing:
        pass

    stream = ValueStream()
    stream.put(Thing())
    values = iter(stream)
    thing = next(values)
    ref = weakref.ref(thing)
    del thing
    assert ref() is None


# -------------------------------------------------------------------------- devices


@on_every_loop
@pytest.mark.device
@pytest.mark.parametrize("how", ["anext", "aget"])
async def test_task_reads_a_value_when_its_kernels_are_done(accelerator, producer, how):
    stream = ValueStream()
    values = aiter(stream)
    reader = Reader(anext(values) if how == "anext" else stream.aget())
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await anyio.wait_all_tasks_blocked()
        with producer:
            stream.put(being_filled(accelerator, FIRST))
        stream.put("behind it")
        await polled()
        assert reader.outcome is None
        accelerator.wake()
    assert reader.outcome.tolist() == NEW
    assert await stream.aget() == "behind it"


@on_every_loop
@pytest.mark.device
async def test_cancelled_read_of_a_running_kernel_leaves_the_value(accelerator, producer):
    stream = ValueStream(max_size=1)
    values = aiter(stream)
    with producer:
        stream.put(being_filled(accelerator, FIRST))
    for read in (values.__anext__, stream.aget):
        with anyio.move_on_after(0.01) as scope:
            await read()
        assert scope.cancelled_caught
        assert len(stream) == 1
    accelerator.wake()
    assert (await stream.aget()).tolist() == NEW


@pytest.mark.device
@pytest.mark.parametrize("how", ["next", "get"])
def test_read_in_a_thread_orders_its_streams_after_the_kernels(
    accelerator, producer, consumer, how
):
    stream = ValueStream()
    with producer:
        stream.put_many([{"row": being_filled(accelerator, FIRST)}])
    with consumer:
        value = next(iter(stream)) if how == "next" else stream.get()
        host = read_on_current_stream(value["row"])
    accelerator.wake()
    consumer.synchronize()
    assert host.tolist() == NEW


@on_every_loop
@simulated_only
@pytest.mark.device
@pytest.mark.parametrize("how", ["anext", "aget"])
async def test_value_with_a_failed_kernel_raises_in_its_turn(accelerator, producer, how):
    stream = ValueStream(max_size=5)
    values = aiter(stream)
    with producer:
        stream.put(being_filled(accelerator, FIRST))
        accelerator.fail("the kernel failed")
        stream.put(being_filled(accelerator, FIRST))
    stream.put("behind")
    reader = Reader(anext(values))
    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        await polled()
        accelerator.wake()
    assert reader.outcome.tolist() == NEW
    with pytest.raises(RuntimeError, match="the kernel failed"):
        await (anext(values) if how == "anext" else stream.aget())
    assert await anext(values) == "behind"
    assert room_in(stream) == 5


# -------------------------------------------------------------------------- the rest


def test_callback_of_a_future_can_put_to_a_stream():
    stream, fut = ValueStream(), Future()
    fut.add_done_callback(lambda fut: stream.put(fut.value()))
    values = iter(stream)
    fut.set_result(5)
    assert next(values) == 5


def test_put_many_accepts_the_rows_of_a_tensor():
    stream = ValueStream()
    stream.put_many(torch.eye(2))
    stream.close()
    assert [row.tolist() for row in stream] == [[1, 0], [0, 1]]


def test_deferred_callbacks_run_before_a_thread_blocks():
    stream, last = ValueStream(), Future()
    fut = last
    for _ in range(100):
        fut = fut.then(lambda parent: parent.value())
    fut.add_done_callback(lambda fut: stream.put(fut.value()))
    got = []

    def read(_):
        got.append(next(iter(stream)))

    chain = last
    for _ in range(40):
        chain = chain.then(lambda parent: parent.value())
    chain.add_done_callback(read)
    with running(lambda: last.set_result(5)):
        pass
    assert got == [5]


# -------------------------------------------------------------------- copies and pickling


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_stream_cannot_be_copied_or_pickled(copied):
    stream = ValueStream(max_size=3)
    values = iter(stream)
    stream.put(1)
    with pytest.raises(TypeError, match=r"belongs to this process.*multiprocessing\.Queue"):
        copied(stream)
    with pytest.raises(TypeError, match=r"belongs to this process.*stream\.listen\(\)"):
        copied(values)
    gc.collect()
    assert stream.listening
    stream.put(2)
    assert [next(values), next(values)] == [1, 2]


def test_asdict_refuses_a_dataclass_with_a_stream():
    @dataclasses.dataclass
    class Request:
        prompt: str
        tokens: ValueStream

    with pytest.raises(TypeError, match="belongs to this process"):
        dataclasses.asdict(Request("hello", ValueStream()))


def test_stream_cannot_be_passed_to_another_process():
    stream = ValueStream()
    process = multiprocessing.get_context("spawn").Process(target=print, args=(stream,))
    with pytest.raises(TypeError, match="belongs to this process"):
        process.start()
    stream.put(1)
    assert next(iter(stream)) == 1


# ----------------------------------------------------------------------- put_many's argument


@pytest.mark.parametrize(
    "values",
    [{"a": 1}, {1, 2}, "ab", b"ab", iter([1]), (n for n in [1]), {"a": 1}.values(), 5, None],
    ids=lambda values: type(values).__name__,
)
def test_put_many_refuses_non_sequences(values):
    stream = ValueStream()
    with pytest.raises(TypeError, match=r"put_many\(\) takes a list, not"):
        stream.put_many(values)
    with pytest.raises(TypeError, match="no dimensions"):
        stream.put_many(torch.tensor(1))
    assert len(stream) == 0
    stream.put_many(())
    stream.put_many(deque([1, 2]))
    assert len(stream) == 2


def test_rows_of_a_tensor_share_its_storage():
    stream, tensor = ValueStream(), torch.zeros(2, 3)
    stream.put_many(tensor)
    tensor.fill_(1)
    assert next(iter(stream)).tolist() == [1, 1, 1]

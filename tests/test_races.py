"""Two threads that run one step each at the same moment, thousands of times.

Without a GIL the two steps really overlap, which shows steps that are not atomic. With a GIL they
run in either order.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import suppress

import anyio.lowlevel
import pytest

from torchfut_aio import (
    Batcher,
    Future,
    InvalidStateError,
    QueueFullError,
    StreamClosedError,
    ValueStream,
    as_completed,
    with_timeout,
)
from torchfut_aio._core import Promise
from torchfut_aio._cpython import Queue
from torchfut_aio._waiters import first

from .loops import on_every_loop
from .threads import PATIENCE, alongside, has_gil, running

RACES = 1_000 if has_gil else 4_000


def race(first, second, races=RACES):
    """Call ``first(n)`` and ``second(n)`` at the same moment, for each n, in two threads."""
    at = [-1, -1]

    def runner(own, step):
        def run():
            try:
                for n in range(races):
                    at[own] = n
                    spins = 0
                    while at[1 - own] < n:
                        spins += 1
                        if spins % 1000 == 0:
                            time.sleep(0)  # the other thread needs this core, or the GIL
                    step(n)
            finally:
                at[own] = races  # if this thread has failed, the other must not wait for it

        return run

    with running(runner(0, first), runner(1, second)):
        pass


# ----------------------------------------------------------------------------- futures


def test_one_of_two_racing_setters_wins():
    futures = [Future() for _ in range(RACES)]
    won = [[], []]

    def setter(own):
        def set_result(n):
            try:
                futures[n].set_result((own, n))
            except InvalidStateError:
                return
            won[own].append(n)

        return set_result

    race(setter(0), setter(1))
    assert sorted(won[0] + won[1]) == list(range(RACES))
    assert all(futures[n].value() == (own, n) for own in (0, 1) for n in won[own])


# A future without callbacks, and one with some.
alone_or_not = pytest.mark.parametrize("others", [0, 2], ids=["alone", "behind others"])


def futures_with(others):
    futures = [Future() for _ in range(RACES)]
    for fut in futures:
        for _ in range(others):
            fut.add_done_callback(lambda _: None)
    return futures


@alone_or_not
def test_callbacks_added_by_two_threads_both_run(others):
    futures, ran = futures_with(others), Counter()
    race(
        lambda n: futures[n].add_done_callback(lambda _: ran.update([("first", n)])),
        lambda n: futures[n].add_done_callback(lambda _: ran.update([("second", n)])),
    )
    for fut in futures:
        fut.set_result(None)
    assert len(ran) == 2 * RACES
    assert set(ran.values()) == {1}


@alone_or_not
def test_a_callback_added_during_a_completion_runs_once(others):
    futures, ran = futures_with(others), [[] for _ in range(RACES)]
    race(
        lambda n: futures[n].add_done_callback(ran[n].append),
        lambda n: futures[n].set_result(n),
    )
    assert [len(calls) for calls in ran] == [1] * RACES


@alone_or_not
def test_racing_callback_is_either_removed_or_run(others):
    futures, ran = futures_with(others), [[] for _ in range(RACES)]
    removed = [0] * RACES
    for fut, calls in zip(futures, ran):
        fut.add_done_callback(calls.append)

    def remove(n):
        removed[n] = futures[n].remove_done_callback(ran[n].append)

    race(remove, lambda n: futures[n].set_result(n))
    assert [number + len(calls) for number, calls in zip(removed, ran)] == [1] * RACES


def test_thread_starting_to_wait_gets_the_value():
    futures, got = futures_with(0), [None] * RACES

    def wait(n):
        got[n] = futures[n].wait(PATIENCE)

    race(wait, lambda n: futures[n].set_result(n))
    assert got == list(range(RACES))


def test_two_threads_share_an_as_completed():
    futures = [Future() for _ in range(RACES)]
    shared, taken = as_completed(futures), [[], []]

    def complete_and_take(n):
        futures[2 * n].set_result(None)
        futures[2 * n + 1].set_result(None)
        taken[1].append(next(shared))

    race(lambda n: taken[0].append(next(shared)), complete_and_take, RACES // 2)
    assert Counter(map(id, taken[0] + taken[1])) == Counter(map(id, futures))


def test_has_waiters_can_be_called_while_callbacks_change():
    fut, over = Future(), threading.Event()
    fut.add_done_callback(print)  # keeps the answer constant

    def add_and_remove():
        try:
            for _ in range(RACES):
                fut.add_done_callback(len)
                fut.remove_done_callback(len)
        finally:
            over.set()

    answers = set()
    with running(add_and_remove):
        while not over.is_set():
            answers.add(fut.has_waiters())
    assert answers <= {True}
    assert fut.remove_done_callback(print) == 1


def test_promise_kept_and_failed_at_once_has_one_outcome():
    futures = [Future() for _ in range(RACES)]
    promises = [Promise(fut, "raced") for fut in futures]
    late = TimeoutError()
    race(lambda n: promises[n].keep(n), lambda n: promises[n].fail(late))
    assert all(fut.exception() is late or fut.value() == n for n, fut in enumerate(futures))


@on_every_loop
async def test_completion_at_the_deadline_has_one_outcome():
    futures = [Future() for _ in range(500)]
    limited = [with_timeout(fut, n / 50_000) for n, fut in enumerate(futures)]

    def complete():
        for n, fut in enumerate(futures):
            fut.set_result(n)

    outcomes = Counter()

    async def take(n):
        try:
            assert await limited[n] == n
            outcomes["value"] += 1
        except TimeoutError:
            outcomes["timeout"] += 1

    with anyio.fail_after(PATIENCE):
        async with alongside(complete), anyio.create_task_group() as group:
            for n in range(len(futures)):
                group.start_soon(take, n)
    assert outcomes.total() == len(futures)


@on_every_loop
async def test_a_loop_about_to_sleep_is_woken():
    # One future at a time, so the loop has nothing else to do when the thread completes it.
    work = [Future() for _ in range(2_000)]
    awaited = threading.Semaphore(0)

    def complete():
        for n, fut in enumerate(work):
            assert awaited.acquire(timeout=PATIENCE)
            fut.set_result(n)

    async with alongside(complete):
        with anyio.fail_after(PATIENCE):
            for n, fut in enumerate(work):
                awaited.release()
                assert await fut == n


# ------------------------------------------------------------------- streams and batchers

PUTS = 1_000


@on_every_loop
async def test_bursts_of_three_threads_lose_no_waiter(nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()  # threads are started and joined below
    for _ in range(RACES // 20):
        futures = [Future() for _ in range(60)]

        def complete(part, futures=futures):
            for fut in futures[part::3]:
                fut.set_result(1)

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                for fut in futures:
                    group.start_soon(value_of, fut)
                await anyio.lowlevel.checkpoint()
                threads = [threading.Thread(target=complete, args=(part,)) for part in range(3)]
                for thread in threads:
                    thread.start()
        for thread in threads:
            thread.join()


async def value_of(fut):
    return await fut


def test_each_key_of_a_queue_is_taken_once_and_in_order():
    for _ in range(RACES // 200):
        queue, taken = Queue(), [[], [], []]

        def insert(queue=queue):
            for n in range(1000):
                queue[n] = None
            queue[None] = None  # the end

        def take(taken, queue=queue):
            while True:
                ended = None in queue
                if (key := first(queue)) is None:
                    if ended:
                        return
                    continue
                try:
                    del queue[key]
                except KeyError:  # another thread has taken it
                    continue
                taken.append(key)

        with running(insert, *(lambda each=each: take(each) for each in taken)):
            pass
        assert all(each == sorted(each) for each in taken)
        assert sorted(n for each in taken for n in each) == [*range(1000)]


def four_producers(stream):
    producers = [lambda k=k: [stream.put((k, n)) for n in range(PUTS)] for k in range(4)]
    left = [None] * 3

    def closing(produce):
        def run():
            produce()
            try:
                left.pop()
            except IndexError:  # the last of the four
                stream.close()

        return run

    return [closing(produce) for produce in producers]


def check_read(read):
    for k in range(4):
        assert [n for producer, n in read if producer == k] == list(range(PUTS))


# Without a limit, and with a limit that makes the threads wait.
max_sizes = pytest.mark.parametrize("max_size", [None, 3])


@on_every_loop
@max_sizes
async def test_task_reads_values_of_four_threads_once_in_order(max_size):
    stream = ValueStream(max_size=max_size)
    async with alongside(*four_producers(stream)):
        with anyio.fail_after(PATIENCE):
            check_read([value async for value in stream])


@max_sizes
def test_thread_reads_values_of_four_threads_once(max_size):
    stream, read = ValueStream(max_size=max_size), []
    with running(lambda: read.extend(stream), *four_producers(stream)):
        pass
    check_read(read)


@max_sizes
def test_two_threads_share_the_values_of_four_threads(max_size):
    stream, read = ValueStream(max_size=max_size), [[], []]
    readers = [iter(stream), iter(stream)]  # both exist before the first value
    with running(
        lambda: read[0].extend(readers[0]),
        lambda: read[1].extend(readers[1]),
        *four_producers(stream),
    ):
        pass
    assert Counter(read[0] + read[1]) == Counter((k, n) for k in range(4) for n in range(PUTS))


@max_sizes
def test_get_and_iteration_share_the_values_of_four_threads(max_size):
    stream, read = ValueStream(max_size=max_size), [[], []]

    def get():
        with suppress(StreamClosedError):
            while True:
                read[0].append(stream.get(timeout=PATIENCE))

    with running(get, lambda: read[1].extend(stream), *four_producers(stream)):
        pass
    assert Counter(read[0] + read[1]) == Counter((k, n) for k in range(4) for n in range(PUTS))


def test_stream_never_exceeds_its_limit():
    stream, accepted, sizes, read = ValueStream(max_size=2), [0, 0], set(), []

    def putter(own):
        def put(n):
            accepted[own] += stream.try_put(n)

        return put

    values = iter(stream)

    def read_all():
        for value in values:
            read.append(value)
            sizes.add(len(stream))

    with running(read_all):
        race(putter(0), putter(1))
        stream.close()
    assert len(read) == sum(accepted)
    assert max(sizes) <= 2


def test_a_value_is_read_or_refused_when_a_stream_closes():
    streams = [ValueStream() for _ in range(RACES)]
    refused = [False] * RACES

    def put(n):
        try:
            streams[n].put(n)
        except StreamClosedError:
            refused[n] = True

    race(put, lambda n: streams[n].close())
    for n, stream in enumerate(streams):
        assert [*stream] == ([] if refused[n] else [n])


def test_refused_items_of_all_threads_are_counted():
    release, counts = threading.Event(), [0] * 4

    def function(items):
        release.wait(PATIENCE)
        return items

    with Batcher(function, max_batch_size=1, max_queue_size=1) as batcher:

        def submitter(own):
            def submit():
                for _ in range(RACES):
                    try:
                        batcher.submit(None)
                    except QueueFullError:
                        counts[own] += 1

            return submit

        with running(*(submitter(own) for own in range(4))):
            pass
        assert batcher.statistics().rejected == sum(counts)
        release.set()

"""The hot paths in C do what their Python functions do, lose no reference, and survive hostility.

All other tests run on C too, if it was built: `TORCHFUT_AIO_NO_EXTENSIONS=1` runs them on Python.
"""

from __future__ import annotations

import asyncio
import collections
import copy
import gc
import importlib.util
import inspect
import os
import pickle
import sys
import weakref
from contextlib import suppress
from functools import partial
from unittest import mock

import pytest
import torch
import uvloop

import torchfut_aio
from torchfut_aio import Future, StreamClosedError, ValueStream, _core, _extension, _loops, debug
from torchfut_aio import set_results as set_many
from torchfut_aio._cpython import resume_callback
from torchfut_aio._loops._asyncio import AsyncioLoop
from torchfut_aio._loops._loop import BURST, current
from torchfut_aio._waiters import Waiters
from torchfut_aio.serving._stream import state_of

from . import forks
from .explorer import interrupts
from .loops import on_asyncio
from .threads import PATIENCE, alongside, has_gil

IS_BUILT = importlib.util.find_spec("torchfut_aio._speedups") is not None
IS_KNOWN = (
    has_gil and sys.implementation.name == "cpython" and (3, 11) <= sys.version_info < (3, 15)
)
IS_OFF = bool(os.environ.get("TORCHFUT_AIO_NO_EXTENSIONS"))

needs_extension = pytest.mark.skipif(
    IS_OFF or not IS_KNOWN or not (IS_BUILT or os.environ.get("CI")),
    reason="needs the C extension",
)


@pytest.fixture(params=["Python", pytest.param("C", marks=needs_extension)])
def implementation(request):
    before = _extension.use_extension(request.param == "C")
    yield request.param
    _extension.use_extension(before)


def test_extension_is_used_unless_it_is_off():
    if IS_OFF or not IS_KNOWN:
        assert not debug.uses_extension()
    elif IS_BUILT or os.environ.get("CI"):
        assert debug.uses_extension(), "build it: pip install -e ."


def test_environment_variable_turns_the_extension_off():
    program = """
        import os
        os.environ["TORCHFUT_AIO_NO_EXTENSIONS"] = "1"
        import torchfut_aio.debug, types
        print(torchfut_aio.debug.uses_extension(), type(torchfut_aio.Future.set_result).__name__)
    """
    assert forks.output(program) == "False function\n"


# ------------------------------------------------------------------------ functions in C


@needs_extension
def test_function_in_c_looks_like_its_python_function():
    function = Future.set_result
    python = inspect.unwrap(function)
    assert type(python).__name__ == "function"
    assert inspect.signature(function) == inspect.signature(python)
    assert [*inspect.signature(Future().set_result).parameters] == ["result"]
    assert function.__doc__ == python.__doc__
    assert function.__qualname__ == "Future.set_result"
    assert "in C" in repr(function)
    with pytest.raises(AttributeError):
        function.nothing  # noqa: B018


@needs_extension
def test_function_in_c_is_copied_and_pickled_by_its_name():
    put = ValueStream.put
    assert pickle.loads(pickle.dumps(put)) is put
    assert copy.deepcopy([put])[0] is put


@needs_extension
def test_weak_references_to_a_method_in_c_work():
    stream = ValueStream()
    method = weakref.WeakMethod(stream.put)
    method()(5)
    assert stream.get() == 5


@needs_extension
def test_mock_of_a_method_in_c_checks_its_arguments():
    stream = mock.create_autospec(ValueStream, instance=True)
    stream.put(1)
    with pytest.raises(TypeError):
        stream.put(1, 2)
    with mock.patch.object(ValueStream, "put", autospec=True) as put:
        real = ValueStream()
        real.put(3)
    put.assert_called_once_with(real, 3)


def test_arguments_may_be_given_by_name(implementation):
    fut, stream = Future(), ValueStream()
    fut.set_result(result=5)
    stream.put(value=6)
    stream.put_many(values=[7])
    assert (fut.wait(), stream.get(), stream.get()) == (5, 6, 7)


@pytest.mark.parametrize("arguments", [(), (1, 2)])
def test_wrong_number_of_arguments_is_a_type_error(implementation, arguments):
    for call in (Future().set_result, ValueStream().put, ValueStream().put_many):
        with pytest.raises(TypeError):
            call(*arguments)


def test_other_objects_are_refused_as_self(implementation):
    for call in (Future.set_result, ValueStream.put):
        with pytest.raises((AttributeError, TypeError)):
            call(object(), 1)


def test_future_whose_constructor_did_not_run_is_refused(implementation):
    fut, stream = Future.__new__(Future), ValueStream.__new__(ValueStream)
    for call in (
        lambda: fut.set_result(1),
        lambda: fut.__await__().send(None),
        lambda: stream.put(1),
        lambda: stream.put_many([1]),
    ):
        with pytest.raises((AttributeError, RuntimeError, TypeError)):
            call()


@needs_extension
def test_unknown_function_has_no_counterpart_in_c():
    from torchfut_aio import _speedups

    with pytest.raises(ValueError, match="there is no"):
        _speedups.Speedup(pickle.dumps)


# ----------------------------------------------------- an await, driven by hand, step by step


async def steps_of(new, steps):
    """Return what each step of an awaitable's iterator yields, returns or raises."""
    seen = []
    iterator = new().__await__()
    for step in steps:
        try:
            seen.append(type(step(iterator)).__name__)
        except StopIteration as stop:
            seen.append(("returned", stop.value))
        except BaseException as error:
            seen.append(repr(error))
    return seen


def throws(error):
    return lambda iterator: iterator.throw(error)


def sends(value):
    return lambda iterator: iterator.send(value)


def closes(iterator):
    return iterator.close()


# From Python 3.12 on, a generator that has not begun does not convert it.
EARLY_STOP = [[throws(StopIteration(7)), throws(StopIteration(7))]] * (sys.version_info < (3, 12))


@on_asyncio
@pytest.mark.parametrize(
    "steps",
    [
        [next, sends(None)],
        [next, sends(3)],
        [next, throws(KeyError("thrown")), next, closes],
        [next, throws(KeyError), next],
        [next, throws(GeneratorExit), next],
        [next, closes, closes, next],
        [closes, next],
        [throws(KeyError("early")), next],
        [throws(asyncio.CancelledError()), closes],
        *EARLY_STOP,
    ],
)
async def test_await_in_c_steps_as_in_python(steps):
    seen = []
    for in_c in (False, True):
        before = _extension.use_extension(in_c)
        try:
            fut = Future()
            seen.append(await steps_of(lambda fut=fut: fut, steps))
            assert not fut.has_waiters(), steps
        finally:
            _extension.use_extension(before)
    assert seen[0] == seen[1]


@on_asyncio
async def test_dropped_await_leaves_no_waiter(implementation):
    fut = Future()
    iterator = fut.__await__()
    next(iterator)
    assert fut.has_waiters()
    del iterator
    assert not fut.has_waiters()


@on_asyncio
async def test_dropped_read_of_a_stream_leaves_no_waiter(implementation, collected):
    values = ValueStream().listen()
    read = anext(values)
    read.send(None)
    del read
    collected()
    assert not any(isinstance(each, debug.PendingStream) for each in debug.pending_futures())


@on_asyncio
async def test_pending_read_does_not_keep_its_iterator_listening(implementation):
    stream = ValueStream()
    iterator = aiter(stream)
    read = anext(iterator)
    task = asyncio.ensure_future(read)
    await asyncio.sleep(0)
    del iterator, read
    assert not stream.listening
    with pytest.raises(StopAsyncIteration):
        await task


@on_asyncio
async def test_read_of_a_stream_runs_as_a_task(implementation):
    stream = ValueStream()
    values = stream.listen()
    task = asyncio.create_task(anext(values))
    await asyncio.sleep(0)
    stream.put(5)
    assert await task == 5


@on_asyncio
async def test_finished_read_cannot_be_awaited_again(implementation):
    stream = ValueStream()
    stream.put(5)
    values = stream.listen()
    read = anext(values)
    assert await read == 5
    with pytest.raises(RuntimeError, match="cannot reuse already awaited"):
        await read
    with pytest.raises(RuntimeError, match="cannot reuse already awaited"):
        read.throw(KeyError)
    read.close()


@on_asyncio
async def test_read_has_the_name_of_its_function(implementation):
    read = anext(ValueStream().listen())
    assert (read.__name__, read.__qualname__) == ("__anext__", "_Reader.__anext__")
    read.close()


@on_asyncio
async def test_read_that_is_never_awaited_warns(implementation, collected):
    values = ValueStream().listen()
    with pytest.warns(RuntimeWarning, match="'_Reader.__anext__' was never awaited"):
        anext(values)
    collected()


@on_asyncio
async def test_cycle_through_a_pending_await_is_collected(implementation, collected):
    class Cycle:
        pass

    cycle, fut, freed = Cycle(), Future(), []
    cycle.iterator = fut.__await__()
    next(cycle.iterator)
    fut.add_done_callback(lambda _, cycle=cycle: None)
    cycle.end = type("End", (), {"__del__": lambda _: freed.append(1)})()
    del cycle, fut
    collected()
    assert freed == [1]


@on_asyncio
async def test_await_cannot_be_stepped_within_its_own_step(implementation):
    fut, errors = Future(), []
    iterator = fut.__await__()

    class Waiter:
        def __iter__(self):
            try:
                iterator.send(None)
            except BaseException as error:
                errors.append(type(error))
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsyncioLoop, "before_wait", lambda _: None)
        patch.setattr(AsyncioLoop, "waiter", lambda _: Waiter())
        next(iterator)
    assert errors == [ValueError]
    iterator.close()


@on_asyncio
async def test_read_cannot_be_closed_within_its_own_end(implementation, monkeypatch):
    values, errors = ValueStream().listen(), []
    reads = [anext(values), anext(values)]  # two, as one alone is in no line
    for read in reads:
        read.send(None)

    def leave_line(self, waiter, waker):
        try:
            reads[1].close()
        except BaseException as error:
            errors.append(type(error))

    monkeypatch.setattr(Waiters, "leave_line", leave_line)
    with pytest.raises(KeyError):
        reads[1].throw(KeyError("thrown"))
    assert errors == [ValueError]
    reads[0].close()


@pytest.mark.parametrize("error", [KeyError, ValueError])
def test_error_of_storing_the_waiter_is_raised(implementation, error):
    class Waiter(asyncio.Future):
        is_stored = False

        def __hash__(self):
            if not self.is_stored:
                self.is_stored = True
                raise error("hash")
            return id(self)

    class Loop(asyncio.SelectorEventLoop):
        def create_future(self):
            return Waiter(loop=self)

    async def main():
        with pytest.raises(error, match="hash"):
            await Future()

    loop = Loop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


# ------------------------------------------------------------------------------ order


def test_first_of_two_outcomes_of_one_future_counts(implementation):
    fut = Future()
    assert set_many([fut, fut], [ValueError("first"), 2]) == [fut]
    with pytest.raises(ValueError, match="first"):
        fut.value()


@on_asyncio
async def test_tasks_resume_in_the_order_of_their_futures(implementation):
    futures, order = [Future() for _ in range(4)], []
    futures[1].add_done_callback(lambda _: None)  # C leaves it to Python

    async def wait(n):
        with suppress(ValueError):
            await futures[n]
        order.append(n)

    tasks = [asyncio.ensure_future(wait(n)) for n in range(4)]
    await asyncio.sleep(0)
    async with alongside(lambda: set_many(futures, [0, 1, ValueError("foo"), 3])):
        pass
    await asyncio.wait(tasks)
    assert order == [0, 1, 2, 3]


@on_asyncio
async def test_wake_up_interrupted_within_a_step_loses_no_task(implementation):
    futures, loop = [Future() for _ in range(3)], current()

    async def interfere():
        await futures[0]
        # What an interrupt leaves of a wake-up in a loop that a task runs within its step.
        loop._taken = resume_callback(loop.queue[0])  # noqa: SLF001
        loop.queue[0].remove_done_callback(loop._taken[0])  # noqa: SLF001

    tasks = [
        asyncio.ensure_future(interfere()),
        *map(asyncio.ensure_future, map(value_of, futures)),
    ]
    await asyncio.sleep(0)
    async with alongside(lambda: set_many(futures, [0, 1, 2])):
        pass
    assert await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE) == [None, 0, 1, 2]


@on_asyncio
async def test_wake_up_that_cannot_be_scheduled_is_not_pending(implementation, monkeypatch):
    @property
    def fails(self):
        raise MemoryError

    loop = current()
    loop.wake_up = BURST
    with monkeypatch.context() as patch:
        patch.setattr(AsyncioLoop, "_wake_up_lost", fails)
        with pytest.raises(MemoryError):
            loop.schedule_wake_up()
    assert loop.wake_up is None


def test_error_of_scheduling_a_wake_up_is_raised(implementation):
    class Loop(asyncio.SelectorEventLoop):
        error = None

        def call_soon_threadsafe(self, *args, **kwargs):
            error, self.error = self.error, None
            if error is not None:  # as of a signal handler
                raise error
            return super().call_soon_threadsafe(*args, **kwargs)

    fut, loop = Future(), Loop()

    def complete():
        loop.error = RuntimeError("handler")
        with pytest.raises(RuntimeError, match="handler"):
            fut.set_result(1)

    try:
        assert loop.run_until_complete(values_of([fut], complete)) == [1]
    finally:
        loop.close()


# -------------------------------------------------------------------------- interrupts


async def value_of(awaitable):
    return await awaitable


async def values_of(futures, complete):
    """Return the values of futures that a thread completes while tasks wait for them."""
    tasks = [asyncio.ensure_future(value_of(fut)) for fut in futures]
    await asyncio.sleep(0)
    async with alongside(complete):
        pass
    return await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)


@needs_extension
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("waiters", [1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_completion_in_c_loses_no_waiter(many, waiters, error):
    for interrupt in interrupts(torchfut_aio, asyncio, error=error, in_c=True):
        futures = [Future() for _ in range(3)]

        def complete(futures=futures, interrupt=interrupt):
            with interrupt:
                if many:
                    set_many(futures, [0, 1, 2])
                else:
                    for n, fut in enumerate(futures):
                        fut.set_result(n)
            for n, fut in enumerate(futures):
                fut.try_set_result(n)

        got = asyncio.run(values_of(futures * waiters, complete))
        assert got == [0, 1, 2] * waiters, interrupt


@needs_extension
def test_interrupted_put_in_c_loses_no_value():
    for interrupt in interrupts(torchfut_aio, asyncio, in_c=True):
        stream, got = ValueStream(), []

        async def read(stream=stream, got=got):
            async for value in stream:
                got.append(value)

        async def main(stream=stream, read=read, interrupt=interrupt):
            readers = [asyncio.ensure_future(read()) for _ in range(2)]
            await asyncio.sleep(0)

            def produce():
                with interrupt:
                    stream.put(1)
                    stream.put_many([2, 3])
                stream.close()

            async with alongside(produce):
                pass
            await asyncio.wait_for(asyncio.gather(*readers), PATIENCE)

        asyncio.run(main())
        # A value after the interrupt was not put.
        assert sorted(got) in ([], [1], [1, 2, 3]), interrupt
        assert interrupt.raised or len(got) == 3


@needs_extension
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_interrupted_wait_in_c_leaves_nothing(new_loop):
    for interrupt in interrupts(torchfut_aio, asyncio, in_c=True):
        fut, stream = Future(), ValueStream()

        async def main(fut=fut, stream=stream, interrupt=interrupt):
            values = stream.listen()
            current().renew_wake_up()  # known from here on
            with interrupt:
                for begin in (fut.__await__, values.__anext__):
                    each = begin()
                    each.send(None)
                    with suppress(asyncio.CancelledError):
                        each.throw(asyncio.CancelledError())
            assert not fut.has_waiters()

        loop = new_loop()
        try:
            with suppress(KeyboardInterrupt):
                loop.run_until_complete(main())
        finally:
            loop.close()


@needs_extension
def test_interrupted_read_that_python_continues_wakes_another():
    for interrupt in interrupts(torchfut_aio, in_c=True):
        stream = ValueStream()
        # C leaves to Python what is no plain value.
        outcomes = [_core.outcome_of_error(KeyError("foo")) for _ in range(2)]

        async def main(stream=stream, outcomes=outcomes, interrupt=interrupt):
            values = stream.listen()
            first, second = anext(values), asyncio.ensure_future(anext(values))
            first.send(None)
            await asyncio.sleep(0)
            state_of(stream).put(outcomes[0])
            with interrupt, suppress(KeyError):
                first.send(None)
            if not len(stream):  # the first reader has it
                state_of(stream).put(outcomes[1])
            with pytest.raises(KeyError):
                await asyncio.wait_for(second, PATIENCE)

        asyncio.run(main())


def at_each_depth(function):
    """Call a function on a full stack, then with more and more room, until it has enough."""
    try:
        at_each_depth(function)
    except RecursionError:
        function()


@pytest.mark.parametrize("name", ["set_result", "put", "put_many"])
@on_asyncio
async def test_full_stack_loses_no_waiter(implementation, name, no_collector):
    fut, stream = Future(), ValueStream()
    values = stream.listen()
    functions = {
        "set_result": partial(fut.set_result, 1),
        "put": partial(stream.put, 1),
        "put_many": partial(stream.put_many, [1]),
    }
    task = asyncio.ensure_future(value_of(fut if name == "set_result" else anext(values)))
    await asyncio.sleep(0)

    def complete():
        with suppress(torchfut_aio.InvalidStateError):
            at_each_depth(functions[name])

    async with alongside(complete):
        pass
    assert await asyncio.wait_for(task, PATIENCE) == 1


def test_full_stack_with_audit_hooks_loses_no_waiter():
    program = """
        import asyncio, sys, threading
        from torchfut_aio import Future

        sys.addaudithook(lambda *_: None)  # a thread that starts calls it

        def at_each_depth(function):
            try:
                at_each_depth(function)
            except RecursionError:
                function()

        async def main():
            fut = Future()
            thread = threading.Thread(target=complete, args=(fut,))
            asyncio.get_running_loop().call_soon(thread.start)
            print(await asyncio.wait_for(fut, 30))

        def complete(fut):
            try:
                at_each_depth(lambda: fut.set_result(1))
            except RuntimeError:
                pass

        asyncio.run(main())
        """
    assert forks.output(program) == "1\n"


# -------------------------------------------------------------------------- references

VALUE = "a value of test_extension"
LONG_LIVED = [VALUE, _core.OUTCOME, ValueStream.put, current]


async def awaits(complete):
    futures = [Future() for _ in range(20)]
    tasks = [asyncio.ensure_future(value_of(fut)) for fut in futures for _ in range(2)]
    await asyncio.sleep(0)
    async with alongside(lambda: complete(futures)):
        await asyncio.wait(tasks)
    for task in tasks:
        task.cancelled() or task.exception()


def set_each(futures):
    for fut in futures:
        fut.set_result(VALUE)
        fut.try_set_result(VALUE)


def set_all(futures):
    futures[0].cancel()
    futures[1].add_done_callback(lambda _: None)
    set_many(futures, [VALUE] * len(futures))


def fail_each(futures):
    for fut in futures:
        fut.set_exception(ValueError("foo"))


def set_tensors(futures):
    for fut in futures:
        fut.set_result(torch.ones(1))


async def cancels():
    fut = Future()
    tasks = [asyncio.ensure_future(value_of(fut)) for _ in range(10)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    fut.set_result(1)
    await fut


async def streams():
    stream = ValueStream()

    async def read():
        return [value async for value in stream]

    tasks = [asyncio.ensure_future(read()) for _ in range(3)]
    await asyncio.sleep(0)

    def produce():
        with stream:
            for n in range(10):
                stream.put(n)
                stream.put_many([n, VALUE, None])
                stream.put_many([torch.ones(1)])

    async with alongside(produce):
        pass
    empty = ValueStream().listen()
    tasks.append(asyncio.ensure_future(value_of(anext(empty))))
    await asyncio.sleep(0)
    tasks[-1].cancel()
    await asyncio.wait(tasks)
    with suppress(StreamClosedError):
        stream.put(1)
    with suppress(StreamClosedError):
        stream.put_many([1])


PATHS = {
    "set_result": lambda: awaits(set_each),
    "set_results": lambda: awaits(set_all),
    "set_exception": lambda: awaits(fail_each),
    "tensors": lambda: awaits(set_tensors),
    "cancel": cancels,
    "streams": streams,
}


def counts():
    """Return what grows with each leaked reference: blocks, and references to shared objects."""
    kinds = (Future, _core.Outcome, AsyncioLoop, ValueStream, asyncio.Future, asyncio.Task, str)
    shared = [sys.getrefcount(each) for each in (*kinds, *LONG_LIVED)]
    tracked = collections.Counter(type(each) for each in gc.get_objects())
    return [sys.getallocatedblocks(), *shared], tracked


@needs_extension
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_no_path_in_c_leaks_references(path, new_loop, collected):
    def rounds(number):
        async def main():
            for _ in range(number):
                await PATHS[path]()

        loop = new_loop()
        try:
            loop.run_until_complete(main())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()
        collected()
        return counts()

    rounds(20)
    before, tracked = rounds(5)
    for _ in range(3):  # other growth, such as that of caches, is not in each of them
        after, tracked_after = rounds(100)
        grown = [b - a for a, b in zip(before, after) if b - a > 90]
        grown += [n - tracked[kind] for kind, n in tracked_after.items() if n > tracked[kind] + 90]
        if not grown:
            return
        before, tracked = after, tracked_after
    pytest.fail(f"in 100 rounds, counts have grown by {grown}")


# -------------------------------------------------------------------------- hostile objects


class Interferes:
    """A finaliser that uses the futures and streams of a test, whenever the collector runs."""

    def __init__(self, act):
        self.act, self.cycle = act, self

    def __del__(self):
        self.act()


@pytest.mark.parametrize("threshold", [1, 2, 3, 7])
@on_asyncio
async def test_collection_at_every_step_disturbs_nothing(implementation, threshold, collected):
    futures, stream, acted = [Future() for _ in range(30)], ValueStream(), []

    def act():
        with suppress(Exception):
            futures[len(acted) % 30].try_set_result(0)
            acted.append(stream.put(0))
        if len(acted) < 100:
            Interferes(act)

    async def read():
        values = [value async for value in stream]
        return [value for value in values if value]

    before = gc.get_threshold()
    tasks = [asyncio.ensure_future(value_of(fut)) for fut in futures]
    reader = asyncio.ensure_future(read())
    await asyncio.sleep(0)
    Interferes(act)
    gc.set_threshold(threshold, 1, 1)
    try:
        for fut in futures[::2]:
            fut.try_set_result(1)
        set_many(futures, [1] * 30)
        for n in range(1, 20):
            stream.put(n)
            stream.put_many([n, n])
        stream.close()
        got = await asyncio.gather(*tasks)
        assert await reader == sorted([*range(1, 20)] * 3)
    finally:
        gc.set_threshold(*before)
        acted.extend([None] * 100)
    assert set(got) <= {0, 1}
    collected()


def test_finaliser_may_close_an_iterator_as_it_is_read(implementation):
    before = gc.get_threshold()
    for _ in range(20):
        values = ValueStream().listen()
        Interferes(partial(values.__exit__, None, None, None))
        gc.set_threshold(1, 1, 1)
        try:
            read = anext(values)
        finally:
            gc.set_threshold(*before)
        read.close()


def test_await_in_a_finaliser_at_exit_aborts_nothing():
    program = """
        import codecs, os, torchfut_aio

        class Last:
            def __init__(self):
                self.steps = torchfut_aio.Future().__await__()
                self.write = os.write

            def __del__(self):
                self.write(1, b"finalised")
                self.steps.send(None)  # the error is lost: no sys.stderr is left

        last = Last()
        codecs.register(lambda _, last=last: None)  # which are dropped after all modules
        del last
    """
    assert forks.output(program) == "finalised"


def test_list_that_changes_during_put_many_is_put_whole_or_not(implementation):
    values = [1] * 100

    def act():
        values.clear()

    stream, before = ValueStream(), gc.get_threshold()
    Interferes(act)
    gc.set_threshold(1, 1, 1)
    try:
        with suppress(Exception):
            stream.put_many(values)
    finally:
        gc.set_threshold(*before)
    assert len(stream) <= 100


def test_collector_finds_no_list_with_missing_items(implementation):
    stream, incomplete, before = ValueStream(), [], gc.get_threshold()

    def look(*_):
        lists = [each for each in gc.get_objects(0) if type(each) is list]
        incomplete.extend(len(each) for each in lists if len(gc.get_referents(each)) < len(each))

    gc.callbacks.append(look)
    gc.set_threshold(1, 1, 1)
    try:
        stream.put_many([1] * 10)
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(look)
    assert not incomplete


class EqualsAll(asyncio.Future):
    """A waiter that equals every key of the state of a future, or raises."""

    error = None

    def __eq__(self, other):
        if self.error is not None:
            raise self.error
        return False

    def __hash__(self):
        return hash(_core.OUTCOME)


@pytest.mark.parametrize("error", [None, KeyError("=="), ValueError("==")])
def test_waiter_with_a_hostile_comparison_crashes_nothing(implementation, error):
    class Loop(asyncio.SelectorEventLoop):
        def create_future(self):
            return EqualsAll(loop=self)

    async def main():
        fut = Future()
        task = asyncio.ensure_future(value_of(fut))
        await asyncio.sleep(0)
        EqualsAll.error = error
        try:
            with suppress(Exception):
                fut.set_result(1)
        finally:
            EqualsAll.error = None
        if not fut.done():
            task.cancel()
        await asyncio.wait([task], timeout=PATIENCE)
        assert task.done()

    loop = Loop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


def test_state_that_is_replaced_crashes_nothing(implementation):
    class Waker:
        closed = False

        def __init__(self, fut):
            self.fut = fut

        def wake(self, waiter):
            del self.fut._state  # noqa: SLF001
            gc.collect()

    fut = Future()
    _core.add_waiter(fut, object(), Waker(fut))
    _core.add_waiter(fut, object(), Waker(fut))
    with suppress(AttributeError):
        fut.set_result(1)
    assert not hasattr(fut, "_state")  # the first waiter was woken


def test_state_that_a_comparison_replaces_crashes_nothing(implementation):
    class Waiter:
        replaces = False

        def __hash__(self):
            return hash(_core.OUTCOME)

        def __eq__(self, other):
            if self.replaces:
                fut._state = {}
                others.extend({} for _ in range(100))  # where the old state was
            return False

    fut, waiter, others = Future(), Waiter(), []
    _core.add_waiter(fut, waiter, _loops.THREADS)
    waiter.replaces = True
    with suppress(Exception):
        fut.set_result(1)
    assert not any(others)

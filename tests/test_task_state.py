"""`task_local_state`: grad mode, autocast, devices and streams that belong to a task."""

from __future__ import annotations

import gc
import inspect
import os
import threading
import traceback
import types
from contextlib import contextmanager, nullcontext

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchfut_aio import (
    Future,
    TaskStateWarning,
    _tasks,
    task_local_state,
    task_state,
)
from torchfut_aio._devices import devices_in_use
from torchfut_aio._loops import Loop
from torchfut_aio.debug import set_task_state_checks

from .accelerator import FIRST, SECOND, being_filled, current_stream, several_devices
from .explorer import interrupts
from .loops import on_asyncio, on_every_loop
from .threads import PATIENCE, alongside, running

# 1: every point.
EVERY = int(os.environ.get("TORCHFUT_AIO_TEST_EVERY", "3"))


def state():
    """Return the state that a task can observe."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "forward": torch._C._is_fwd_grad_enabled(),
        "multithreading": torch._C._is_multithreading_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_autocast_dtype("cpu"),
        "cache": torch.is_autocast_cache_enabled(),
        "nesting": (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting())[1],
        "keys": str(torch._C._dispatch_tls_local_exclude_set()),
    }


@contextmanager
def set_and_left(setter, value):
    """Set without one of torch's context managers, so that it is not reset."""
    setter(value)
    yield


WAYS = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "no inference_mode": lambda: torch.inference_mode(False),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "autocast without cache": lambda: torch.autocast("cpu", cache_enabled=False),
    "forward": lambda: torch.autograd.forward_ad._set_fwd_grad_enabled(False),
    "multithreading": lambda: torch.autograd.set_multithreading_enabled(False),
    "set_grad_enabled": lambda: set_and_left(torch._C._set_grad_enabled, False),
    "set_autocast_enabled": lambda: set_and_left(
        lambda value: torch.set_autocast_enabled("cpu", value), True
    ),
}
in_every_way = pytest.mark.parametrize("way", WAYS)

changed = [way for way in WAYS if way not in ("enable_grad", "no inference_mode", "no autocast")]


# ------------------------------------------------------------------- one state per task


@on_every_loop
@in_every_way
async def test_task_keeps_its_state_across_an_await(way):
    seen, others = [], []
    ended = anyio.Event()

    @task_local_state
    async def own():
        with WAYS[way]():
            seen.append(state())
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
                seen.append(state())
            await ended.wait()
        seen.append(state())

    async def other():
        for _ in range(6):
            others.append(state())
            await anyio.lowlevel.checkpoint()
        ended.set()

    before = state()
    async with anyio.create_task_group() as tg:
        tg.start_soon(own)
        tg.start_soon(other)
    assert others == [before] * 6
    assert state() == before
    assert seen[:4] == [seen[0]] * 4
    with WAYS[way]():
        assert seen[0] == state()
    if "set_" not in way:
        assert seen[4] == before
    for setter in (
        torch._C._set_grad_enabled,
        lambda on: torch.set_autocast_enabled("cpu", not on),
    ):
        setter(True)  # this test may have changed it


class Program:
    """Enters and leaves contexts in the order of its steps; awaits and records after each."""

    def __init__(self, steps):
        self.steps = steps
        self.seen = []

    async def __call__(self):
        stack = []
        for step in self.steps:
            if step in WAYS:
                stack.append(WAYS[step]())
                stack[-1].__enter__()
            elif stack:
                stack.pop().__exit__(None, None, None)
            await suspended()
            self.seen.append(state())
        while stack:
            stack.pop().__exit__(None, None, None)


@types.coroutine
def suspended():
    return (yield)


def run_in_turns(coroutines, order):
    """Run coroutines step by step in the given order, then each to its end."""
    waiting = dict(enumerate(coroutines))
    for number in [*order, *(n for n in waiting for _ in range(100))]:
        if number in waiting:
            try:
                waiting[number].send(None)
            except StopIteration:
                del waiting[number]


steps = st.lists(st.sampled_from(["leave", *(w for w in WAYS if "set_" not in w)]), max_size=6)


@given(st.lists(steps, min_size=2, max_size=3), st.lists(st.integers(0, 2), max_size=20))
def test_interleaved_tasks_see_the_same_state_as_alone(programs, order):
    before = state()
    alone = [Program(steps) for steps in programs]
    run_in_turns([program() for program in alone], [])
    together = [Program(steps) for steps in programs]
    run_in_turns([task_local_state(program()) for program in together], order)
    assert [p.seen for p in together] == [p.seen for p in alone]
    assert state() == before


@on_every_loop
async def test_task_local_state_starts_with_the_state_of_its_caller():
    async def changes():
        seen.append(torch.is_grad_enabled())
        torch.set_grad_enabled(True)
        await anyio.lowlevel.checkpoint()

    seen = []
    with torch.no_grad():
        await task_local_state(changes())
        seen.append(torch.is_grad_enabled())
    assert seen == [False, False]


@on_every_loop
async def test_task_local_state_functions_can_await_each_other():
    @task_local_state
    async def inner():
        with torch.enable_grad():
            await anyio.lowlevel.checkpoint()
            return torch.is_grad_enabled()

    @task_local_state
    async def outer():
        with torch.no_grad():
            inside = await inner()
            return inside, torch.is_grad_enabled()

    assert await outer() == (True, False)
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------- errors and cancellation


@on_every_loop
async def test_a_cancelled_task_cleans_up_in_its_own_state():
    seen = []

    @task_local_state
    async def own():
        with torch.inference_mode():
            try:
                await anyio.sleep_forever()
            finally:
                seen.append(torch.is_inference_mode_enabled())
                with anyio.CancelScope(shield=True):
                    await anyio.lowlevel.checkpoint()
                seen.append(torch.is_inference_mode_enabled())

    with anyio.move_on_after(0.001) as scope:
        await own()
    assert scope.cancelled_caught
    assert seen == [True, True]
    assert not torch.is_inference_mode_enabled()


def test_dropped_coroutine_cleans_up_in_its_own_state():
    seen = []

    @task_local_state
    async def own():
        with torch.no_grad():
            try:
                await suspended()
            finally:
                seen.append(torch.is_grad_enabled())

    for end in (lambda coroutine: coroutine.close(), lambda coroutine: None):
        coroutine = own()
        coroutine.send(None)
        end(coroutine)
        del coroutine
        gc.collect()
        assert torch.is_grad_enabled()
    assert seen == [False, False]


@on_every_loop
async def test_task_local_state_returns_results_and_errors_unchanged():
    fut, error = Future(), ValueError("foo")

    @task_local_state
    async def own(fail, *, value):
        await anyio.lowlevel.checkpoint()
        if fail:
            raise error
        return value

    assert await own(False, value=fut) is fut
    with pytest.raises(ValueError, match="foo") as raised:
        await own(True, value=None)
    assert raised.value is error
    assert traceback.extract_tb(error.__traceback__)[-1].name == "own"


def test_task_local_state_passes_on_send_and_throw():
    seen = []

    @task_local_state
    async def own():
        seen.append(await suspended())
        try:
            await suspended()
        except KeyError as error:
            seen.append(error)
        return "end"

    coroutine, error = own(), KeyError("thrown")
    coroutine.send(None)
    coroutine.send("sent")
    with pytest.raises(StopIteration) as stop:
        coroutine.throw(error)
    assert (seen, stop.value.value) == (["sent", error], "end")


def test_task_local_state_returns_an_async_function():
    async def own(x: int, *, y: str = "y") -> None:
        """Of mine."""

    decorated = task_local_state(own)
    assert inspect.iscoroutinefunction(decorated)
    assert inspect.signature(decorated) == inspect.signature(own)
    assert (decorated.__name__, decorated.__doc__) == ("own", "Of mine.")


async def values():
    yield 1


@pytest.mark.parametrize("func", [values, values(), len, None], ids=type)
def test_task_local_state_refuses_non_async_functions(func):
    with pytest.raises(TypeError, match=r"takes an async function or a coroutine, not .*; between"):
        task_local_state(func)


def ended(coroutine):
    """Return whether the coroutine has ended, or never started because it was interrupted."""
    before = inspect.getcoroutinestate(coroutine)
    coroutine.close()
    return before in (inspect.CORO_CREATED, inspect.CORO_CLOSED)


@pytest.mark.filterwarnings("ignore:coroutine '.*' was never awaited")
@pytest.mark.parametrize("ambient", [nullcontext, torch.inference_mode], ids=["plain", "inference"])
def test_interrupted_steps_leave_the_thread_state_as_it_was(ambient):
    seen = []

    async def own():
        with torch.inference_mode(not inference), torch.autocast("cpu", dtype=torch.float16):
            try:
                await suspended()
                await suspended()
            finally:
                seen.append((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))

    with ambient():
        inference, before = torch.is_inference_mode_enabled(), state()
        for interrupt in interrupts(task_state, _tasks, every=EVERY):
            seen.clear()
            inner = own()
            with interrupt:
                run_in_turns([task_local_state(inner)], [])
            assert state() == before, interrupt
            assert ended(inner), interrupt
            assert len(seen) <= 1, interrupt  # it cleaned up, or was interrupted before its start
        assert seen == [(not inference, True)]


def test_autocast_cache_is_not_shared_between_states():
    weight = torch.ones(2, 2, requires_grad=True)

    async def handler():
        with torch.autocast("cpu"), torch.no_grad():
            torch.mm(weight, weight)  # autocast caches the cast weight, without gradient
            await suspended()

    coroutine = task_local_state(handler())
    coroutine.send(None)
    with torch.autocast("cpu"):
        torch.mm(weight, weight).sum().backward()
    assert weight.grad is not None
    coroutine.close()


# ---------------------------------------------------------------- devices and streams


@pytest.mark.device
@on_every_loop
async def test_task_keeps_its_stream_across_an_await(accelerator, producer):
    others, ended = [], anyio.Event()
    fut = Future()

    @task_local_state
    async def own():
        with producer:
            tensor = being_filled(accelerator)
            await ended.wait()
            assert current_stream() == producer
            fut.set_result(tensor)
        return current_stream()

    async def other():
        for _ in range(5):
            others.append(current_stream())
            await anyio.lowlevel.checkpoint()
        ended.set()

    before = current_stream()
    assert before != producer
    async with anyio.create_task_group() as tg:
        tg.start_soon(own)
        tg.start_soon(other)
    assert others == [before] * 5
    assert current_stream() == before
    assert not producer.query()
    accelerator.wake()
    assert (await fut).tolist() == [7.0, 7.0]


@pytest.mark.device
@several_devices
@on_every_loop
async def test_task_keeps_its_device_across_an_await(accelerator):
    seen, ended = [], anyio.Event()

    @task_local_state
    async def own():
        torch.accelerator.set_device_index(1)
        await ended.wait()
        return torch.accelerator.current_device_index()

    async def other():
        for _ in range(5):
            seen.append(torch.accelerator.current_device_index())
            await anyio.lowlevel.checkpoint()
        ended.set()

    async with anyio.create_task_group() as tg:
        tg.start_soon(other)
        assert await own() == 1
    assert seen == [0] * 5
    assert torch.accelerator.current_device_index() == 0


@pytest.mark.device
@several_devices
def test_two_tasks_can_use_the_same_stream(accelerator, producer):
    try:
        with producer, producer:
            pass
    except RuntimeError:
        pytest.skip("a stream of this torch can be entered once at a time")
    before = current_stream()

    async def own():
        with producer:
            await suspended()
            await suspended()
            assert current_stream() == producer
        assert current_stream() == before

    run_in_turns([task_local_state(own()) for _ in range(2)], [0, 1, 0, 1])
    assert current_stream() == before


@pytest.mark.device
@several_devices
def test_device_first_used_in_a_task_keeps_its_streams_elsewhere(accelerator):
    if not hasattr(accelerator, "count_contexts"):
        pytest.skip("this device has had its context for long")
    before = current_stream(SECOND)

    async def own():
        with (stream := torch.Stream(SECOND)):
            await suspended()
            assert current_stream(SECOND) == stream

    def in_thread():
        accelerator.count_contexts()
        coroutine = task_local_state(own())
        coroutine.send(None)
        seen.append(current_stream(SECOND))
        seen.append(devices_in_use())
        with pytest.raises(StopIteration):
            coroutine.send(None)
        seen.append(current_stream(SECOND))

    seen = []
    with running(in_thread):
        pass
    assert seen == [before, [torch.device(SECOND)], before]


@pytest.mark.device
@several_devices
@pytest.mark.filterwarnings("ignore:coroutine '.*' was never awaited")
def test_interrupted_steps_restore_devices_and_streams(accelerator):
    streams = [torch.Stream(FIRST), torch.Stream(SECOND)]

    def seen():
        return (
            torch.accelerator.current_device_index(),
            current_stream(FIRST),
            current_stream(SECOND),
        )

    async def own():
        with streams[0], streams[1]:
            await suspended()
            await suspended()

    before = seen()
    for interrupt in interrupts(task_state, _tasks, every=EVERY):
        inner = own()
        with interrupt:
            run_in_turns([task_local_state(inner)], [])
        assert seen() == before, interrupt
        assert ended(inner), interrupt


# ------------------------------------------------------------------------ the warning


@pytest.fixture
def checked():
    set_task_state_checks()
    yield
    set_task_state_checks(False)
    assert Loop.before_wait is None


async def soon():
    """Yield a future that is done in a moment."""
    fut = Future()
    async with anyio.create_task_group() as tg:

        async def complete():
            await anyio.sleep(0.001)
            fut.set_result(5)

        tg.start_soon(complete)
        yield fut


async def awaited(fut):
    return await fut


@on_every_loop
@pytest.mark.parametrize("way", changed)
async def test_await_with_an_unexpected_state_warns_at_its_line(checked, way):
    async for fut in soon():
        with WAYS[way]():
            with pytest.warns(TaskStateWarning, match="this task awaits with another") as caught:
                await awaited(fut)
            torch.set_grad_enabled(True)  # this test may have changed it
            torch.set_autocast_enabled("cpu", False)
    [warning] = caught
    line = awaited.__code__.co_firstlineno + 1
    assert (warning.filename, warning.lineno) == (__file__, line)


@on_every_loop
async def test_await_with_the_expected_state_does_not_warn(checked):
    async for fut in soon():
        with torch.no_grad():
            set_task_state_checks()  # the expected state is now this one
            assert await fut == 5


@on_every_loop
async def test_await_in_a_task_with_local_state_does_not_warn(checked):
    async for fut in soon():
        with torch.no_grad():
            fut_in_own = task_local_state(awaited_without_grad(fut))
        assert await fut_in_own == 5


async def awaited_without_grad(fut):
    with torch.no_grad():
        return await fut


@on_asyncio
async def test_as_asyncio_does_not_warn(checked):
    async for fut in soon():
        with torch.no_grad():
            copy = fut.as_asyncio()  # without an await
        assert await copy == 5


@pytest.mark.device
@on_every_loop
async def test_await_that_does_not_suspend_does_not_warn(accelerator, checked):
    fut = Future()
    fut.set_result(being_filled(accelerator))
    accelerator.wake()
    torch.accelerator.synchronize()
    with torch.no_grad():
        assert (await fut).tolist() == [7.0, 7.0]


@pytest.mark.device
@several_devices
@on_every_loop
async def test_task_state_warning_names_devices_and_streams(accelerator, producer, checked):
    async for fut in soon():
        with producer, pytest.warns(TaskStateWarning, match=f"current stream of {FIRST}"):
            await fut
    async for fut in soon():
        torch.accelerator.set_device_index(1)
        with pytest.warns(TaskStateWarning, match="current device"):
            await fut
        torch.accelerator.set_device_index(0)


@on_every_loop
async def test_task_state_checks_are_enabled_per_thread():
    assert Loop.before_wait is None
    begun, end = threading.Event(), threading.Event()

    def elsewhere():
        set_task_state_checks()
        begun.set()
        end.wait(PATIENCE)
        set_task_state_checks(False)

    async with alongside(elsewhere):
        await anyio.to_thread.run_sync(begun.wait, PATIENCE)
        async for fut in soon():
            assert await awaited_without_grad(fut) == 5
        end.set()
    assert Loop.before_wait is None

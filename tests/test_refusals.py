"""Invalid arguments raise at once, with a short error that names the cure, without formatting."""

from __future__ import annotations

import asyncio
import concurrent.futures
import datetime
import functools
import traceback
from types import SimpleNamespace

import pytest
import torch

import torchfut_aio
from torchfut_aio import Batcher, Future, NotAFutureError, ValueStream, as_future
from torchfut_aio.distributed import async_comm_hook, async_rpc, serve_on, shutdown

from .accelerator import FIRST, current_stream
from .threads import PATIENCE

formatted = []


@pytest.fixture(autouse=True)
def nothing_is_formatted():
    formatted.clear()
    yield
    assert formatted == []


class Silent:
    """An object whose formatting would wait for a kernel, or for a peer."""

    def __repr__(self, _format=""):
        formatted.append(traceback.format_stack())
        return "formatted"

    __str__ = __format__ = __repr__


class SilentFunction(Silent):
    def __call__(self, *args):
        raise ValueError("foo")


REFUSED = {
    "as_future": as_future,
    "gather": lambda it: torchfut_aio.gather(it),
    "collect_all": lambda it: torchfut_aio.collect_all([it]),
    "wait_all": lambda it: torchfut_aio.wait_all([Future(), it]),
    "as_completed": lambda it: torchfut_aio.as_completed([it]),
    "with_timeout": lambda it: torchfut_aio.with_timeout(it, 1),
    "its timeout": lambda it: torchfut_aio.with_timeout(Future(), it),
    "wait": lambda it: Future().wait(it),
    "set_exception": lambda it: Future().set_exception(it),
    "add_done_callback": lambda it: Future().add_done_callback(it),
    "then": lambda it: Future().then(it),
    "devices": lambda it: Future(devices=[it]),
    "start_soon": lambda it: torchfut_aio.start_soon(it, asyncio.sleep, 1),
    "its function": lambda it: torchfut_aio.start_soon(SimpleNamespace(start_soon=0), it),
    "synchronize": lambda it: torchfut_aio.synchronize(it),
    "PollPolicy": lambda it: torchfut_aio.PollPolicy(min_interval=it),
    "set_poll_policy": lambda it: torchfut_aio.set_poll_policy(it),
    "async_rpc": lambda it: async_rpc(it),
    "async_comm_hook": lambda it: async_comm_hook(it),
    "serve_on": lambda it: serve_on(it),
}


@pytest.mark.parametrize("refuse", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("thing", [Silent(), [Silent()] * 3, [0] * 300_000], ids=type)
def test_error_messages_name_a_refused_object_by_its_type(refuse, thing):
    with pytest.raises((TypeError, RuntimeError, ValueError)) as caught:
        refuse(thing)
    assert len(str(caught.value)) < 3000


def test_result_of_a_registered_function_is_not_formatted():
    class Careless:
        pass

    as_future.register(Careless, lambda source: Silent())
    with pytest.raises(TypeError, match=r"returned a tests\.test_refusals\.Silent"):
        as_future(Careless())


def raises(error):
    raise error


@pytest.mark.parametrize(
    "value",
    [
        Silent(),
        [Silent()] * 100,
        (Silent(),),
        {Silent(): Silent()},
        {Silent()},
        ValueError(Silent()),
        functools.partial(print, Silent()),
        10**100_000,
        "x" * 800_000,
        {n: [n] * 1000 for n in range(1000)},
        [[[["x" * 200] * 6] * 6] * 6] * 6,
    ],
    ids=type,
)
def test_repr_of_a_future_formats_only_builtin_values(value):
    fut = Future()
    fut.set_result(value)
    assert len(repr(fut)) < 1000
    with pytest.raises(torchfut_aio.InvalidStateError):
        fut.set_result(None)
    for error in RuntimeError(value), KeyError(value), RuntimeError("foo", value):
        failed = Future()
        failed.set_exception(error)
        assert failed.exception() is error  # otherwise it would be logged
        assert len(repr(failed)) < 1000
        child = Future()
        failed = child.then(lambda fut, error=error: raises(error))
        child.set_result(None)
        assert len(repr(failed)) < 1000
        assert failed.exception().__cause__ is error or failed.exception() is error


def test_callback_is_logged_by_its_name_only(caplog):
    fut = Future()
    for callback in (SilentFunction(), functools.partial(SilentFunction(), Silent())):
        fut.add_done_callback(callback)
    fut.set_result(Silent())
    assert caplog.text.count("callback tests.test_refusals.SilentFunction of") == 2


def batcher(max_wait=0):
    return Batcher(list, max_batch_size=1, max_wait=max_wait, max_queue_size=1)


TAKE_SECONDS = {
    "wait": lambda it: Future().wait(it),
    "with_timeout": lambda it: torchfut_aio.with_timeout(Future(), it),
    "wait_all": lambda it: torchfut_aio.wait_all([], timeout=it),
    "as_completed": lambda it: torchfut_aio.as_completed([], timeout=it),
    "put": lambda it: ValueStream(max_size=1).put(1, timeout=it),
    "get": lambda it: ValueStream().get(timeout=it),
    "put_many": lambda it: ValueStream(max_size=1).put_many([1], timeout=it),
    "max_wait": batcher,
    "close": lambda it: batcher().close(timeout=it),
    "aclose": lambda it: asyncio.run(batcher().aclose(timeout=it)),
    "shutdown": lambda it: shutdown(timeout=it),
    "PollPolicy": lambda it: torchfut_aio.PollPolicy(max_interval=it),
}


@pytest.mark.parametrize("function", TAKE_SECONDS.values(), ids=TAKE_SECONDS)
def test_timedelta_is_refused_with_a_hint_to_total_seconds(function):
    with pytest.raises(TypeError, match=r"a number of seconds.* pass its \.total_seconds\(\)"):
        function(datetime.timedelta(seconds=1))


@pytest.mark.device
def test_tensor_is_refused_without_waiting_for_its_kernel(accelerator, producer):
    tensor = torch.zeros(2, device=FIRST)
    accelerator.fill_after(tensor, 7.0, PATIENCE)
    with pytest.raises(NotAFutureError, match=r"a torch\.Tensor is not .* to_host\(tensor\)"):
        as_future(tensor)
    assert not current_stream().query()


async def coroutine_function():
    pass


async def async_generator():
    yield


CURES = [
    (None, r"async_op=True, .* group\. .* all_gather_object\(\).* anyio\.to_thread\.run_sync\(\)"),
    ([Future()], r"a list is .* gather\(\)"),
    ((Future(),), r"a tuple is .* gather\(\)"),
    ((fut for fut in ()), r"a generator is .* gather\(\)"),
    ({}.values(), r"a dict_values is .* gather\(\)"),
    (torch.ones(2), r"await synchronize\(\), or to_host\(tensor\)"),
    (torch.nn.Parameter(torch.ones(2)), r"await synchronize\(\), or to_host\(tensor\)"),
    (coroutine_function, r"start_soon\(\)"),
    (functools.partial(coroutine_function), r"start_soon\(\)"),
    (async_generator(), r"`async for`"),
    ([[Future()]], r"one flat list"),
    (ValueStream(), r"`async for`"),
    (aiter(ValueStream()), r"`async for`"),
    (torchfut_aio.as_completed([]), r"`async for`"),
]


@pytest.mark.parametrize(("thing", "cure"), CURES, ids=[type(thing).__name__ for thing, _ in CURES])
def test_unadoptable_object_is_refused_with_a_hint(thing, cure):
    with pytest.raises(NotAFutureError, match=cure):
        as_future(thing)


@pytest.mark.parametrize("many", ["gather", "collect_all", "wait_all", "as_completed"])
def test_a_dict_is_refused_unless_its_keys_are_futures(many):
    fut = Future()
    fut.set_result(5)
    getattr(torchfut_aio, many)({fut: "x"})
    for key in ("x", 7):
        with pytest.raises(NotAFutureError, match=r"a dict of futures, pass its \.values\(\)"):
            getattr(torchfut_aio, many)({key: fut})


def test_async_rpc_refuses_an_async_generator():
    with pytest.raises(TypeError, match=r"async_generator is an async generator.* return a list"):
        async_rpc(async_generator)


def test_concurrent_futures_functions_fail_with_a_hint():
    other = concurrent.futures.Future()
    for function in (concurrent.futures.wait, lambda fs: next(concurrent.futures.as_completed(fs))):
        with pytest.raises(AttributeError, match=r"fut\.as_concurrent\(\)"):
            function([Future(), other])
    assert not hasattr(Future(), "_condition")


ABSENT = {
    Future: {
        "result": r"await .* wait\(timeout\) .* value\(\)",
        "get_loop": "no loop",
        "running": r"has_waiters\(\)",
        "set_running_or_notify_cancel": r"try_set_result\(\)",
    },
    Batcher: {"map": r"gather\(\)", "shutdown": r"aclose\(\)"},
    ValueStream: {
        "put_nowait": "try_put",
        "send_nowait": "try_put",
        "full": "try_put",
        "get_nowait": r"get\(timeout=0\)",
        "receive_nowait": r"get\(timeout=0\)",
        "send": "await aput",
        "receive": "await aget",
        "aclose": r"close\(\)",
        "qsize": r"len\(stream\)",
        "empty": r"len\(stream\)",
        "shutdown": r"close\(\)",
        "join": "does not know",
        "task_done": "does not know",
    },
}


@pytest.mark.parametrize(
    ("kind", "name", "cure"),
    [
        pytest.param(kind, name, cure, id=f"{kind.__name__}.{name}")
        for kind, names in ABSENT.items()
        for name, cure in names.items()
    ],
)
def test_name_of_a_similar_class_raises_with_a_hint(kind, name, cure):
    limits = {"max_batch_size": 1, "max_queue_size": 1}
    for thing in (kind, Batcher(list, **limits) if kind is Batcher else kind()):
        assert not hasattr(thing, name)
        with pytest.raises(AttributeError, match=f"a {kind.__name__} .*{cure}"):
            getattr(thing, name)


def test_wrong_arguments_of_as_future_name_it():
    with pytest.raises(TypeError, match=r"^as_future\(\) got an unexpected keyword argument"):
        torchfut_aio.as_future(5, timeout=1)

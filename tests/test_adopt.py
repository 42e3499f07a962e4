"""``as_future``: futures of other kinds, and types registered by other libraries."""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import gc
import threading
import warnings
import weakref
from multiprocessing.pool import AsyncResult, ThreadPool

import anyio
import anyio.to_thread
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future
from torch.distributed.checkpoint import state_dict_saver

from torchfut_aio import (
    CancelledError,
    Future,
    NotAFutureError,
    as_completed,
    as_future,
    gather,
)
from torchfut_aio._adopt import once

from . import forks
from .loops import on_asyncio, on_every_loop
from .threads import PATIENCE, alongside, running


class Stop(Exception):
    pass


SOURCES = [torch.futures.Future, concurrent.futures.Future]
sources = pytest.mark.parametrize("source_type", SOURCES)


def test_our_future_is_returned_unchanged():
    fut = Future()
    assert as_future(fut) is fut


@sources
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("outcome", ["result", "exception"])
def test_adopted_future_takes_the_outcome_of_its_source(source_type, when, outcome):
    source = source_type()
    value = Stop("foo") if outcome == "exception" else ["a", "value"]
    if when == "before":
        fut = as_future(source)
        assert not fut.done()
    getattr(source, f"set_{outcome}")(value)
    if when == "after":
        fut = as_future(source)
    assert isinstance(fut, Future)
    if outcome == "result":
        assert fut.wait(timeout=0) is value
    else:
        assert fut.exception() is value


def test_error_in_torch_then_arrives_as_torch_runtime_error():
    source = torch.futures.Future()
    source.set_result(1)
    fut = as_future(source.then(lambda fut: {}["missing"]))
    with pytest.raises(RuntimeError, match=r"Got the following error.*KeyError"):
        fut.wait()


@on_every_loop
@pytest.mark.parametrize("source_type", SOURCES)
async def test_an_adopted_future_can_be_awaited(source_type):
    source = source_type()
    async with alongside(lambda: source.set_result(5)):
        with anyio.fail_after(PATIENCE):
            assert await as_future(source) == 5


def test_cancelled_concurrent_future_cancels_its_adopted_future():
    source = concurrent.futures.Future()
    fut = as_future(source)
    source.cancel()
    assert type(fut.exception()) is CancelledError
    assert not isinstance(fut.exception(), asyncio.CancelledError)


def test_library_cancelled_error_is_adopted_as_cancellation():
    class LibraryCancelledError(concurrent.futures.CancelledError):  # like that of dask
        pass

    source, error = concurrent.futures.Future(), LibraryCancelledError("foo")
    fut = as_future(source)
    source.set_exception(error)
    assert type(fut.exception()) is CancelledError
    assert fut.exception().args == ("foo",)
    assert fut.exception().__cause__ is error


@on_asyncio
async def test_asyncio_futures_and_tasks_are_adopted():
    loop = asyncio.get_running_loop()
    source = loop.create_future()
    task = asyncio.ensure_future(asyncio.sleep(0.001, "slept"))
    futures = [as_future(source), as_future(task)]
    source.set_result("set")
    assert [await fut for fut in futures] == ["set", "slept"]
    assert as_future(task).wait() == "slept"

    async def fail():
        raise Stop

    with pytest.raises(Stop):
        await as_future(asyncio.ensure_future(fail()))


@on_asyncio
async def test_cancelled_task_cancels_its_adopted_future():
    task = asyncio.ensure_future(asyncio.sleep(PATIENCE))
    fut = as_future(task)
    task.cancel("by me")
    with pytest.raises(CancelledError) as caught:
        await fut
    assert caught.value.args == ("by me",)
    for error in (fut.exception(), as_future(task).exception()):
        assert isinstance(error, CancelledError)
        assert isinstance(error, asyncio.CancelledError)


@on_asyncio
async def test_an_asyncio_future_is_adopted_from_another_thread():
    source = asyncio.get_running_loop().create_future()
    got = []
    async with alongside(lambda: got.append(as_future(source).wait(PATIENCE))):
        source.set_result(5)
    assert got == [5]


def test_asyncio_future_of_closed_loop_must_be_done():
    loop = asyncio.new_event_loop()
    done, pending = loop.create_future(), loop.create_future()
    done.set_result(5)
    loop.close()
    assert as_future(done).wait() == 5
    with pytest.raises(RuntimeError, match="loop that has closed"):
        as_future(pending)


def test_distributed_work_is_adopted(group_of_one):
    tensor = torch.ones(3)
    work = dist.all_reduce(tensor, async_op=True)
    fut = as_future(work)
    [reduced] = fut.wait(PATIENCE)
    assert torch.equal(reduced, torch.ones(3))

    async def main():
        work = dist.broadcast(tensor, 0, async_op=True)
        return await as_future(work)

    assert len(asyncio.run(main())) == 1


def test_error_stored_as_value_of_a_work_fails_the_future():
    fut = Future()
    works = [_create_work_from_future(fut) for _ in range(2)]
    early = as_future(works[0]), as_future(works[0].get_future())
    fut.set_exception(Stop("foo"))
    for adopted in *early, as_future(works[1]), as_future(works[1].get_future()):
        assert adopted.exception() is fut.exception()


def waits(fut: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
    return torch.jit.wait(fut)


def waits_in_a_fork(fut: torch.futures.Future[torch.Tensor]) -> torch.futures.Future[torch.Tensor]:
    return torch.jit.fork(waits, fut)


@pytest.fixture
def script():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        yield torch.jit.script


@pytest.mark.parametrize("when", ["before", "after"])
def test_error_returned_by_a_script_fails_the_future(when, script):
    fut = Future()
    if when == "before":
        fut.set_exception(Stop("foo"))
    adopted = as_future(script(waits_in_a_fork)(fut))
    if when == "after":
        fut.set_exception(Stop("foo"))
    with pytest.raises(Stop):
        adopted.wait(PATIENCE)


def test_error_nested_in_a_script_result_fails_the_future(script):
    failed = Future()
    failed.set_exception(Stop("foo"))
    stand_in = script(waits)(failed)  # torch's own future stores the error as a value
    for value in stand_in, (torch.ones(1), stand_in), {"a": [stand_in]}:
        source = torch.futures.Future()
        source.set_result(value)
        assert as_future(source).exception() is failed.exception()
    cycle = []
    cycle.append(cycle)
    source = torch.futures.Future()
    source.set_result(cycle)
    assert as_future(source).wait() is cycle


@pytest.mark.parametrize("source_type", [*SOURCES, AsyncResult])
@pytest.mark.parametrize("outcome", ["result", "exception"])
def test_source_that_completes_too_late_is_ignored(source_type, outcome, caplog, capfd):
    if source_type is AsyncResult:
        release = threading.Event()
        with ThreadPool(1) as pool:
            source = pool.apply_async(release.wait)
            fut = as_future(source)
            fut.set_result("mine")
            release.set()
            source.get(PATIENCE)
    else:
        source = source_type()
        fut = as_future(source)
        fut.set_result("mine")
        getattr(source, f"set_{outcome}")(Stop("foo"))
    assert fut.wait() == "mine"
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")


@on_asyncio
async def test_task_that_completes_too_late_is_ignored(caplog):
    task = asyncio.ensure_future(asyncio.sleep(0.001))
    as_future(task).set_result("mine")
    await task
    assert caplog.text == ""


def test_threads_that_wait_for_pool_results_end_at_once():
    with ThreadPool(1) as pool:
        before, most = threading.active_count(), 0
        for n in range(300):
            assert as_future(pool.apply_async(abs, [-n])).wait() == n
            most = max(most, threading.active_count())
    assert most - before < 50


@on_every_loop
async def test_results_of_a_pool_can_be_awaited(nothing_blocks_a_loop):
    release = threading.Event()
    pool = await anyio.to_thread.run_sync(ThreadPool, 2)  # may start a process, and block
    try:
        late, failed = pool.apply_async(release.wait), pool.apply_async(int, ["x"])
        many = pool.map_async(abs, [-1, 2])
        futures = [as_future(late), as_future(many)]
        assert as_future(late) is futures[0]
        with anyio.fail_after(PATIENCE):
            with pytest.raises(ValueError, match="invalid literal"):
                await as_future(failed)
            assert not futures[0].done()
            release.set()
            assert await gather(futures) == [True, [1, 2]]
        assert as_future(late).wait() is True
    finally:
        pool.close()
        await anyio.to_thread.run_sync(pool.join)


def test_mps_event_is_adopted_without_deriving_from_torch_event(monkeypatch):
    assert not issubclass(torch.mps.Event, torch.Event)
    reached = threading.Event()

    class Event:  # a class of a device that this machine lacks
        query, synchronize = reached.is_set, reached.wait

    monkeypatch.setattr(torch.mps, "Event", Event)
    fut = as_future(Event())
    with pytest.raises(TimeoutError):
        fut.wait(0.01)
    reached.set()
    assert fut.wait(PATIENCE) is None
    assert as_future(Event()).done()


def test_async_save_completes_once_it_is_uploaded():
    if not hasattr(state_dict_saver, "AsyncSaveResponse"):
        pytest.skip("this torch has no saves that are staged")
    staging, upload = concurrent.futures.Future(), concurrent.futures.Future()
    response = state_dict_saver.AsyncSaveResponse(staging, upload)
    fut = as_future(response)
    assert fut is as_future(response)
    staging.set_result(None)
    assert not fut.done()
    upload.set_result("metadata")
    assert fut.wait() == "metadata"


def test_adopted_future_survives_without_other_references():
    source = torch.futures.Future()
    got = []
    as_future(source).then(lambda fut: got.append(fut.value()))
    gc.collect()
    source.set_result(5)
    assert got == [5]


@sources
def test_pending_source_is_adopted_only_once(source_type):
    source = source_type()
    fut = as_future(source)
    assert all(as_future(source) is fut for _ in range(1000))
    source.set_result(None)
    assert as_future(source).done()
    refs = weakref.ref(fut), weakref.ref(source)
    del fut, source
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


def test_a_source_is_told_from_a_dropped_one_with_its_id():
    parent = torch.futures.Future()
    # C++ keeps each future, but not the object. There are many, as other memory may take some ids.
    sources = [parent.then(lambda fut: None) for _ in range(1000)]
    adopted = {id(source): as_future(source) for source in sources}
    sources.clear()
    kept = []
    while not kept or id(kept[-1]) not in adopted:  # until memory is reused
        kept.append(parent.then(lambda fut: None))
        assert len(kept) < 100_000
    assert as_future(kept[-1]) is not adopted[id(kept[-1])]


def test_a_source_that_is_done_has_time_to_complete_its_future():
    class Job(concurrent.futures.Future):
        pass

    completes = []

    @as_future.register(Job)
    @once
    def _(source, future):
        completes.append(future.try_set_result)

    source = Job()
    fut = as_future(source)
    source.set_result("not read")
    with pytest.raises(TimeoutError):
        fut.wait(0.2)
    completes[0]("given")
    assert fut.wait() == "given"


def test_pending_source_is_adopted_once_per_set_of_devices():
    source = torch.futures.Future()
    plain, other = as_future(source), as_future(source, devices=[DEVICE])
    assert plain is not other
    assert as_future(source, devices=[torch.device(DEVICE)]) is other


def test_as_future_refuses_a_single_device_without_a_list():
    with pytest.raises(TypeError, match="devices must be a list of devices"):
        as_future(torch.futures.Future(), devices="cpu:0")


DEVICE = "cpu:0"  # the C++ future treats it like any other device


@sources
def test_threads_adopting_the_same_source_all_see_it_complete(source_type):
    for _ in range(50):
        source = source_type()
        got = []
        with running(
            *[lambda: got.append(as_future(source).wait(PATIENCE))] * 3,
            lambda: source.set_result(5),
        ):
            pass
        assert got == [5] * 3


def test_as_future_with_devices_makes_a_new_future():
    fut = Future()
    made = as_future(fut, devices=[])
    assert made is not fut
    fut.set_result(5)
    assert made.wait() == 5


def test_unadoptable_object_raises_type_error_listing_sources():
    with pytest.raises(TypeError) as caught:
        as_future("text")
    assert isinstance(caught.value, NotAFutureError)
    for name in (
        "a str is not a future",
        "torchfut_aio.Future",
        "torch.futures.Future",
        "torch.distributed.Work",
        "concurrent.futures.Future",
        "asyncio.Future",
        "asyncio.Task",
        "as_future.register()",
    ):
        assert name in str(caught.value)
    with pytest.raises(TypeError):
        as_future(None)


class Handle:
    def __init__(self):
        self.finished = threading.Event()


class SpecialHandle(Handle):
    pass


@pytest.fixture
def registered():
    @as_future.register(Handle)
    def adopt(handle, *, devices=None):
        fut = Future(devices=devices)
        fut.set_result(handle)
        return fut


def test_other_libraries_can_register_source_types(registered):
    handle = SpecialHandle()
    assert as_future(handle).wait() is as_future(handle, devices=[]).wait() is handle
    with pytest.raises(TypeError, match=r"test_adopt\.Handle"):
        as_future(5)


def test_registering_while_a_source_is_looked_up_is_safe():
    class Abstract(abc.ABC):  # noqa: B024
        pass

    @Abstract.register
    class Virtual:
        pass

    class Another:
        pass

    to_register = [Another]

    class RegistersDuringLookUp(type):
        def __subclasscheck__(cls, _kind):  # called by the look-up
            while to_register:
                as_future.register(to_register.pop(), lambda source: Future())
            return False

    class CheckedKind(metaclass=RegistersDuringLookUp):
        pass

    fut = Future()
    as_future.register(Abstract, lambda source: fut)
    as_future.register(CheckedKind, lambda source: Future())
    assert as_future(Virtual()) is fut
    assert not to_register
    assert not as_future(Another()).done()


def test_a_function_registers_for_each_type_of_a_union():
    class One:
        pass

    class Other:
        pass

    fut = Future()
    as_future.register(One | Other, lambda source: fut)
    assert as_future(One()) is as_future(Other()) is fut


def test_registered_function_must_return_our_future():
    class Careless:
        pass

    as_future.register(Careless, lambda source: torch.futures.Future())
    for use in (as_future, lambda source: gather([source]), lambda source: as_completed([source])):
        with pytest.raises(TypeError, match=r"Careless must return a torchfut_aio\.Future"):
            use(Careless())


def test_library_imported_later_is_recognised():
    program = """
import sys, torchfut_aio
assert "anyio" not in sys.modules
import anyio
async def main():
    source = anyio.Future()
    fut = torchfut_aio.as_future(source)
    source.return_value = 5
    return await fut
print(anyio.run(main))
"""
    assert forks.output(program) == "5\n"


def test_as_future_refuses_a_coroutine_and_suggests_a_fix():
    async def coroutine():
        pass

    running = coroutine()
    with pytest.raises(TypeError, match="ensure_future"):
        as_future(running)
    running.close()


class Annotated:
    pass


def test_registering_by_annotation_works_as_with_singledispatch():
    @as_future.register
    def _(source: Annotated, *, devices=None) -> Future:
        fut = Future(devices=devices)
        fut.set_result("annotated")
        return fut

    assert as_future(Annotated()).wait() == "annotated"


def test_register_reads_assigned_annotations():
    class Other:
        pass

    def adopt(source):
        fut = Future()
        fut.set_result("other")
        return fut

    adopt.__annotations__ = {"source": Other, "return": Future}
    assert as_future.register(adopt) is adopt
    assert as_future(Other()).wait() == "other"


def test_a_function_without_annotations_registers_nothing():
    def adopt(source):
        return Future()

    with pytest.raises(TypeError, match="annotated function"):
        as_future.register(adopt)


def test_equal_sources_are_adopted_separately_and_collected():
    class Equal(concurrent.futures.Future):
        def __eq__(self, other):
            return True

        __hash__ = None

    sources = [Equal() for _ in range(3)]
    futures = [as_future(source) for source in sources]
    for n, source in enumerate(sources):
        assert as_future(source) is futures[n]
        source.set_result(n)
    assert [fut.wait(PATIENCE) for fut in futures] == [0, 1, 2]
    refs = [weakref.ref(thing) for thing in (*sources, *futures)]
    del sources, source, futures
    gc.collect()
    assert [ref() for ref in refs] == [None] * 6


def test_registered_abstract_class_does_not_hide_known_types():
    program = """
import asyncio, collections.abc
import torchfut_aio

@torchfut_aio.as_future.register(collections.abc.Awaitable)
def _(source, *, devices=None):
    raise AssertionError("called for a type that the package knows")

async def main():
    source = asyncio.get_running_loop().create_future()
    source.set_result(5)
    return await torchfut_aio.as_future(source)

print(asyncio.run(main()))
"""
    assert forks.output(program) == "5\n"

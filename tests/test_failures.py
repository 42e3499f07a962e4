"""A failure keeps nothing alive: once the error is dropped, all that it referenced is freed.

The traceback of an error has the frames that it passed, and these have their callers, among them
frames of this package. If a local variable of such a frame leads back to the error, only the
garbage collector frees the frames' objects: tensors, whose sizes the collector does not know.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
import weakref
from contextlib import suppress
from multiprocessing.pool import ThreadPool

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch
from anyio.from_thread import start_blocking_portal

from torchfut_aio import (
    Batcher,
    Future,
    ValueStream,
    as_completed,
    as_future,
    collect_all,
    debug,
    gather,
    set_results,
    start_soon,
    task_local_state,
    wait_all,
    with_timeout,
)
from torchfut_aio.distributed import async_rpc, shutdown

from .loops import on_every_loop
from .threads import PATIENCE
from .waiting import eventually

ROUTES = {}


def route(function):
    """Register a way in which a failure reaches the code that waits for it."""
    ROUTES[function.__name__] = function
    return function


class OutOfMemory(RuntimeError):
    pass


held = []
kept = []


def forward(*_):
    activations = torch.ones(1000)
    held.append(weakref.ref(activations))
    raise OutOfMemory("out of memory")


async def forward_soon(*_):
    await anyio.lowlevel.checkpoint()
    forward()


def in_thread(function, *args):
    """Call the function in a thread. (An executor's frames would keep the arguments alive.)"""

    def call():
        nonlocal args
        with suppress(OutOfMemory):
            contextvars.Context().run(function, *args)  # see `running`
        args = ()

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(PATIENCE)


def failed():
    """Return a future that fails in a thread, with an error that a function raised there."""
    fut = Future()
    threading.Thread(target=fail, args=(fut,)).start()
    return fut


def fail(fut):
    try:
        forward()
    except OutOfMemory as error:
        fut.set_exception(error)
    finally:
        del fut  # the error refers to this frame: the test itself would create a cycle


@route
async def awaited():
    await failed()


@route
async def stream_ordered():
    await failed().stream_ordered()


@route
async def waited_for():
    in_thread(wait, failed())


def wait(fut):
    try:
        fut.wait(PATIENCE)
    finally:
        del fut


@route
async def value():
    fut = failed()
    await eventually(fut.done)
    try:
        fut.value()
    finally:
        del fut


@route
async def then():
    fut = Future()
    child = fut.then(forward)
    threading.Thread(target=fut.set_result, args=(5,)).start()
    try:
        await child
    finally:
        del child


@route
async def chain():
    await failed().then(wait).then(wait)


@route
async def gathered():
    await gather([failed(), failed()])


@route
async def collected():
    await collect_all([failed(), failed()])


@route
async def all_waited_for():
    in_thread(wait_all, [failed(), failed()])


@route
async def completed():
    async for fut in as_completed([failed()]):
        try:
            fut.value()
        finally:
            del fut


@route
async def timed():
    await with_timeout(failed(), PATIENCE)


@route
async def set_with_others():
    futures = [Future(), Future()]
    try:
        forward()
    except OutOfMemory as error:
        set_results(futures, [error, 5])
    try:
        await futures[0]
    finally:
        del futures


@route
async def batched():
    async with Batcher(forward, max_batch_size=2, max_queue_size=2) as batcher:
        await batcher.submit(1)


@route
async def batched_in_tasks():
    async with Batcher(forward_soon, max_batch_size=2, max_queue_size=2) as batcher:
        await batcher.submit(1)


@route
async def started():
    async with anyio.create_task_group() as tg:
        fut = start_soon(tg, forward_soon)
    try:
        await fut
    finally:
        del fut


@route
async def submitted():
    with start_blocking_portal() as portal:
        await start_soon(portal, forward_soon)


@route
async def of_a_pool():
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        await as_future(pool.submit(forward))


@route
async def of_a_pool_of_multiprocessing():
    with ThreadPool(1) as pool:
        await as_future(pool.apply_async(forward))


@route
async def of_torch():
    fut = torch.futures.Future()
    child = fut.then(forward)
    fut.set_result(5)
    await as_future(child)


@route
async def of_torch_that_failed():
    await as_future(failed_of_torch())


def failed_of_torch():
    fut = torch.futures.Future()
    threading.Thread(target=fail, args=(fut,)).start()
    return fut


@route
async def left_stream():
    stream = ValueStream()
    stream.put(5)
    async for _ in stream:
        break
    produce(stream)
    try:
        stream.put(5)
    finally:
        del stream


@route
async def stream_that_is_stopped():
    stream = ValueStream()
    produce(stream)
    stream.stop_listening()
    kept.append(stream)


@route
async def of_ours():
    await as_future(failed(), devices=[])


@route
async def of_asyncio():
    in_thread(asyncio.run, in_a_task_of_asyncio())


async def in_a_task_of_asyncio():
    with suppress(OutOfMemory):  # asyncio.run() itself has a cycle
        await as_future(asyncio.create_task(forward_soon()))


@route
async def copied_to_concurrent():
    await as_future(failed().as_concurrent())


@route
async def streamed():
    stream = ValueStream()
    threading.Thread(target=produce, args=(stream,)).start()
    async for _ in stream:
        pass


@route
async def streamed_to_a_thread():
    stream = ValueStream()
    threading.Thread(target=produce, args=(stream,)).start()
    in_thread(list, stream)


@route
async def got_from_a_stream():
    stream = ValueStream()
    threading.Thread(target=produce, args=(stream,)).start()
    await stream.aget()


@route
async def got_from_a_stream_in_a_thread():
    stream = ValueStream()
    threading.Thread(target=produce, args=(stream,)).start()
    in_thread(stream.get)


@route
async def listened_to():
    stream = ValueStream()
    threading.Thread(target=produce, args=(stream,)).start()
    with stream.listen() as values:
        async for _ in values:
            pass


def produce(stream):
    try:
        with stream:
            forward()
    except OutOfMemory:
        pass


@route
async def in_a_state_of_its_own():
    await task_local_state(forward_soon)()


@route
async def called_by_rpc():
    fut = async_rpc(forward_soon)()
    try:
        await fut
    finally:
        del fut
        in_thread(shutdown)


@route
async def recorded():
    with debug.Recording():
        await failed()


@route
async def recorded_when_done():
    fut = failed()
    await eventually(fut.done)
    with debug.Recording():
        try:
            await fut
        finally:
            del fut


@on_every_loop
@pytest.mark.filterwarnings("ignore::torchfut_aio.BlockingWaitWarning")
@pytest.mark.parametrize("name", ROUTES)
async def test_failure_keeps_no_tensors_alive(name, no_collector, nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()  # some routes block on purpose
    held.clear()
    await drop_error(ROUTES[name])
    await eventually(lambda: held and not any(activations() is not None for activations in held))


@on_every_loop
@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
async def test_out_of_memory_error_keeps_no_tensors_alive(error):
    def run(items):
        activations = torch.ones(1000)
        held.append(weakref.ref(activations))
        raise error(f"no memory for {len(items)}")

    async def run_soon():
        await anyio.lowlevel.checkpoint()
        run([1])

    held.clear()
    ready = Future()
    ready.set_result([1])
    async with (
        anyio.create_task_group() as group,
        Batcher(run, max_batch_size=2, max_wait=1, max_queue_size=9) as batcher,
    ):
        both = [batcher.submit(n) for n in range(2)]
        futures = [*both, ready.then(lambda fut: run(fut.value())), start_soon(group, run_soon)]
        errors = await settled(futures)
    assert [type(each).__mro__.count(error) for each in errors] == [1] * 4
    assert [activations() for activations in held] == [None] * 3


async def settled(futures):
    return await gather(futures, return_exceptions=True)


async def drop_error(way):
    with suppress(RuntimeError):  # torch converts the error
        await way()

"""Typical code of users, with the types that they may rely on: it is checked, and never runs.

`test_types.py` runs mypy and pyright on it, both in strict mode.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, assert_type

import anyio
import anyio.abc
import anyio.from_thread
import torch
import torch.distributed as dist
import trio
from torch._C._distributed_c10d import GradBucket

import torchfut_aio.distributed
from torchfut_aio import (
    CancelledError,
    Future,
    PollPolicy,
    ValueStream,
    as_completed,
    as_future,
    collect_all,
    gather,
    poll_statistics,
    set_poll_policy,
    start_soon,
    synchronize,
    task_local_state,
    to_host,
    wait_all,
    with_timeout,
)

# ------------------------------------------------------------------------ one future


def complete(fut: Future[int], requests: SimpleQueue[Future[int] | None]) -> None:
    fut.set_result(5)
    fut.set_exception(ValueError("foo"))
    assert_type(fut.try_set_result(5), bool)
    assert_type(fut.try_set_exception(KeyboardInterrupt()), bool)
    assert_type(fut.cancel("the client has disconnected"), bool)
    while (request := requests.get()) is not None:
        if not request.done() and request.has_waiters():
            request.try_set_result(5)


def read(fut: Future[int]) -> int:
    assert_type(fut.value(), int)
    assert_type(fut.wait(), int)
    assert_type(fut.wait(timeout=0.5), int)
    assert_type(fut.exception(), BaseException | None)
    assert_type(fut.cancelled(), bool)
    assert_type(fut.as_concurrent(), concurrent.futures.Future[int])
    done, _ = concurrent.futures.wait([fut.as_concurrent()], timeout=1)
    return sum(future.result() for future in done)


async def wait(fut: Future[torch.Tensor]) -> float:
    assert_type(await fut, torch.Tensor)
    assert_type(await fut.stream_ordered(), torch.Tensor)
    assert_type(await asyncio.wait_for(fut, 1), torch.Tensor)
    assert_type(fut.as_asyncio(), asyncio.Future[torch.Tensor])
    try:
        with anyio.fail_after(1):
            return (await fut).sum().item()
    except CancelledError as error:
        print(error)
    except TimeoutError:
        fut.cancel()
    first, second = await asyncio.gather(fut, as_future(fut))
    return (first + second).sum().item()


def chain(fut: Future[int]) -> Future[str]:
    def printed(fut: Future[int]) -> None:
        print(fut.value())

    fut.add_done_callback(printed)
    fut.add_done_callback(lambda fut: print(fut.value()))
    assert_type(fut.remove_done_callback(printed), int)
    assert_type(fut.then(lambda fut: fut.value() + 0.5), Future[float])
    return fut.then(lambda fut: str(fut.value())).then(lambda fut: fut.value().upper())


class Batcher:
    def __init__(self) -> None:
        self.requests: SimpleQueue[tuple[torch.Tensor, Future[int]]] = SimpleQueue()
        self.ready: Future[None] = Future(devices=["cuda:0", 1, torch.device("cpu")])
        threading.Thread(target=self.ready.set_result, args=(None,)).start()

    def submit(self, image: torch.Tensor) -> Future[int]:
        fut = Future[int]()
        self.requests.put((image, fut))
        return fut


class Numbered(Future[int]):
    """A program's own subclass of Future."""


# ----------------------------------------------------------------------- many futures


async def many(
    ints: list[Future[int]], texts: Future[str], plain: torch.futures.Future[float]
) -> None:
    assert_type(await gather(ints), list[int])
    assert_type(await gather(fut for fut in ints), list[int])
    assert_type(await gather((ints[0], texts, plain)), tuple[int, str, float])
    number, text = await gather((ints[0], texts))
    assert_type(number, int)
    assert_type(text, str)
    assert_type(gather((texts,)).wait(), tuple[str])
    assert_type(await gather(ints, return_exceptions=True), list[int | BaseException])
    assert_type(
        await gather((texts, plain), return_exceptions=True),
        tuple[str | BaseException, float | BaseException],
    )
    assert_type(await gather([plain, plain]), list[float])
    assert_type(await gather({1: texts}.values()), list[str])
    assert_type(await collect_all(ints), list[Future[int]])
    assert_type(collect_all([plain]).wait(), list[torch.futures.Future[float]])
    # Rejected: these functions take one iterable.
    gather(ints[0], texts)  # type: ignore[call-overload]
    collect_all(ints[0], texts)  # type: ignore[call-overload]
    wait_all(ints[0], texts)  # type: ignore[call-overload]
    as_completed(ints[0], texts)  # type: ignore[call-overload]
    for fut in as_completed(ints, timeout=5):
        assert_type(fut, Future[int])
    async for done in as_completed([plain]):
        assert_type(done.value(), float)


def all_of(ints: list[Future[int]]) -> list[int]:
    assert_type(with_timeout(ints[0], 0.5), Future[int])
    assert_type(with_timeout(ints[0], 0.5).then(lambda fut: str(fut.value())), Future[str])
    return wait_all(ints, timeout=5)


async def of_mixed_values(number: Future[int], text: Future[str]) -> None:
    for value in await gather([number, text]):
        if isinstance(value, int):
            print(value + 1)
        else:
            print(value.upper())


# ----------------------------------------------------------- futures of other libraries


async def adopt(
    plain: torch.futures.Future[int],
    task: asyncio.Task[int],
    pools: concurrent.futures.Future[int],
    work: dist.Work,
    unknown: Any,
) -> None:
    assert_type(as_future(plain), Future[int])
    assert_type(as_future(task), Future[int])
    assert_type(as_future(pools, devices=["cuda:0"]), Future[int])
    assert_type(await as_future(work), Any)
    assert_type(await as_future(unknown), Any)
    assert_type(with_timeout(pools, 1), Future[int])
    assert_type(with_timeout(plain, 1), Future[int])
    assert_type(await with_timeout(task, 1), int)
    assert_type(await gather([pools, pools]), list[int])
    assert_type(await gather((plain, task, pools)), tuple[int, int, int])
    assert_type(wait_all([plain]), list[int])
    async for fut in as_completed([task]):
        assert_type(fut, Future[int])


class Ticket:
    def on_ready(self, function: Any) -> None: ...


@as_future.register(Ticket)
def from_ticket(ticket: Ticket, *, devices: Any = None) -> Future[int]:
    fut: Future[int] = Future(devices=devices)
    ticket.on_ready(fut.set_result)
    return fut


# --------------------------------------------------------------------------- task groups


async def double(x: int) -> int:
    await anyio.sleep(0.001)
    return 2 * x


async def groups(nursery: trio.Nursery, group: anyio.abc.TaskGroup) -> None:
    assert_type(start_soon(nursery, double, 5), Future[int])
    assert_type(start_soon(group, double, 5, name="double"), Future[int])


def from_thread(portal: anyio.from_thread.BlockingPortal) -> int:
    return start_soon(portal, double, 5).wait()


# ------------------------------------------------------------------------------- streams


def produce(stream: ValueStream[int]) -> None:
    with stream:
        stream.put(1)
        stream.put_many([1, 2], timeout=5)
        stream.put("1")  # type: ignore[arg-type]
        stream.put(1, 5)  # type: ignore[call-arg]
        assert_type(stream.try_put(1), bool)


def consume(stream: ValueStream[int]) -> None:
    assert_type(stream.get(timeout=5), int)
    with stream.listen() as values:
        for value in values:
            assert_type(value, int)
        assert_type(next(values), int)
    for value in stream:
        assert_type(value, int)


async def pass_on(stream: ValueStream[int], other: ValueStream[str]) -> None:
    with other, stream.listen() as values:
        async for value in values:
            assert_type(value, int)
            await other.aput(str(value))
    assert_type(await stream.aget(), int)
    async with stream:  # type: ignore[attr-defined]
        pass


# -------------------------------------------------------------------------- accelerators


async def devices(stream: torch.Stream, answer: dict[str, torch.Tensor]) -> None:
    await synchronize()
    await synchronize(stream)
    await as_future(stream)
    copied = await to_host(answer)
    assert_type(copied, dict[str, torch.Tensor])
    set_poll_policy(PollPolicy())
    print(poll_statistics().polls)


# --------------------------------------------------------------------- torch.distributed


@torchfut_aio.distributed.async_rpc
async def lookup(key: str) -> torch.Tensor:
    await anyio.sleep(0.001)
    return torch.zeros(len(key))


async def call(answer: torch.futures.Future[torch.Tensor]) -> None:  # of rpc.rpc_async
    assert_type(lookup("key"), Future[torch.Tensor])
    assert_type(await as_future(answer), torch.Tensor)


@torchfut_aio.distributed.async_comm_hook
async def reduce(state: dist.ProcessGroup, bucket: GradBucket) -> torch.Tensor:
    await as_future(state.allreduce([bucket.buffer()]))
    return bucket.buffer()


def hook(state: object, bucket: GradBucket) -> torchfut_aio.Future[torch.Tensor]:
    fut: Future[torch.Tensor] = Future()
    fut.set_result(bucket.buffer())
    return fut


def hooks() -> list[Callable[[Any, GradBucket], torch.futures.Future[torch.Tensor]]]:
    return [reduce, hook]


def for_torch(fut: Future[int]) -> torch.futures.Future[int]:
    def takes_torchs(fut: torch.futures.Future[int]) -> int:
        return fut.wait()

    print(takes_torchs(fut))
    return fut


# ------------------------------------------------------------------------- a task's state


@task_local_state
async def predict(fut: Future[int], *, scale: float) -> float:
    with torch.no_grad():
        return await fut * scale


async def predicts(fut: Future[int]) -> None:
    assert_type(await predict(fut, scale=2.0), float)
    assert_type(await task_local_state(predict(fut, scale=2.0)), float)

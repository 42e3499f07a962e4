"""Run batches on workers of other machines: a worker that fails is put aside until it answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio

Worker = Callable[[list[Any]], Awaitable[Sequence[Any]]]


class WorkerError(Exception):
    """A batch failed because its worker failed, or because no worker was free."""


@asynccontextmanager
async def worker_pool(workers: Mapping[str, Worker], limit: float) -> AsyncIterator[Worker]:
    """Yield a batch function. A worker has ``limit`` seconds for a batch."""
    free, next_free = anyio.create_memory_object_stream[str](len(workers))

    async def run(items: list[Any]) -> Sequence[Any]:
        try:
            with anyio.fail_after(limit):
                name = await next_free.receive()
        except TimeoutError:
            raise WorkerError(f"no worker was free within {limit:g} s") from None
        try:
            with anyio.fail_after(limit):
                results = await workers[name](items)
        except Exception as error:
            tasks.start_soon(put_aside, name)
            late = isinstance(error, TimeoutError)
            what = f"no answer within {limit:g} s" if late else repr(error)
            raise WorkerError(f"{name}: {what}") from error
        free.send_nowait(name)
        return results

    async def put_aside(name: str) -> None:
        while True:
            with suppress(Exception), anyio.fail_after(limit):
                await workers[name]([])  # an empty batch is a ping
                break
            await anyio.sleep(limit / 4)
        free.send_nowait(name)

    async with anyio.create_task_group() as tasks:
        with free, next_free:
            for name in workers:
                free.send_nowait(name)
            yield run
            tasks.cancel_scope.cancel()

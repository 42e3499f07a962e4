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
    """Yield a batch function. A batch runs on a free worker, or fails within ``limit`` seconds."""
    free, next_free = anyio.create_memory_object_stream[str](len(workers))

    async def run(items: list[Any]) -> Sequence[Any]:
        name = None
        try:
            with anyio.fail_after(limit):
                name = await next_free.receive()
                results = await workers[name](items)
        except Exception as error:
            if name is None:
                raise WorkerError(f"no worker was free within {limit:g} s") from None
            tasks.start_soon(put_aside, name)
            raise WorkerError(f"{name} failed: {error!r}") from error
        free.send_nowait(name)
        return results

    async def put_aside(name: str) -> None:
        answered = False
        while not answered:
            with suppress(Exception), anyio.fail_after(limit):
                await workers[name]([])  # an empty batch is a ping
                answered = True
            await anyio.sleep(0 if answered else limit / 4)
        free.send_nowait(name)

    async with anyio.create_task_group() as tasks:
        with free, next_free:
            for name in workers:
                free.send_nowait(name)
            yield run
            tasks.cancel_scope.cancel()

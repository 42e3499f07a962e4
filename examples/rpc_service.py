"""An async parameter service over RPC: one process serves, the others train with it.

    pip install '.[examples]'    # in a checkout
    torchrun --standalone --nproc-per-node 3 examples/rpc_service.py

Hundreds of clients in each training process pull rows of a table, which must not be too
old, and push gradients. A pull that waits for the updates of other clients is a coroutine
that awaits a condition: the server keeps hundreds of them in flight on one thread.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time

import anyio
import torch
import torch.distributed.rpc as rpc

from torchfut_aio import as_future
from torchfut_aio.distributed import async_rpc, shutdown

ROWS, COLUMNS = 512, 16
CLIENTS = 200  # of each training process
ROUNDS = 5


class Table:
    """The parameters, and how often they have been updated; used only on the server's loop."""

    def __init__(self) -> None:
        self.rows = torch.zeros(ROWS, COLUMNS)
        self.version = 0
        self.updated = asyncio.Condition()
        self.calls = self.in_flight = self.most_in_flight = 0
        self.threads: set[int] = set()


table = Table()


@async_rpc
async def pull(rows: torch.Tensor, version: int) -> torch.Tensor:
    """Return rows of the table, once it has been updated ``version`` times."""
    table.calls += 1
    table.threads.add(threading.get_ident())
    table.in_flight += 1
    table.most_in_flight = max(table.most_in_flight, table.in_flight)
    async with table.updated:
        await table.updated.wait_for(lambda: table.version >= version)
    table.in_flight -= 1
    return table.rows[rows]


@async_rpc
async def push(rows: torch.Tensor, gradient: torch.Tensor) -> None:
    """Take a step against the gradient."""
    table.calls += 1
    async with table.updated:
        table.rows.index_add_(0, rows, gradient, alpha=-0.25)
        table.version += 1
        table.updated.notify_all()


async def client(number: int, trainers: int, target: torch.Tensor, losses: list[float]) -> None:
    generator = torch.Generator().manual_seed(number)
    for round_ in range(ROUNDS):
        rows = torch.randint(0, ROWS, (32,), generator=generator).unique()
        # At least half of the previous round must have been applied, so no client gets far ahead.
        version = max(0, round_ * trainers * CLIENTS - trainers * CLIENTS // 2)
        weights = await as_future(rpc.rpc_async("server", pull, args=(rows, version)))
        error = weights - target[rows]
        losses.append(error.square().mean().item())
        await as_future(rpc.rpc_async("server", push, args=(rows, 0.1 * error)))


async def train(rank: int, trainers: int) -> None:
    target = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    losses: list[float] = []
    start = time.perf_counter()
    async with anyio.create_task_group() as group:
        for number in range(CLIENTS):
            group.start_soon(client, rank * CLIENTS + number, trainers, target, losses)
    seconds = time.perf_counter() - start
    print(
        f"trainer {rank}: {CLIENTS} clients made {2 * CLIENTS * ROUNDS:,} calls in "
        f"{seconds:.2f} s; loss {losses[0]:.3f} -> {losses[-1]:.3f}",
        flush=True,
    )
    if rank == 1:
        try:
            await as_future(rpc.rpc_async("server", pull, args=(None, 10**9), timeout=0.2))
        except TimeoutError as error:
            print(f"trainer 1: a pull of the far future: TimeoutError: {error}", flush=True)


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    rpc.init_rpc("server" if rank == 0 else f"trainer{rank}", rank=rank, world_size=size)
    if rank > 0:
        asyncio.run(train(rank, size - 1))
    shutdown()  # waits until all processes have finished their calls
    if rank == 0:
        print(
            f"server: {table.calls:,} calls on {len(table.threads)} thread, "
            f"at most {table.most_in_flight} pulls waiting at once"
        )


if __name__ == "__main__":
    main()

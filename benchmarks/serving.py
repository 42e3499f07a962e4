"""A server under load: five ways to run a model, of which four are what programs deploy.

Each server has its own process: four are Starlette on uvicorn and uvloop; Ray Serve runs if it is
installed. This process is the load. Each client sends its next request when the one before has been
answered. Every tenth request has a time limit that is too short. The server has the limit in a
header, and the client disconnects soon after it. An item is run too late if that begins later than
LATE after its limit. CPU is that of all processes of the server.

Ray listens on all addresses. To keep it off the network:
``unshare --net sh -c 'ip link set lo up; python -m benchmarks serving'``
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import itertools
import multiprocessing
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from time import monotonic, sleep
from typing import Any

import aiohttp
import psutil
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.digits import classify, new_classifier
from examples.embedder import Embedder
from torchfut_aio import Batcher

from ._bench import Case, Figures, percentiles, run

ROUNDS, BY = 3, "clients"
PLOTS = {"serving": "CPU second"}
LARGEST = {"embeddings": 16, "digits": 64}  # batch
MAX_WAIT = 0.002  # seconds that the first item of a batch waits for others
MAX_QUEUE = 1000
LATE = 0.01  # seconds; a busy loop notices that late that the time of a request is over
SLACK = 0.1  # seconds after its limit that a client waits for the server's answer
PATIENCE = 60.0  # seconds; the time limit of the other requests
TEXTS = [
    f"{question} {thing}?"
    for question in ("How do I change", "Where can I see the status of", "Who may cancel")
    for thing in ("my password", "an order of last week", "the address of a parcel", "the invoice")
]
IMAGES = [[(number + n) % 17 for n in range(64)] for number in range(17)]
# A model, its requests, the short limit and how long it is measured, both for each client.
MODELS = [("embeddings", TEXTS, 0.002, 0.06), ("digits", IMAGES, 0.0001, 0.01)]

Item = tuple[float, Any]  # when its time is over, and what the client sent
Answer = Callable[[Item], Awaitable[Any]]


class Model:
    """Run a model on a list of items; count them, and those whose time was over."""

    def __init__(self, name: str) -> None:
        torch.set_num_threads(1)
        if name == "embeddings":
            embedder = Embedder()
            self._run = lambda texts: embedder.embed([*map(embedder.tokenize, texts)]).tolist()
        else:
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
    """Run batches in a task, without the items of cancelled requests: a careful version."""
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
async def in_threads(run: Any, model: Model, _largest: int) -> AsyncIterator[Answer]:
    async def answer(item: Item) -> Any:
        return (await run(model, [item]))[0]

    yield answer


async def executor(model: Model, items: list[Item]) -> list[Any]:
    return await asyncio.get_running_loop().run_in_executor(None, model, items)


async def item_of(request: Request) -> tuple[float, Item]:
    """Return the time limit of a request, and its item."""
    limit = float(request.headers["limit"])
    return limit, (monotonic() + limit, await request.json())


def serve(
    way: Callable[[Model, int], AbstractAsyncContextManager[Answer]],
    name: str,
    port: int,
    *,
    limited: bool = True,
) -> None:
    """Answer ``POST /``, if limited within the time in its header, and ``POST /counts``."""
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
    """Answer the same requests. Ray Serve cancels a request when its client disconnects."""
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


WAYS = {
    "Batcher": partial(serve, batcher),
    "asyncio.Queue by hand": partial(serve, queue_by_hand),
    # As Starlette and FastAPI run a plain ``def`` handler, which has no time limit.
    "def endpoint, 40 threads": partial(
        serve, partial(in_threads, run_in_threadpool), limited=False
    ),
    "run_in_executor": partial(serve, partial(in_threads, executor)),
    "Ray Serve, @serve.batch": serve_with_ray,
}


async def load(
    address: str, process: int, samples: list[Any], limit: float, seconds: float, clients: int
) -> dict[str, float]:
    """Let the clients send requests for some seconds, and return the figures."""
    numbers = itertools.count()
    latencies: list[float] = []

    async def client() -> None:
        while (sent := monotonic()) < end:
            number = next(numbers)
            within = limit if number % 10 == 0 else PATIENCE
            body = {"json": samples[number % len(samples)], "headers": {"limit": str(within)}}
            try:
                async with asyncio.timeout(within + SLACK), session.post("/", **body) as response:
                    if response.status != 504:
                        response.raise_for_status()
                        await response.json()
                        latencies.append(monotonic() - sent)
            except TimeoutError:
                if within == PATIENCE:
                    raise

    async def counts() -> Any:
        async with session.post("/counts") as response:
            return await response.json(content_type=None)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(address, connector=connector) as session:
        begin = monotonic() + seconds / 2  # it warms up
        end = begin + seconds
        tasks = [asyncio.ensure_future(client()) for _ in range(clients)]
        await asyncio.sleep(begin - monotonic())
        latencies.clear()
        before, cpu, begin = await counts(), cpu_of(process), monotonic()
        await asyncio.sleep(end - begin)
        cpu, took, counted = cpu_of(process) - cpu, monotonic() - begin, latencies[:]
        await asyncio.gather(*tasks)  # or the error of the first that was not answered
        items, late = (now - then for now, then in zip(await counts(), before, strict=True))
    return {
        "answers a second": len(counted) / took,
        "answers a CPU second": len(counted) / cpu,
        **percentiles("{}, ms", counted, 1e-3),
        "items run too late, %": late / items * 100,
    }


def cpu_of(process: int) -> float:
    """Return how many seconds of CPU a process and its descendants have taken."""
    parent = psutil.Process(process)
    return sum(sum(each.cpu_times()[:2]) for each in [parent, *parent.children(recursive=True)])


async def loads(address: str, process: BaseProcess, model: Any, quick: bool) -> Figures:
    name, samples, limit, seconds = model
    async with aiohttp.ClientSession(address) as session:
        started = False
        while not started:
            if not process.is_alive():
                raise RuntimeError("the server has ended")
            await asyncio.sleep(0.1)
            with suppress(aiohttp.ClientConnectorError):
                async with session.post("/counts") as response:
                    started = response.ok
    figures: dict[tuple[str, Any], float] = {}
    for clients in (1, 16) if quick else (1, 16, 64, 256):
        duration = 1 if quick else 4 + clients * seconds
        args = (address, process.pid, samples, limit * clients, duration, clients)
        for title, figure in (await load(*args)).items():
            figures[f"{name}: {title}", clients] = figure
    return figures


def measured(way: str, model: Any, quick: bool) -> Figures:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=WAYS[way], args=(model[0], port))
    process.start()
    try:
        return run("uvloop", loads, f"http://127.0.0.1:{port}", process, model, quick)
    finally:
        process.terminate()
        process.join()


def cases(quick: bool) -> Iterator[Case]:
    ways = [*WAYS] if importlib.util.find_spec("ray") else [*WAYS][:-1]
    for model in MODELS:
        yield {way: partial(measured, way, model, quick) for way in ways}

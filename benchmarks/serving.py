"""A server under load: the digits of examples/http_server.py, and ways to answer from a thread.

Starlette on uvicorn and uvloop, in a process of its own. ``POST /NAME`` takes an image, and a
thread runs the model on up to 64 of them at once, after 2 ms at most. The ways differ in how the
request waits for its digit: a `Batcher`, or a worker thread written by hand that completes
futures of torch, of `concurrent.futures` or of the loop. The executor has a thread for each
connection. This process is the load: each connection sends its next request when it has the
answer to the one before. One way at a time has load.
"""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import os
import re
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from statistics import quantiles
from threading import Thread
from time import monotonic
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from torchfut_aio import Batcher

from ._bench import Bench, Case, run
from ._ways import BARE, BARE_BATCH, BRIDGE, THREAD, WRAP, way

CONNECTIONS = 256
MAX_BATCH, MAX_WAIT = 64, 0.002
OURS = "Batcher"
NAMES = (OURS, BARE_BATCH, BARE, BRIDGE, WRAP, THREAD)
PIXELS = json.dumps([float(n % 17) for n in range(64)]).encode()

# ------------------------------------------------------------------------------ the server

Predict = Callable[[list[torch.Tensor]], list[int]]
Answer = Callable[[torch.Tensor], Awaitable[int]]


def by_hand(name: str, predict: Predict) -> Answer:
    """Returns what queues an image for a worker thread, and waits for its digit."""
    this = way("uvloop", name)
    queue: SimpleQueue[tuple[torch.Tensor, Any]] = SimpleQueue()

    def work() -> None:
        while True:
            images, futures = zip(*next_batch(queue), strict=True)
            this.complete(futures, predict(list(images)))

    async def answer(image: torch.Tensor) -> int:
        fut = this.new()
        queue.put((image, fut))
        digit: int = await this.wait(fut)
        return digit

    Thread(target=work, daemon=True).start()
    return answer


def next_batch(queue: SimpleQueue[Any]) -> list[Any]:
    batch = [queue.get()]
    due = monotonic() + MAX_WAIT
    with suppress(Empty):
        while len(batch) < MAX_BATCH:
            batch.append(queue.get(timeout=max(0, due - monotonic())))
    return batch


class Service:
    """Answers with the digit that an image shows, in the way that the path names."""

    def __init__(self, predict: Predict) -> None:
        self._predict = predict
        self._answers: list[Answer] = []
        routes = [Route("/{way:int}", self.digit, methods=["POST"])]
        self.app = Starlette(routes=routes, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(CONNECTIONS))
        async with Batcher(
            self._predict, max_batch=MAX_BATCH, max_wait=MAX_WAIT, max_queue=CONNECTIONS
        ) as batcher:
            self._answers = [
                batcher.submit if name == OURS else by_hand(name, self._predict) for name in NAMES
            ]
            yield

    async def digit(self, request: Request) -> Response:
        """Answers a request."""
        image = torch.tensor(json.loads(await request.body())).reshape(1, 8, 8) / 16
        answer = self._answers[request.path_params["way"]]
        return JSONResponse({"digit": await answer(image)})


def serve(listener: socket.socket) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import quickstart

    torch.set_num_threads(1)
    quickstart.EPOCHS = 0  # a model that has learnt nothing takes as long
    model = quickstart.train(torch.empty(0), torch.empty(0))
    service = Service(partial(quickstart.classify, model))
    config = uvicorn.Config(service.app, loop="uvloop", ws="none", log_level="warning")
    gc.freeze()
    uvicorn.Server(config).run([listener])


@contextmanager
def server() -> Iterator[tuple[int, int]]:
    """Gives the port and the process of a server that runs until the end."""
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0), backlog=2 * CONNECTIONS) as listener:
        port: int = listener.getsockname()[1]
        process = context.Process(target=serve, args=(listener,))
        process.start()
    try:
        # It answers when it has started.
        urllib.request.urlopen(f"http://127.0.0.1:{port}/0", PIXELS, timeout=300).close()
        assert process.pid is not None
        yield port, process.pid
    finally:
        process.terminate()
        process.join()


def cpu_of(process: int) -> float:
    """Returns how many seconds of CPU a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------ the client


class Client(asyncio.Protocol):
    """A connection that sends a request, and the next one when it has its answer, if it may."""

    def __init__(self, way: int, latencies: list[float], errors: list[str]) -> None:
        head = f"POST /{way} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(PIXELS)}\r\n\r\n"
        self._request = head.encode() + PIXELS
        self._latencies, self._errors = latencies, errors
        self._answer = b""
        self._is_closing = False
        self.goes_on = False
        self.answered = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        """Keeps the transport."""
        self._transport = transport

    def send(self) -> None:
        """Sends a request."""
        self._sent = monotonic()
        self._answer = b""
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Takes in an answer, or a part of it."""
        self._answer += data
        head, _, body = self._answer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if length is None or len(body) < int(length[1]):
            return
        self._latencies.append(monotonic() - self._sent)
        if not head.startswith(b"HTTP/1.1 200"):
            self._errors.append(head.decode())
        self.answered.set()
        if self.goes_on:
            self.send()

    def connection_lost(self, _error: Exception | None) -> None:
        """Notes if it was the server that closed the connection."""
        if not self._is_closing:
            self._errors.append("the server closed the connection")
            self.answered.set()

    def close(self) -> None:
        """Closes the connection."""
        self.goes_on = False
        self._is_closing = True
        self._transport.close()


async def load(port: int, process: int, way: int, seconds: float) -> list[float]:
    """Returns requests a second, ms of p50 and p99, us of CPU a request, and errors."""
    latencies: list[float] = []
    errors: list[str] = []
    clients = []
    for _ in range(CONNECTIONS):
        new = partial(Client, way, latencies, errors)
        _, client = await asyncio.get_running_loop().create_connection(new, "127.0.0.1", port)
        clients.append(client)
        # uvloop accepts one connection a turn: if those before it were at work already, the
        # last would wait for 256 long turns.
        client.send()
        await client.answered.wait()
    for client in clients:
        client.goes_on = True
        client.send()
    await asyncio.sleep(seconds / 4)  # it warms up
    latencies.clear()
    cpu, begin = cpu_of(process), monotonic()
    await asyncio.sleep(seconds)
    cpu, took = cpu_of(process) - cpu, monotonic() - begin
    answered = len(latencies)
    at = quantiles(latencies, n=100, method="inclusive")
    for client in clients:
        client.close()
    await asyncio.sleep(0.2)  # the server answers what is under way
    return [answered / took, at[49] * 1e3, at[98] * 1e3, cpu / answered * 1e6, len(errors)]


COLUMNS = ("requests a second", "p50, ms", "p99, ms", "CPU of a request, us", "errors")


def main(bench: Bench) -> None:
    table = bench.table(
        f"A server with {CONNECTIONS} connections", "", x="", ours=(OURS,), plot=COLUMNS[0]
    )
    seconds = 1 if bench.quick else 4
    with server() as (port, process):
        peers = {
            name: partial(run, "uvloop", load, port, process, way, seconds)
            for way, name in enumerate(NAMES)
        }
        bench.cases.append(Case([(table, column) for column in COLUMNS], peers))
        bench.measure(rounds=9)

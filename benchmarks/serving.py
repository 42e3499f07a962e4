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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
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

from ._bench import Case, Figures, run
from ._ways import BARE, BARE_BATCH, BRIDGE, THREAD, WRAP, way

ROUNDS, DRAWN = 9, ""
CONNECTIONS = 256
MAX_BATCH, MAX_WAIT = 64, 0.002
OURS = "Batcher"
NAMES = (OURS, BARE_BATCH, BARE, BRIDGE, WRAP, THREAD)
PIXELS = json.dumps([float(n % 17) for n in range(64)]).encode()

# ------------------------------------------------------------------------------ the server

Predict = Callable[[list[torch.Tensor]], list[int]]
Answer = Callable[[torch.Tensor], Awaitable[int]]


def by_hand(name: str, predict: Predict) -> Answer:
    """Return what queues an image for a worker thread, and waits for its digit."""
    this = way("uvloop", name)
    queue: SimpleQueue[tuple[torch.Tensor, Any]] = SimpleQueue()

    def work() -> None:
        while True:
            batch = [queue.get()]
            due = monotonic() + MAX_WAIT
            with suppress(Empty):
                while len(batch) < MAX_BATCH:
                    batch.append(queue.get(timeout=max(0, due - monotonic())))
            images, futures = zip(*batch, strict=True)
            this.complete(futures, predict(list(images)))
            del batch, images, futures

    async def answer(image: torch.Tensor) -> int:
        fut = this.new()
        queue.put((image, fut))
        digit: int = await this.wait(fut)
        return digit

    Thread(target=work, daemon=True).start()
    return answer


def application(predict: Predict) -> Starlette:
    answers: dict[int, Answer] = {}

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(CONNECTIONS))
        options = {"max_batch_size": MAX_BATCH, "max_wait": MAX_WAIT, "max_queue_size": CONNECTIONS}
        async with Batcher(predict, **options) as batcher:
            for number, name in enumerate(NAMES):
                answers[number] = batcher if name == OURS else by_hand(name, predict)
            yield

    async def digit(request: Request) -> Response:
        image = torch.tensor(json.loads(await request.body())).reshape(1, 8, 8) / 16
        return JSONResponse({"digit": await answers[request.path_params["way"]](image)})

    return Starlette(routes=[Route("/{way:int}", digit, methods=["POST"])], lifespan=lifespan)


def serve(listener: socket.socket) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import digits

    torch.set_num_threads(1)
    predict = partial(digits.classify, digits.new_classifier())  # untrained, it takes as long
    gc.freeze()
    config = uvicorn.Config(application(predict), loop="uvloop", ws="none", log_level="warning")
    uvicorn.Server(config).run([listener])


def cpu_of(process: int) -> float:
    """Return how many seconds of CPU a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -------------------------------------------------------------------------------- the load


async def load(address: Any, process: int, number: int, seconds: float) -> Figures:
    latencies: list[float] = []
    head = f"POST /{number} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(PIXELS)}\r\n\r\n"
    streams = [await asyncio.open_connection(*address) for _ in range(CONNECTIONS)]

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = monotonic()
        writer.write(head.encode() + PIXELS)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer)
        if length is None or not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer.decode())
        await reader.readexactly(int(length[1]))
        latencies.append(monotonic() - sent)

    async def ask_again(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while monotonic() < end:
            await ask(reader, writer)
        writer.close()

    # uvloop accepts one connection a turn: if those before it were at work already, the last
    # would wait for 256 long turns.
    for stream in streams:
        await ask(*stream)
    begin = monotonic() + seconds / 4  # it warms up
    end = begin + seconds
    tasks = [asyncio.ensure_future(ask_again(*stream)) for stream in streams]
    await asyncio.sleep(begin - monotonic())
    latencies.clear()
    cpu, begin = cpu_of(process), monotonic()
    await asyncio.sleep(end - begin)
    cpu, took, counted = cpu_of(process) - cpu, monotonic() - begin, latencies[:]
    await asyncio.gather(*tasks)  # or the error of the first that was not answered
    at, answered = quantiles(counted, n=100, method="inclusive"), len(counted)
    columns = {
        "requests a second": answered / took,
        "p50, ms": at[49] * 1e3,
        "p99, ms": at[98] * 1e3,
        "CPU of a request, us": cpu / answered * 1e6,
    }
    title = f"A server with {CONNECTIONS} connections"
    return {(title, column): figure for column, figure in columns.items()}


def cases(quick: bool) -> Iterator[Case]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=2 * CONNECTIONS)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=(listener,), daemon=True)
    process.start()  # it ends with this process, and answers when it has started
    seconds = 1 if quick else 4
    yield {
        name: partial(run, "uvloop", load, listener.getsockname(), process.pid, number, seconds)
        for number, name in enumerate(NAMES)
    }

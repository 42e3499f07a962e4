"""A server under load: five ways to run a model, of which four are what people deploy.

Each is a server in a process of its own, see `_servers`; Ray Serve only if it is installed. This
process is the load. Each client sends its next request when it has the answer to the one before.
Every tenth request has a time limit that is too short. The server has the limit in a header, and
the client leaves soon after it. An item is run too late if that begins later than LATE after its
limit. CPU is that of all processes of the server.

Ray listens on all addresses. To keep it off the network:
``unshare --net sh -c 'ip link set lo up; python -m benchmarks serving'``
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import multiprocessing
import socket
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from statistics import quantiles
from time import monotonic
from typing import Any

import aiohttp
import psutil

from . import _servers
from ._bench import Case, Figures, run

ROUNDS, DRAWN, BY = 3, "CPU second", "clients"
WAYS = {
    "Batcher": partial(_servers.serve, _servers.batcher),
    "asyncio.Queue by hand": partial(_servers.serve, _servers.queue_by_hand),
    "def endpoint, 40 threads": partial(_servers.serve, _servers.def_endpoint, limited=False),
    "run_in_executor": partial(_servers.serve, _servers.executor),
    "Ray Serve, @serve.batch": _servers.serve_with_ray,
}
SLACK = 0.1  # seconds after its limit that a client waits for the server to say so
PATIENCE = 60.0  # seconds; the time limit of the other requests
TEXTS = [
    f"{question} {thing}?"
    for question in ("How do I change", "Where can I see the status of", "Who may cancel")
    for thing in ("my password", "an order of last week", "the address of a parcel", "the invoice")
]
IMAGES = [[(number + n) % 17 for n in range(64)] for number in range(17)]
# A model, what it is asked, the short limit and how long it is measured, both for each client.
MODELS = [("embeddings", TEXTS, 0.002, 0.06), ("digits", IMAGES, 0.0001, 0.01)]


async def load(
    address: str, process: int, samples: list[Any], limit: float, seconds: float, clients: int
) -> dict[str, float]:
    """Let the clients ask for so many seconds, and return the figures."""
    numbers = itertools.count()
    latencies: list[float] = []

    async def ask() -> None:
        number, sent = next(numbers), monotonic()
        within = limit if number % 10 == 0 else PATIENCE
        options = {"json": samples[number % len(samples)], "headers": {"limit": str(within)}}
        try:
            async with asyncio.timeout(within + SLACK), session.post("/", **options) as response:
                if response.status != 504:
                    response.raise_for_status()
                    await response.json()
                    latencies.append(monotonic() - sent)
        except TimeoutError:
            if within == PATIENCE:
                raise

    async def counts() -> list[int]:
        async with session.post("/counts") as response:
            numbers: list[int] = await response.json(content_type=None)
            return numbers

    async def client() -> None:
        while monotonic() < end:
            await ask()

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
    at = quantiles(counted, n=100, method="inclusive")
    return {
        "answers a second": len(counted) / took,
        "answers a CPU second": len(counted) / cpu,
        "p50, ms": at[49] * 1e3,
        "p99, ms": at[98] * 1e3,
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

"""What a token costs on its way from a thread to a task, through one of many streams.

A thread puts tokens into 100 streams: into each one token, or ten at once, then it rests for a
millisecond. A task for each stream reads them. The figure is the CPU time of the process, by token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from threading import Thread
from time import process_time, sleep
from typing import Any

import culsans
import janus

from torchfut_aio import ValueStream

from ._bench import Case, Figures, run

ROUNDS, BY = 15, ""
PLOTS = {"streams": "CPU"}
STREAMS = 100
TOKENS = 100  # of a stream
REST = 1e-3  # seconds


def put_each(put: Callable[[int], object], tokens: list[int]) -> None:
    for token in tokens:
        put(token)


def put_in_thread(queue: Any, tokens: list[int], _: object) -> None:
    put_each(queue.sync_q.put_nowait, tokens)


# How to make a stream, and to put tokens into it, also with the loop's ``call_soon_threadsafe``.
PEERS: dict[str, tuple[Callable[[], Any], Callable[[Any, list[int], Any], object]]] = {
    "put": (ValueStream, lambda stream, tokens, _: put_each(stream.put, tokens)),
    "put_many": (ValueStream, lambda stream, tokens, _: stream.put_many(tokens)),
    "asyncio.Queue, one wake-up a token": (
        asyncio.Queue,
        lambda queue, tokens, wake: put_each(partial(wake, queue.put_nowait), tokens),
    ),
    "asyncio.Queue, one wake-up a batch": (
        asyncio.Queue,
        lambda queue, tokens, wake: wake(put_each, queue.put_nowait, tokens),
    ),
    "janus": (janus.Queue, put_in_thread),
    "culsans": (culsans.Queue, put_in_thread),
}


async def read(stream: Any) -> None:
    """Read tokens until a 0."""
    if isinstance(stream, ValueStream):
        async for token in stream:
            if not token:
                return
    get = getattr(stream, "async_q", stream).get
    while await get():
        pass


async def cost(loop: str, name: str, at_once: int, tokens: int) -> Figures:
    new, feed = PEERS[name]
    wake = asyncio.get_running_loop().call_soon_threadsafe
    streams = [new() for _ in range(STREAMS)]

    def produce() -> None:
        for _ in range(tokens // at_once):
            for stream in streams:
                feed(stream, [1] * at_once, wake)
            sleep(REST)
        for stream in streams:
            feed(stream, [0], wake)

    tasks = [asyncio.ensure_future(read(stream)) for stream in streams]
    await asyncio.sleep(0.01)
    thread = Thread(target=produce)
    start = process_time()
    thread.start()
    await asyncio.gather(*tasks)
    took = process_time() - start
    thread.join()
    title = f"Microseconds of CPU for a token through one of {STREAMS} streams, on {loop}"
    return {(title, f"{at_once} at a time"): took / tokens / STREAMS * 1e6}


def cases(quick: bool) -> Iterator[Case]:
    tokens = 20 if quick else TOKENS
    for loop in ("asyncio", "uvloop"):
        for at_once in (1, 10):
            yield {name: partial(run, loop, cost, loop, name, at_once, tokens) for name in PEERS}

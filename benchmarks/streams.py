"""What a value costs that goes from a thread to a task through one of many streams.

A thread generates tokens for 100 streams: for each one token, or ten at once, then it rests a
millisecond. A task a stream reads them. What counts is the CPU time of the process, by tokens.
The peers are what is written today: an asyncio.Queue, fed by a ``call_soon_threadsafe`` for each
token or for ten at once, and the queues of janus and culsans.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from threading import Thread
from time import process_time, sleep
from typing import Any, NamedTuple

import culsans
import janus

from torchfut_aio import ValueStream

from ._bench import Case, Figures, installed, run

ROUNDS, DRAWN = 15, ""
STREAMS = 100
TOKENS = 100  # of a stream
REST = 1e-3  # seconds


class Peer(NamedTuple):
    """How a stream is made, fed from the thread and ended there, and read."""

    new: Callable[[], Any]
    push: Callable[[Any, list[int]], object]
    end: Callable[[Any], object]
    read: Callable[[Any], Awaitable[None]]


async def iterate(stream: ValueStream[int]) -> None:
    async for _ in stream:
        pass


def of_stream(push: Callable[[ValueStream[int], list[int]], object]) -> Peer:
    return Peer(ValueStream, push, ValueStream.close, iterate)


def of_queue(new: Callable[[], Any], push: Callable[[Any, list[int]], object]) -> Peer:
    async def read(queue: Any) -> None:
        get = queue.get if isinstance(queue, asyncio.Queue) else queue.async_q.get
        while await get():
            pass

    return Peer(new, push, lambda queue: push(queue, [0]), read)


def put_each(queue: Any, tokens: list[int]) -> None:
    for token in tokens:
        queue.put_nowait(token)


# By name, what makes a peer for a loop, of which it gets ``call_soon_threadsafe``.
PEERS: dict[str, Callable[[Callable[..., object]], Peer]] = {
    "push": lambda _: of_stream(lambda stream, tokens: [stream.push(each) for each in tokens]),
    "push_many": lambda _: of_stream(ValueStream.push_many),
    "asyncio.Queue, one wake-up a token": lambda wake: of_queue(
        asyncio.Queue, lambda queue, tokens: [wake(queue.put_nowait, each) for each in tokens]
    ),
    "asyncio.Queue, one wake-up a batch": lambda wake: of_queue(
        asyncio.Queue, partial(wake, put_each)
    ),
    "janus": lambda _: of_queue(janus.Queue, lambda each, tokens: put_each(each.sync_q, tokens)),
    "culsans": lambda _: of_queue(
        culsans.Queue, lambda each, tokens: put_each(each.sync_q, tokens)
    ),
}


async def cost(loop: str, name: str, at_once: int, tokens: int) -> Figures:
    peer = PEERS[name](asyncio.get_running_loop().call_soon_threadsafe)
    streams = [peer.new() for _ in range(STREAMS)]

    def produce() -> None:
        for _ in range(tokens // at_once):
            for stream in streams:
                peer.push(stream, [1] * at_once)
            sleep(REST)
        for stream in streams:
            peer.end(stream)

    tasks = [asyncio.ensure_future(peer.read(stream)) for stream in streams]
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
    for loop in installed("asyncio", "uvloop"):
        for at_once in (1, 10):
            yield Case(
                {name: partial(run, loop, cost, loop, name, at_once, tokens) for name in PEERS}
            )

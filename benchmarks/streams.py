"""What a value costs that goes from a thread to a task through one of many streams.

A thread generates tokens for 100 streams: for each one token, or ten at once, then it rests a
millisecond. A task a stream reads them. What counts is the CPU time of the process, by tokens.
The peers are what is written today: an asyncio.Queue, fed by one ``call_soon_threadsafe`` a
token, or one for ten; and the queues of janus and culsans, where these are installed.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from threading import Thread
from time import process_time, sleep
from typing import Any, NamedTuple

from torchfut_aio import ValueStream

from ._bench import Bench, Case, run

STREAMS = 100
AT_ONCE = 10  # tokens
REST = 1e-3  # seconds


class Peer(NamedTuple):
    """How a stream is made, fed from the thread and ended there, and read."""

    new: Callable[[], Any]
    push: Callable[[Any, list[int]], object]
    end: Callable[[Any], object]
    read: Callable[[Any], Coroutine[Any, Any, None]]


def streams(push: Callable[[Any, list[int]], object]) -> Peer:
    async def read(stream: ValueStream[int]) -> None:
        async for _ in stream:
            pass

    return Peer(ValueStream, push, ValueStream.close, read)


def queues(push_of: Callable[[asyncio.AbstractEventLoop], Any]) -> Peer:
    async def read(queue: asyncio.Queue[int]) -> None:
        while await queue.get():
            pass

    push = push_of(asyncio.get_running_loop())
    return Peer(asyncio.Queue, push, lambda queue: push(queue, [0]), read)


def one_by_one(loop: asyncio.AbstractEventLoop) -> Any:
    return lambda queue, tokens: [
        loop.call_soon_threadsafe(queue.put_nowait, token) for token in tokens
    ]


def at_once(loop: asyncio.AbstractEventLoop) -> Any:
    def put_all(queue: asyncio.Queue[int], tokens: list[int]) -> None:
        for token in tokens:
            queue.put_nowait(token)

    return partial(loop.call_soon_threadsafe, put_all)


def library(name: str) -> Peer:
    def push(queue: Any, tokens: list[int]) -> None:
        for token in tokens:
            queue.sync_q.put(token)

    async def read(queue: Any) -> None:
        get = queue.async_q.get
        while await get():
            pass

    new = importlib.import_module(name).Queue
    return Peer(new, push, lambda queue: push(queue, [0]), read)


PUSH = "push"
PEERS: dict[str, tuple[Callable[[], Peer], Sequence[int]]] = {
    PUSH: (lambda: streams(lambda stream, tokens: [*map(stream.push, tokens)]), (1, AT_ONCE)),
    "push_many": (lambda: streams(ValueStream.push_many), (AT_ONCE,)),
    "asyncio.Queue, call_soon_threadsafe": (partial(queues, one_by_one), (1, AT_ONCE)),
    "asyncio.Queue, one call for ten": (partial(queues, at_once), (AT_ONCE,)),
    "janus": (partial(library, "janus"), (1, AT_ONCE)),
    "culsans": (partial(library, "culsans"), (1, AT_ONCE)),
}


async def microseconds_a_token(
    peer_of: Callable[[], Peer], at_once: int, tokens: int
) -> list[float]:
    peer = peer_of()
    all_streams = [peer.new() for _ in range(STREAMS)]

    def produce() -> None:
        for _ in range(tokens // at_once):
            for stream in all_streams:
                peer.push(stream, [1] * at_once)
            sleep(REST)
        for stream in all_streams:
            peer.end(stream)

    tasks = [asyncio.create_task(peer.read(stream)) for stream in all_streams]
    await asyncio.sleep(0.01)
    start = process_time()
    thread = Thread(target=produce)
    thread.start()
    for task in tasks:
        await task
    took = process_time() - start
    thread.join()
    return [took / tokens / STREAMS * 1e6]


def main(bench: Bench) -> None:
    tokens = 20 if bench.quick else 100
    peers = {
        name: peer
        for name, peer in PEERS.items()
        if name not in ("janus", "culsans") or importlib.util.find_spec(name)
    }
    for loop in bench.loops("asyncio", "uvloop"):
        table = bench.table(
            f"CPU of a token through one of {STREAMS} streams, on {loop}",
            "microseconds",
            x="tokens of a stream at a time",
            ours=(PUSH, "push_many"),
            plot=f"{AT_ONCE} at a time",
        )
        for at_once in (1, AT_ONCE):
            running = {
                name: partial(run, loop, microseconds_a_token, peer, at_once, tokens)
                for name, (peer, batches) in peers.items()
                if at_once in batches
            }
            bench.cases.append(Case([(table, f"{at_once} at a time")], running))
    bench.measure(rounds=15)

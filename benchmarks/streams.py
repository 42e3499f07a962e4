"""What a value costs that goes from a thread to a task through one of many streams.

    python -m benchmarks.streams [--loop asyncio|uvloop] [--quick] [--rounds N]

A thread generates tokens for 100 streams: one for each, then it rests a millisecond. A task a
stream reads them. What counts is the CPU time of the process, by tokens. The peer is what is
written today: an asyncio.Queue, fed by one ``call_soon_threadsafe`` a token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from statistics import median
from threading import Thread
from time import process_time, sleep
from typing import Any

from torchfut_aio import ValueStream

from ._options import Options
from ._report import Report
from ._rounds import Case, measure
from ._ways import run

STREAMS = 100
AT_ONCE = 10  # tokens that push_many pushes
REST = 1e-3  # seconds
QUEUE = "asyncio.Queue, call_soon_threadsafe"

Peer = tuple[Callable[[int], object], Sequence[Coroutine[Any, Any, None]]]


def streams(at_once: int) -> Peer:
    all_streams = [ValueStream[int]() for _ in range(STREAMS)]

    def produce(tokens: int) -> None:
        for _ in range(tokens // at_once):
            for stream in all_streams:
                if at_once == 1:
                    stream.push(1)
                else:
                    stream.push_many([1] * at_once)
            sleep(REST)
        for stream in all_streams:
            stream.close()

    async def consume(stream: ValueStream[int]) -> None:
        async for _ in stream:
            pass

    return produce, [consume(stream) for stream in all_streams]


def queues() -> Peer:
    loop = asyncio.get_running_loop()
    all_queues: list[asyncio.Queue[int]] = [asyncio.Queue() for _ in range(STREAMS)]

    def produce(tokens: int) -> None:
        for _ in range(tokens):
            for queue in all_queues:
                loop.call_soon_threadsafe(queue.put_nowait, 1)
            sleep(REST)
        for queue in all_queues:
            loop.call_soon_threadsafe(queue.put_nowait, 0)

    async def consume(queue: asyncio.Queue[int]) -> None:
        while await queue.get():
            pass

    return produce, [consume(queue) for queue in all_queues]


async def microseconds_a_token(peer: Callable[[], Peer], tokens: int) -> tuple[float]:
    produce, consumers = peer()
    tasks = [asyncio.create_task(consumer) for consumer in consumers]
    await asyncio.sleep(0.01)
    start = process_time()
    thread = Thread(target=produce, args=(tokens,))
    thread.start()
    for task in tasks:
        await task
    await asyncio.to_thread(thread.join)
    return ((process_time() - start) / tokens / STREAMS * 1e6,)


PEERS = {
    "push": partial(streams, 1),
    "push_many": partial(streams, AT_ONCE),
    QUEUE: queues,
}


def main() -> None:
    parser = Options("streams", __doc__, rounds=15, loops=("asyncio", "uvloop"))
    options = parser.parse()
    report = Report("streams", options)
    tokens = 20 if options.quick else 100
    tables, cases = {}, []
    for loop in options.loops:
        tables[loop] = report.table(
            f"{loop}, {STREAMS} streams", "us of CPU a token", x="tokens a stream", ours="push"
        )
        peers = {
            name: partial(run, loop, microseconds_a_token, peer, tokens)
            for name, peer in PEERS.items()
        }
        cases.append(Case(tokens, [tables[loop]], peers))
    measure(cases, options.rounds)
    for loop in options.loops:
        gain = tables[loop].gain(QUEUE, tokens)
        report.goal(f"{loop}, push, times less than {QUEUE}", gain, at_least=1)
        pairs = zip(*(tables[loop].at(tokens)[name] for name in ("push_many", QUEUE)), strict=True)
        many = median(queue / mine for mine, queue in pairs)
        report.goal(f"{loop}, push_many, times less than {QUEUE}", many, at_least=2)
    report.finish()


if __name__ == "__main__":
    main()

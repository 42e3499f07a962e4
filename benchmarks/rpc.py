"""Thousands of RPCs at once, each of which waits: async functions against blocking ones.

    python -m benchmarks.rpc

One process calls two others, over TensorPipe on loopback, which differ in the loop that
async functions run on. The time is the callee's, from when the first handler starts to
when the last ends; beside it, the caller's, from the first call to the last answer.
Blocking handlers run on the threads of PyTorch's RPC agent, 16 unless told otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
import torch.distributed.rpc as rpc

from torchfut_aio import gather
from torchfut_aio.distributed import async_rpc, shutdown

WAIT = 0.05  # seconds


class Seen:
    """What the handlers of one process have been through since it was last asked."""

    def __init__(self) -> None:
        self.first, self.last = float("inf"), 0.0
        self.threads: set[int] = set()

    def begin(self) -> None:
        """Notes that a handler starts."""
        self.first = min(self.first, perf_counter())
        self.threads.add(threading.get_ident())

    def end(self) -> None:
        """Notes that one ends."""
        self.last = max(self.last, perf_counter())


seen = Seen()


@async_rpc
async def awaits(number: int) -> int:
    seen.begin()
    await asyncio.sleep(WAIT)
    seen.end()
    return number


def blocks(number: int) -> int:
    seen.begin()
    time.sleep(WAIT)
    seen.end()
    return number


def report() -> tuple[float, int]:
    """Returns how long the handlers took, and on how many threads."""
    global seen
    last, seen = seen, Seen()
    return last.last - last.first, len(last.threads)


Row = tuple[float, int, float]


async def measured(callee: str, handler: Callable[[int], Any], calls: int) -> Row:
    start = perf_counter()
    answers = await gather([rpc.rpc_async(callee, handler, args=(n,)) for n in range(calls)])
    seconds = perf_counter() - start
    assert answers == list(range(calls))
    return *rpc.rpc_sync(callee, report), seconds


def start(rank: int, name: str, folder: str) -> None:
    os.environ.update(TP_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{folder}/rpc", rpc_timeout=300)
    rpc.init_rpc(name, rank=rank, world_size=3, rpc_backend_options=options)


def callee(rank: int, name: str, folder: str) -> None:
    if name == "asyncio":
        sys.modules["uvloop"] = None  # type: ignore[assignment]
    start(rank, name, folder)
    shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}\n{options.calls:,} calls at once, each waits "
        f"{WAIT * 1e3:g} ms; medians of {options.rounds} rounds (least to most)"
    )
    ways = [
        ("async, asyncio", "asyncio", awaits),
        ("async, uvloop", "uvloop", awaits),
        ("blocking", "uvloop", blocks),
    ]
    rows: dict[str, list[Row]] = {title: [] for title, _, _ in ways}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        others = [
            context.Process(target=callee, args=(rank, name, folder))
            for rank, name in enumerate(("asyncio", "uvloop"), 1)
        ]
        for process in others:
            process.start()
        start(0, "caller", folder)
        for _, name, handler in ways:  # so that all have started
            asyncio.run(measured(name, handler, 10))
        for number in range(options.rounds):
            for title, name, handler in ways:
                rows[title].append(asyncio.run(measured(name, handler, options.calls)))
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        shutdown()
        for process in others:
            process.join()
    print(f"\n{'':16}{'callee, s':>24}{'caller, s':>24}{'threads':>10}")
    for title, measurements in rows.items():
        inside, threads, outside = zip(*measurements, strict=True)
        print(f"{title:16}{spread(inside):>24}{spread(outside):>24}{max(threads):>10}")


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()

"""Thousands of RPCs at once, each of which waits: async functions against blocking ones.

    python -m benchmarks.rpc [--calls N] [--quick] [--rounds N]

One process calls two others, over TensorPipe on loopback, which differ in the loop that
async functions run on. The time is the callee's, from when the first handler starts to
when the last ends; beside it, the caller's, from the first call to the last answer.
Blocking handlers run on the threads of PyTorch's RPC agent, 16 unless told otherwise.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.distributed.rpc as rpc

from torchfut_aio import gather
from torchfut_aio.distributed import async_rpc, shutdown

from ._options import Options
from ._plot import bars
from ._report import Report, Table
from ._rounds import Case, measure
from ._ways import run

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


def seen_since_last_time() -> tuple[float, int]:
    """Returns how long the handlers took, and on how many threads."""
    global seen
    last, seen = seen, Seen()
    return last.last - last.first, len(last.threads)


async def measured(callee: str, handler: Callable[[int], Any], calls: int) -> Sequence[float]:
    """Returns the callee's seconds, the caller's, and the callee's threads."""
    start = perf_counter()
    answers = await gather([rpc.rpc_async(callee, handler, args=(n,)) for n in range(calls)])
    seconds = perf_counter() - start
    assert answers == list(range(calls))
    of_callee, threads = rpc.rpc_sync(callee, seen_since_last_time)
    return of_callee, seconds, threads


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


OURS = "async, asyncio"
WAYS = {
    OURS: ("asyncio", awaits),
    "async, uvloop": ("uvloop", awaits),
    "blocking": ("uvloop", blocks),
}


def measure_all(tables: Sequence[Table], calls: int, rounds: int) -> None:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        others = [
            context.Process(target=callee, args=(rank, name, folder))
            for rank, name in enumerate(("asyncio", "uvloop"), 1)
        ]
        for process in others:
            process.start()
        start(0, "caller", folder)
        for way in WAYS.values():  # so that all have started
            run("asyncio", measured, *way, 10)
        peers = {name: partial(run, "asyncio", measured, *way, calls) for name, way in WAYS.items()}
        measure([Case(None, tables, peers)], rounds)
        shutdown()
        for process in others:
            process.join()


def main() -> None:
    parser = Options("rpc", __doc__, rounds=5)
    parser.add_argument("--calls", type=int, help="at once (default: 2000; 200 with --quick)")
    options = parser.parse()
    calls = options.calls or (200 if options.quick else 2000)
    report = Report("rpc", options)
    what = f"{calls:,} calls at once, each waits {WAIT * 1e3:g} ms"
    callee_s = report.table(f"{what}: in the callee", "s", ours=OURS)
    caller_s = report.table(f"{what}: in the caller", "s", ours=OURS)
    threads = report.table("threads of the callee that ran handlers", "threads", ours=OURS)
    measure_all([callee_s, caller_s, threads], calls, options.rounds)
    report.plot(
        "",
        bars(
            f"{calls:,} RPCs at once, each of which waits {WAIT * 1e3:g} ms",
            f"medians and quartiles of {options.rounds} rounds; less is better",
            "seconds from the first handler's start to the last one's end",
            {"": callee_s.at(None)},
            ours=OURS,
        ),
    )
    report.finish()


if __name__ == "__main__":
    main()

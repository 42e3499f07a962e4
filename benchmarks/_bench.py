"""Measure peers in turn, round after round.

On a machine whose speed drifts, figures that were measured minutes apart cannot be compared. So a
round measures each peer once, one right after the other, and figures of the same round are
compared. Their order changes, so that no peer always follows the same one.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from statistics import quantiles
from typing import Any

import anyio
import pandas as pd
from tqdm import tqdm

KEYS = ["table", "column", "peer"]
Figures = Mapping[tuple[str, Any], float]  # of one run, by the title of a table and its column
Case = Mapping[str, Callable[[], Figures]]  # by peer, a function that runs it once; first, ours


def measure(cases: Iterable[Case], rounds: int) -> pd.DataFrame:
    """Measure each case in each round; return a row for each figure."""
    cases = list(cases)
    steps = [
        (peer, case[peer])
        for number in range(rounds)
        for case in cases
        for peer in rotated([*case], number)
    ]
    # What torch imported is never garbage. Frozen, it is not searched while the clock runs: the
    # collector sees only the objects of the peers, as in a server.
    gc.collect()
    gc.freeze()
    rows = []
    for peer, run_once in tqdm(steps, disable=None):
        gc.collect()  # of the peer before
        rows += [(*key, peer, figure) for key, figure in run_once().items()]
    return pd.DataFrame(rows, columns=[*KEYS, "figure"])


def rotated(peers: list[str], number: int) -> list[str]:
    """Return peers in the order of this round; the first round leaves them as they are."""
    first = number % len(peers)
    turned = peers[first:] + peers[:first]
    return turned[::-1] if number % 2 else turned


def run(loop: str, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Run an async function on a fresh loop, "asyncio", "uvloop" or "trio"."""
    backend = "trio" if loop == "trio" else "asyncio"
    options = {} if backend == "trio" else {"use_uvloop": loop == "uvloop"}
    return anyio.run(function, *args, backend=backend, backend_options=options)


def run_in_process(code: str, **environment: str) -> list[float]:
    """Run code in a fresh interpreter, and return the numbers that it prints."""
    command = [sys.executable, "-c", code]
    printed = subprocess.check_output(command, env={**os.environ, **environment}, text=True)
    return [float(number) for number in printed.split()]


def percentiles(title: str, times: list[float], unit: float) -> dict[str, float]:
    """Return p50 and p99 of times in seconds; ``title`` has a place for these names."""
    at = quantiles(times, n=100, method="inclusive")
    return {title.format("p50"): at[49] / unit, title.format("p99"): at[98] / unit}

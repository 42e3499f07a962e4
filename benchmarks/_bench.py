"""Measures peers in turn, round after round.

On a machine whose speed drifts, what is measured minutes apart cannot be compared. So a round
measures each peer once, one right after the other, and figures of one round are compared with
each other. Each round begins with another peer, so that none always comes after the same one.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NamedTuple

import anyio
import pandas as pd
from tqdm import tqdm

Figures = Mapping[tuple[str, Any], float]
"""What a peer gives when it is run once, by the title of a table and the column in it."""


class Case(NamedTuple):
    """Peers that are measured side by side, of which the others are compared with the first.

    Args:
        peers: By name, what runs a peer once.
        at_most: Rounds, for what takes long.
    """

    peers: Mapping[str, Callable[[], Figures]]
    at_most: int = sys.maxsize


def measure(cases: Iterable[Case], rounds: int) -> pd.DataFrame:
    """Measures all cases, this many times, and returns each figure with where it belongs."""
    cases = list(cases)
    steps = [
        (number, peer, case.peers[peer])
        for number in range(rounds)
        for case in cases
        if number < case.at_most
        for peer in rotated(list(case.peers), number)
    ]
    # Of what torch imported nothing will ever be rubbish. Frozen, it is not looked through while
    # the clock runs: the collector sees what the peers make, as it does in a server.
    gc.collect()
    gc.freeze()
    rows = []
    for number, peer, run_once in tqdm(steps, disable=None):
        gc.collect()  # nobody pays for the rubbish of the one before
        for (table, column), figure in run_once().items():
            rows.append((table, column, peer, number, figure))
    return pd.DataFrame(rows, columns=["table", "column", "peer", "round", "figure"])


def rotated(names: list[str], number: int) -> list[str]:
    """Returns ``names`` in the order of this round."""
    first = number % len(names)
    return names[first:] + names[:first]


def installed(*loops: str) -> list[str]:
    """Returns those event loops that can be imported."""
    return [loop for loop in loops if importlib.util.find_spec(loop)]


def run(loop: str, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Runs an async function on a fresh loop, "asyncio", "uvloop" or "trio"."""
    backend = "trio" if loop == "trio" else "asyncio"
    options = {} if backend == "trio" else {"use_uvloop": loop == "uvloop"}
    return anyio.run(function, *args, backend=backend, backend_options=options)

"""Measures peers in turn, round after round.

On a machine whose speed drifts, what is measured minutes apart cannot be compared. So a round
measures each peer once, one right after the other, and figures of one round are compared with
each other. Each round begins with another peer, and every other one goes backwards, so that
none always comes after the same one.
"""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import anyio
import pandas as pd
from tqdm import tqdm

Figures = Mapping[tuple[str, Any], float]
"""What a peer gives when it is run once, by the title of a table and the column in it."""


Case = Mapping[str, Callable[[], Figures]]
"""Peers that are measured side by side: by name, what runs one once. The first is ours."""


def measure(cases: Iterable[Case], rounds: int) -> pd.DataFrame:
    """Measures all cases, this many times, and returns each figure with where it belongs."""
    cases = list(cases)
    steps = [
        (number, peer, case[peer])
        for number in range(rounds)
        for case in cases
        for peer in rotated(list(case), number)
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
    """Return ``names`` in the order of this round."""
    first = number % len(names)
    turned = names[first:] + names[:first]
    return turned[::-1] if number % 2 else turned


def run(loop: str, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Run an async function on a fresh loop, "asyncio", "uvloop" or "trio"."""
    backend = "trio" if loop == "trio" else "asyncio"
    options = {} if backend == "trio" else {"use_uvloop": loop == "uvloop"}
    return anyio.run(function, *args, backend=backend, backend_options=options)

"""Measures peers in turn, round after round.

On a machine whose speed drifts, what is measured minutes apart cannot be compared. So a round
measures each peer once, one right after the other, and figures of one round are compared with
each other. Each round begins with another peer, so that none always comes after the same one.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import anyio
from rich.console import Console
from rich.progress import track

from ._report import Table


class Case(NamedTuple):
    """Peers to be measured side by side.

    Args:
        cells: A table and its column for each of the figures that a peer gives.
        peers: By name, what runs a peer once.
        at_most: Rounds, for what takes long.
    """

    cells: Sequence[tuple[Table, Any]]
    peers: Mapping[str, Callable[[], Sequence[float]]]
    at_most: int = sys.maxsize


class Bench:
    """One benchmark: what the command line asks for, its tables, and what fills them."""

    def __init__(self, options: Namespace) -> None:
        self.quick: bool = options.quick
        self.tables: list[Table] = []
        self.cases: list[Case] = []
        self.notes: list[str] = []
        self.rounds = 0
        self._options = options

    def loops(self, *loops: str) -> list[str]:
        """Returns those that are installed, or the one that was asked for."""
        asked = [self._options.loop] if self._options.loop else loops
        return [loop for loop in asked if importlib.util.find_spec(loop)]

    def table(self, *args: Any, **kwargs: Any) -> Table:
        """Returns a new `Table`."""
        self.tables.append(Table(*args, **kwargs))
        return self.tables[-1]

    def measure(self, rounds: int) -> None:
        """Measures all cases, this many times unless the command line says otherwise."""
        self.rounds = self._options.rounds or (1 if self.quick else rounds)
        # Of what torch imported nothing will ever be rubbish. Frozen, it is not looked through
        # while the clock runs: the collector sees what the peers make, as it does in a server.
        gc.collect()
        gc.freeze()
        steps = [
            (case, name)
            for number in range(self.rounds)
            for case in self.cases
            if number < case.at_most
            for name in rotated(list(case.peers), number)
        ]
        for case, name in track(steps, "measuring", console=Console(stderr=True)):
            gc.collect()  # nobody pays for the rubbish of the one before
            figures = case.peers[name]()
            for (table, column), figure in zip(case.cells, figures, strict=True):
                table.add(name, column, figure)


def rotated(names: list[str], number: int) -> list[str]:
    """Returns ``names`` in the order of this round."""
    first = number % len(names)
    return names[first:] + names[:first]


def run(loop: str, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Runs an async function on a fresh loop, "asyncio", "uvloop" or "trio"."""
    backend = "trio" if loop == "trio" else "asyncio"
    options = {} if backend == "trio" else {"use_uvloop": loop == "uvloop"}
    return anyio.run(function, *args, backend=backend, backend_options=options)

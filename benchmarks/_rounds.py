"""Measures peers in turn, round after round.

On a machine whose speed drifts, what is measured minutes apart cannot be compared. So a
round measures each peer once, one right after the other, and figures of one round are
compared with each other. Each round begins with another peer, so that none always comes
after the same one, or first.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, NamedTuple

from ._report import Table

__all__ = ["Case", "Progress", "measure", "rotated"]


class Case(NamedTuple):
    """Peers to be measured side by side, and the tables that their figures go to.

    Args:
        x: What the tables file the figures under.
        tables: One for each of the figures that a peer gives.
        peers: By name, what runs a peer once. A figure that it has not is None.
        at_most: Rounds, for what takes long.
    """

    x: Any
    tables: Sequence[Table]
    peers: Mapping[str, Callable[[], Sequence[float | None]]]
    at_most: int = sys.maxsize


def measure(cases: Sequence[Case], rounds: int) -> None:
    """Measures all cases, and fills their tables."""
    # Of what torch imported nothing will ever be rubbish. Frozen, it is not looked through
    # while the clock runs: the collector sees what the peers make, as it does in a server.
    gc.collect()
    gc.freeze()
    progress = Progress(sum(min(rounds, case.at_most) * len(case.peers) for case in cases))
    for number in range(rounds):
        for case in cases:
            if number >= case.at_most:
                continue
            for name in rotated(list(case.peers), number):
                # Nobody pays for the rubbish of the one before.
                gc.collect()
                figures = case.peers[name]()
                for table, figure in zip(case.tables, figures, strict=True):
                    if figure is not None:
                        table.add(name, case.x, figure)
                progress.step()


def rotated(names: list[str], number: int) -> list[str]:
    """Returns ``names`` in the order of this round."""
    first = number % len(names)
    return names[first:] + names[:first]


class Progress:
    """Tells on stderr how far it is, and how long it will take."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0
        self._start = monotonic()

    def step(self) -> None:
        """Notes that one more is done."""
        self._done += 1
        elapsed = monotonic() - self._start
        left = elapsed / self._done * (self._steps - self._done)
        line = f"{self._done:,} of {self._steps:,} runs, {duration(left)} left"
        if sys.stderr.isatty():
            end = "\n" if self._done == self._steps else ""
            print(f"\r{line:60}", end=end, file=sys.stderr, flush=True)
        elif self._done * 10 // self._steps != (self._done - 1) * 10 // self._steps:
            print(line, file=sys.stderr)  # into a log, ten lines


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"

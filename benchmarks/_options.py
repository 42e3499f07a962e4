"""The command line that the benchmarks share."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["RESULTS", "Options"]

RESULTS = Path(__file__).parent / "results"


class Options(argparse.ArgumentParser):
    """Parses ``--quick``, ``--rounds``, ``--json`` and, where there is a choice, ``--loop``.

    Args:
        name: Of the benchmark.
        about: Its docstring, of which the first line is shown.
        rounds: How many, if not told otherwise; one with ``--quick``.
        loops: The event loops that it can run on, of which those installed are taken.
        one_loop: It runs on one of them only, on the first if not told otherwise.
    """

    def __init__(
        self,
        name: str,
        about: str,
        rounds: int,
        loops: Sequence[str] = (),
        one_loop: bool = False,
    ) -> None:
        super().__init__(f"python -m benchmarks.{name}", description=about.partition("\n")[0])
        self._name, self._rounds, self._loops = name, rounds, loops
        self.add_argument("--quick", action="store_true", help="little of it, to see that it works")
        self.add_argument("--rounds", type=_positive, help=f"runs of each (default: {rounds})")
        self.add_argument(
            "--json",
            type=Path,
            metavar="FILE",
            help=f"where the result goes, with its plots beside it (default: {name}.json in "
            "benchmarks/results; with --quick, nowhere)",
        )
        if one_loop:
            self.add_argument(
                "--loop", choices=loops, default=loops[0], help=f"default: {loops[0]}"
            )
        elif loops:
            self.add_argument("--loop", choices=loops, help="only this (default: all)")

    def parse(self) -> argparse.Namespace:
        """Returns the options, with ``rounds``, ``json`` and the list ``loops`` filled in."""
        options = self.parse_args()
        if options.rounds is None:
            options.rounds = 1 if options.quick else self._rounds
        if options.json is None and not options.quick:
            options.json = RESULTS / f"{self._name}.json"
        if self._loops:
            options.loops = [options.loop] if options.loop else _installed(self._loops)
        return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _installed(loops: Sequence[str]) -> list[str]:
    installed = [loop for loop in loops if importlib.util.find_spec(loop)]
    for loop in loops:
        if loop not in installed:
            print(f"{loop} is not installed, and left out", file=sys.stderr)
    return installed

"""Runs benchmarks, one after the other.

    python -m benchmarks [--quick] [--save] [--rounds N] [--loop LOOP] [NAME ...]

Each runs in a process of its own. With ``--save``, results, tables and plots go to
benchmarks/results. If one fails, the others run all the same, and the exit status tells.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from ._bench import Bench
from ._machine import RESULTS
from ._report import about, save

# What they take, in minutes, on a machine with two cores.
BENCHMARKS = {
    "throughput": 8,
    "latency": 5,
    "scale": 20,
    "streams": 1,
    "serving": 4,
    "watcher": 8,
}


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="little of each, to see that all work")
    parser.add_argument("--save", action="store_true", help="write results, tables and plots")
    parser.add_argument(
        "--folder", type=Path, default=RESULTS, help="where to (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, help="runs of each peer")
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio"), help="only this one")
    options = parser.parse_args()
    names: list[str] = options.names or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"there is no benchmark {unknown.pop()!r}, but {', '.join(BENCHMARKS)}")
    if len(names) == 1:
        run_one(names[0], options)
        return 0
    given = [argument for argument in sys.argv[1:] if argument not in names]
    failed = []
    for name in names:
        print(f"\n== {name}, about {BENCHMARKS[name]} min if not --quick\n", flush=True)
        command = [sys.executable, "-m", "benchmarks", name, *given]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_one(name: str, options: argparse.Namespace) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    bench = Bench(options)
    command = f"python -m benchmarks {name}" + " --quick" * options.quick
    load = f"{os.getloadavg()[0]:.1f}"
    module.main(bench)
    facts = about(command, bench.rounds, load, bench.notes)
    for table in bench.tables:
        table.print_to(Console(width=130))
    for key, value in facts.items():
        print(f"{key}: {value}")
    if options.save:
        save(name, options.folder, facts, bench.tables)


if __name__ == "__main__":
    sys.exit(main())

"""Run benchmarks, one after the other, each in a process of its own.

    python -m benchmarks [--quick] [--save | --redraw] [--rounds N] [--folder FOLDER] [NAME ...]

With ``--save``, the figures, tables and plots are written to docs/_results. ``--redraw`` measures
nothing, and writes tables and plots of the saved figures. If one benchmark fails, the others run
all the same, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path

from ._machine import RESULTS
from ._report import report

# Minutes on a machine with two cores.
BENCHMARKS = {"awaits": 21, "scale": 23, "streams": 2, "producers": 5, "serving": 25, "watcher": 8}


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="only check that they run")
    parser.add_argument("--save", action="store_true", help="write figures, tables and plots")
    parser.add_argument("--redraw", action="store_true", help="measure nothing, plot what is saved")
    parser.add_argument("--rounds", type=int, help="runs of each peer")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="folder of the saved figures")
    options = parser.parse_args()
    names: list[str] = options.names or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"there is no benchmark {unknown.pop()!r}, but {', '.join(BENCHMARKS)}")
    failed = []
    for name in names:
        print(f"\n== {name}" + f", about {BENCHMARKS[name]} min" * (not options.quick), flush=True)
        process = multiprocessing.get_context("spawn").Process(target=report, args=(name, options))
        process.start()
        process.join()
        failed += [name] * (process.exitcode != 0)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

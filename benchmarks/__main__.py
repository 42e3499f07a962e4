"""Runs all benchmarks, one after the other, each in a process of its own.

    python -m benchmarks [--quick] [--results FOLDER] [NAME ...]

If one fails, the others run all the same, and the exit status tells. In the end the goals
are printed, with what became of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic

from ._options import RESULTS
from ._report import print_goals
from ._rounds import duration

# What they take, in minutes, on a machine with two cores, and with --quick.
BENCHMARKS = {
    "await_throughput": (8, 0.2),
    "await_latency": (5, 0.1),
    "scale": (20, 0.1),
    "callbacks": (1, 0.1),
    "imports": (2, 0.2),
    "watcher": (8, 0.5),
    "rpc": (0.5, 0.1),
    "streams": (0.5, 0.1),
}


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="little of each, to see that all work")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="where results and plots go (default: benchmarks/results; with --quick, nowhere)",
    )
    options = parser.parse_args()
    names: list[str] = options.names or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"there is no benchmark {unknown.pop()!r}, but {', '.join(BENCHMARKS)}")
    if options.results or not options.quick:
        return run_all(names, options.quick, options.results or RESULTS)
    with tempfile.TemporaryDirectory() as folder:
        return run_all(names, options.quick, Path(folder))


def run_all(names: list[str], quick: bool, folder: Path) -> int:
    minutes = {name: BENCHMARKS[name][quick] for name in names}
    results, failed = {}, []
    start = monotonic()
    for number, name in enumerate(names):
        done = sum(minutes[name] for name in names[:number])
        left = sum(minutes.values()) - done
        if done:  # this machine may be faster, or slower
            left *= (monotonic() - start) / 60 / done
        print(
            f"\n== {name}, {number + 1} of {len(names)}, about {duration(left * 60)} left\n",
            flush=True,
        )
        result = folder / f"{name}.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(result)]
        status = subprocess.run([*command, *["--quick"] * quick], check=False).returncode
        if status:
            failed.append(name)
            print(f"{name} failed, with status {status}", file=sys.stderr)
        else:
            results[name] = json.loads(result.read_text())["goals"]
    print(f"\n== all, in {duration(monotonic() - start)}")
    print_goals(results)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a benchmark has found: samples, in tables; on which machine; for people and as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterable
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from statistics import median, quantiles
from time import monotonic
from typing import Any

from ._options import RESULTS

__all__ = ["Report", "Table", "quartiles", "rounded"]

OURS = "await fut"


class Table:
    """Samples of one quantity, by peer and by what is varied.

    Args:
        title: What is measured, and under which circumstances.
        unit: Of the samples.
        x: What is varied, if something is: a number of tasks, an operation.
        ours: The peer that the others are compared with.
        more_is_better: As with a rate; otherwise less is, as with a time.
    """

    def __init__(
        self, title: str, unit: str, x: str = "", ours: str = OURS, more_is_better: bool = False
    ) -> None:
        self.title, self.unit, self.x, self.ours = title, unit, x, ours
        self.more_is_better = more_is_better
        self.samples: dict[str, dict[Any, list[float]]] = {}

    def add(self, peer: str, x: Any, sample: float) -> None:
        """Adds the sample of one round."""
        self.samples.setdefault(peer, {}).setdefault(x, []).append(sample)

    def at(self, x: Any) -> dict[str, list[float]]:
        """Returns the samples of each peer that has any at ``x``."""
        return {peer: by_x[x] for peer, by_x in self.samples.items() if x in by_x}

    def gains(self, peer: str, x: Any) -> list[float]:
        """Returns how many times better ours is than ``peer``, round by round.

        A round is one moment of the machine: these ratios vary less than the samples.
        """
        ours, theirs = self.samples[self.ours].get(x, ()), self.samples[peer][x]
        pairs = zip(ours, theirs, strict=False)
        if self.more_is_better:
            return [mine / other for mine, other in pairs if other]
        return [other / mine for mine, other in pairs if mine]

    def gain(self, peer: str, x: Any = None) -> float:
        """Returns the median of the `gains`."""
        return median(self.gains(peer, x))

    def __str__(self) -> str:
        better = "more" if self.more_is_better else "less"
        peers = max(map(len, self.samples))
        xs = list(dict.fromkeys(chain.from_iterable(self.samples.values())))
        labels = [_label(x) for x in xs]
        wide = max(map(len, [self.x, *labels])) + 2 * bool(self.x)
        head = f"{'median':>10}{'quartiles':>20}{'gain':>8}{'quartiles':>16}"
        lines = [
            f"{self.title}\n{self.unit}, {better} is better",
            f"  {self.x:<{wide}}{'':{peers}}{head}",
        ]
        for x, label in zip(xs, labels, strict=True):
            for peer, samples in self.at(x).items():
                low, middle, high = quartiles(samples)
                spread = f"{rounded(low)} to {rounded(high)}"
                line = f"  {label:<{wide}}{peer:{peers}}{rounded(middle):>10}{spread:>20}"
                gains = self.gains(peer, x)
                if peer != self.ours and gains:
                    low, middle, high = quartiles(gains)
                    line += f"{middle:8.2f}{f'{low:.2f} to {high:.2f}':>16}"
                lines.append(line)
                label = ""
        return "\n".join(lines)


def _arguments() -> list[str]:
    # Not those that tell where the checkout is.
    root = f"{Path(__file__).parents[1]}{os.sep}"
    return [argument.removeprefix(root) for argument in sys.argv[1:]]


class Report:
    """All that a run of a benchmark gives.

    Args:
        name: Of the benchmark.
        options: As `Options.parse` returns them.
    """

    def __init__(self, name: str, options: Namespace) -> None:
        self.tables: list[Table] = []
        self.notes: list[str] = []
        self._name, self._options, self._start = name, options, monotonic()
        self._goals: list[dict[str, Any]] = []
        self._plots: dict[str, str] = {}
        self._machine = machine()
        rounds = "1 round" if options.rounds == 1 else f"{options.rounds} interleaved rounds"
        quick = ", quick ones: judge nothing by them" if options.quick else ""
        print(f"benchmarks.{name}: {rounds}{quick}")
        for key, value in self._machine.items():
            print(f"  {key:8} {value}", flush=True)  # before what goes to stderr

    def table(self, *args: Any, **kwargs: Any) -> Table:
        """Returns a new `Table` of this report."""
        self.tables.append(Table(*args, **kwargs))
        return self.tables[-1]

    def goal(
        self,
        text: str,
        figure: float,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Compares a figure with what it is meant to be. To miss a goal is no failure."""
        limit: dict[str, float] = {}
        if at_least is not None:
            limit["at_least"] = at_least
        if at_most is not None:
            limit["at_most"] = at_most
        self._goals.append({"goal": text, "figure": figure, **limit})

    def plot(self, slug: str, svg: str) -> None:
        """Has ``svg`` saved beside the result, as NAME-SLUG.svg, or NAME.svg without a slug."""
        self._plots[slug] = svg

    def print(self) -> None:
        """Prints notes, tables and goals."""
        if self.tables:
            print(
                "\ngain: how many times better ours is, by the median of the ratios of each round",
                end="",
            )
        for table in self.tables:
            if table.samples:
                print(f"\n\n{table}", end="")
        print()
        for note in self.notes:
            print(f"\n{note}")
        print_goals({self._name: self._goals})

    def save(self) -> None:
        """Writes result and plots, if the options say where."""
        path: Path | None = self._options.json
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_json(self._as_dict()))
        for slug, svg in self._plots.items():
            path.with_name("-".join(filter(None, [path.stem, slug])) + ".svg").write_text(svg)
        print(f"\nwritten to {path}", file=sys.stderr)

    def finish(self) -> None:
        """Prints and saves."""
        self.print()
        self.save()

    def _as_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self._name,
            "command": shlex.join(["python", "-m", f"benchmarks.{self._name}", *_arguments()]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(monotonic() - self._start),
            "commit": commit(),
            "machine": self._machine,
            "rounds": self._options.rounds,
            "quick": self._options.quick,
            "goals": [goal | {"figure": _four_digits(goal["figure"])} for goal in self._goals],
            "notes": self.notes,
            "tables": [
                {
                    "title": table.title,
                    "unit": table.unit,
                    "more_is_better": table.more_is_better,
                    "ours": table.ours,
                    "x": table.x,
                    # Each sample, in the order of the rounds: a list for each peer and x.
                    "samples": [
                        {"peer": peer, "x": x, "values": list(map(_four_digits, samples))}
                        for peer, by_x in table.samples.items()
                        for x, samples in by_x.items()
                    ],
                }
                for table in self.tables
            ],
        }


def print_goals(goals: dict[str, list[dict[str, Any]]]) -> None:
    """Prints the goals of each benchmark that has any, and which were missed."""
    rows = []
    for name, of_one in goals.items():
        for goal in of_one:
            figure, least, most = goal["figure"], goal.get("at_least"), goal.get("at_most")
            limit = f"at least {least:g}" if least is not None else f"at most {most:g}"
            met = figure >= least if least is not None else figure <= most
            rows.append((f"{name}: {goal['goal']}", figure, limit, "" if met else "missed"))
    if rows:
        wide = max(len(text) for text, *_ in rows)
        print(f"\n{'goals':{wide + 2}}{'is':>8}{'meant to be':>16}")
        for text, figure, limit, verdict in rows:
            print(f"  {text:{wide}}{figure:8.2f}{limit:>16}  {verdict}".rstrip())


def quartiles(samples: Iterable[float]) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile."""
    samples = list(samples)
    if len(samples) == 1:
        samples *= 2
    low, middle, high = quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def rounded(figure: float) -> str:
    """Returns a figure with as many digits as are worth reading."""
    size = abs(figure)
    digits = 0 if size >= 100 or size == 0 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{figure:,.{digits}f}"


def machine() -> dict[str, str]:
    """Describes where this runs."""
    versions = []
    for name in ("torch", "uvloop", "trio", "anyio"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "CPU": f"{_cpu()}, {_cores()}",
        # At most a few tenths, or somebody else is at work there, too.
        "load": f"{os.getloadavg()[0]:.1f} in the minute before",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "system": platform.platform(),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": ", ".join(versions),
    }


def commit() -> str | None:
    """Returns the commit of this checkout, marked if something but results has been changed."""
    revision = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", ":/", f":(exclude){RESULTS}")
    return f"{revision}-dirty" if revision and changed else revision


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> str:
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    text = f"{cores} core{'s' * (cores != 1)}"
    return text if usable == cores else f"{text}, of which {usable} for this process"


def _label(x: Any) -> str:
    return "" if x is None else f"{x:,}" if isinstance(x, int) else str(x)


def _four_digits(figure: float) -> float:
    return float(f"{figure:.4g}")


def _json(result: dict[str, Any]) -> str:
    # A line for each list of samples: neither a line of 100 kB, nor a line for each sample.
    tables = result.pop("tables")
    text = json.dumps(result, indent=1)[:-2] + ',\n "tables": ['
    for n, table in enumerate(tables):
        samples = table.pop("samples")
        lines = ",\n    ".join(map(json.dumps, samples))
        text += "," * (n > 0) + f'\n  {json.dumps(table)[:-1]}, "samples": [\n    {lines}\n  ]}}'
    return text + "\n ]\n}\n"

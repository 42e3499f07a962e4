"""What importing this package adds to importing torch: time, and modules.

    python -m benchmarks.imports [--quick] [--rounds N]

Each sample is a fresh interpreter that has bytecode for all that it imports, in a folder of
its own, as after the first start. The difference of two imports of torch says little, as they
take a second or two and vary by more than what is added; so an interpreter that imports both
also tells how long the second took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from typing import Any

from ._options import Options
from ._plot import bars
from ._report import Report
from ._rounds import Case, measure

CODE = """
import sys
from time import perf_counter
begin = perf_counter()
import torch
after_torch = perf_counter()
{}
end = perf_counter()
modules = sorted(sys.modules)
import json
print(json.dumps([end - begin, end - after_torch, modules]))
"""
TORCH, BOTH = "import torch", "import torch, torchfut_aio"
PEERS = {BOTH: "import torchfut_aio", TORCH: ""}
MILLISECONDS_GOAL = 30


def imported(statement: str, bytecode: str) -> list[Any]:
    """Returns ms for all, ms for what came after torch, and the modules."""
    environment = os.environ | {"PYTHONPYCACHEPREFIX": bytecode}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(statement)],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    seconds, seconds_after, modules = json.loads(done.stdout)
    return [seconds * 1e3, seconds_after * 1e3, modules]


def times(statement: str, bytecode: str) -> list[float | None]:
    milliseconds, after, _ = imported(statement, bytecode)
    return [milliseconds, after if statement else None]


def main() -> None:
    options = Options("imports", __doc__, rounds=21).parse()
    report = Report("imports", options)
    of_all = report.table("fresh interpreters", "ms", ours=BOTH)
    of_ours = report.table("import torchfut_aio, after import torch", "ms", ours=BOTH)
    with tempfile.TemporaryDirectory() as bytecode:
        print("compiling", file=sys.stderr)
        modules = {name: imported(statement, bytecode)[2] for name, statement in PEERS.items()}
        peers = {name: partial(times, statement, bytecode) for name, statement in PEERS.items()}
        measure([Case(None, [of_all, of_ours], peers)], options.rounds)

    added = [name for name in modules[BOTH] if name not in set(modules[TORCH])]
    packages = Counter(name.partition(".")[0] for name in added)
    report.notes.append(
        f"{len(added)} modules more than the {len(modules[TORCH]):,} of torch: "
        + ", ".join(f"{count} {name}" for name, count in packages.most_common())
    )
    milliseconds = of_ours.at(None)[BOTH]
    report.goal("ms added", sorted(milliseconds)[len(milliseconds) // 2], at_most=MILLISECONDS_GOAL)
    report.plot(
        "",
        bars(
            "Importing, in a fresh interpreter with bytecode",
            f"medians and quartiles of {options.rounds} rounds; less is better",
            "milliseconds",
            {"": of_all.at(None)},
            ours=BOTH,
        ),
    )
    report.finish()


if __name__ == "__main__":
    main()

"""All tests for a GPU, and a report of them: see ``scripts/test-on-gpu``.

Each part runs in a new process with a time limit, so that every other part is still reported.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks._machine import RESULTS, commit, machine

from .gpu_checks import CHECKS, MISSING

ROOT = Path(__file__).parents[1]
NO_GPU = 75


class Part(NamedTuple):
    name: str
    about: str
    command: Sequence[str]
    limit: float  # seconds


class Result(NamedTuple):
    part: Part
    outcome: str  # "passed", "failed", "timed out" or "cannot be checked here"
    seconds: float
    output: str

    @property
    def is_well(self) -> bool:
        return self.outcome in ("passed", "cannot be checked here")


def parts(quick: bool, folder: Path) -> list[Part]:
    """Return all parts, most important first."""
    python = [sys.executable, "-m"]
    suite = [*python, "pytest", "-p", "no:cacheprovider", "-q", "-m", "device", "tests"]
    # A quick benchmark saves nothing; only its output is kept.
    watcher = ["--quick"] if quick else ["--save", "--folder", str(folder)]
    return [
        *(
            Part(
                name,
                (check.__doc__ or "").partition("\n")[0],
                [*python, "tests.gpu_checks", name],
                120,
            )
            for name, check in CHECKS.items()
        ),
        Part("suite", "The tests that are marked as those of devices.", suite, 1200),
        Part(
            "watcher",
            "How late a task resumes, and what the waiting costs.",
            [*python, "benchmarks", "watcher", *watcher],
            300 if quick else 3600,
        ),
    ]


def run(part: Part) -> Result:
    """Run a part; kill it and its child processes if it takes too long."""
    environment = os.environ | {"TORCHFUT_AIO_TEST_DEVICE": "cuda", "PYTHONFAULTHANDLER": "1"}
    start = time.monotonic()
    process = subprocess.Popen(
        part.command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=part.limit)
        outcome = {0: "passed", MISSING: "cannot be checked here"}.get(process.returncode, "failed")
        if outcome == "passed" and not output.strip():
            outcome, output = "failed", "It printed nothing, so it has not shown that it ran.\n"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # which prints the stack of each thread
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        outcome = "timed out"
    return Result(part, outcome, time.monotonic() - start, output)


def gpus() -> list[str]:
    """Describe the GPUs of this machine."""
    described = []
    for n in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(n)
        described.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return described


def driver() -> str:
    """Return the name of the driver, if it is known."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(
            query, capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError):
        output = "unknown\n"
    return f"{output.splitlines()[0]}, CUDA {torch.version.cuda}"


def report(results: Iterable[Result], gpus: Sequence[str], driver: str, when: datetime) -> str:
    """Return the report as Markdown."""
    results = list(results)
    facts = {
        "date": when.isoformat(timespec="seconds"),
        "commit": commit(),
        "GPUs": "; ".join(gpus),
        "driver": driver,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "machine": machine(),
    }
    lines = ["# On a GPU: `scripts/test-on-gpu`", ""]
    lines += [f"- {name}: {text}" for name, text in facts.items()]
    lines += ["", "| part | outcome | seconds | |", "|---|---|---|---|"]
    lines += [
        f"| {r.part.name} | {r.outcome} | {r.seconds:.0f} | {r.part.about} |" for r in results
    ]
    for result in results:
        tail = result.output.replace(str(ROOT), ".").strip().splitlines()[-100:]
        if tail:
            lines += ["", f"## {result.part.name}", "", "```", *tail, "```"]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("scripts/test-on-gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little of the benchmark")
    parser.add_argument(
        "--folder", type=Path, help="folder of the report (default: docs/_results/gpu-DATE-TIME)"
    )
    parser.add_argument("parts", nargs="*", help="the names of some parts (default: all)")
    options = parser.parse_args(arguments)
    names = [part.name for part in parts(options.quick, RESULTS)]
    if unknown := set(options.parts) - set(names):
        parser.error(f"there is no part {unknown.pop()!r}, but {', '.join(names)}")
    if not torch.cuda.is_available():
        print("!!!! NOT TESTED ON A GPU: torch finds none here. No report is written.")
        return NO_GPU
    when = datetime.now(UTC)
    folder = (options.folder or RESULTS / f"gpu-{when:%Y-%m-%d-%H%M%S}").absolute()
    folder.mkdir(parents=True, exist_ok=options.folder is not None)
    path = folder / "report.md"
    results = []
    wanted = parts(options.quick, folder)
    for part in wanted:
        if options.parts and part.name not in options.parts:
            continue
        print(f"== {part.name}", flush=True)
        results.append(run(part))
        print(f"{results[-1].output}{part.name}: {results[-1].outcome}", flush=True)
        # After each part, so that an aborted run keeps its results.
        path.write_text(report(results, gpus(), driver(), when))
    print(f"written to {os.path.relpath(path, ROOT)}")
    return 0 if results and all(result.is_well for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())

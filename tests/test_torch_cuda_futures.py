"""PyTorch's own tests of futures on CUDA, of its RPC test suite, with this package's Future.

The tests are taken unchanged from the installed torch. If the device under test is the simulated
one, it replaces CUDA: in the strings, and in ``torch.cuda``.
"""

from __future__ import annotations

import ast
import contextlib
import operator
import pathlib
import threading
import unittest
from unittest import mock

import pytest
import torch

from torchfut_aio import Future

from .accelerator import DEVICE, needs

pytestmark = pytest.mark.device

SOURCE = pathlib.Path(torch.__file__).parent / ("testing/_internal/distributed/rpc/rpc_test.py")


def defined(text):
    """Yield each function and class of the file, with its decorators; this includes methods."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node


TEXT = SOURCE.read_text().replace(" cuda:", f" {DEVICE}:")
for before in ('"cuda:', '"cuda"'):
    TEXT = TEXT.replace(before, before.replace("cuda", DEVICE))
NODES = {node.name: node for node in defined(TEXT)}
NAMES = sorted(name for name in NODES if name.startswith("test_cuda_future_"))


def gpus(name):
    """Return how many GPUs the test requires: ``@skip_if_lt_x_gpu(n)``."""
    [decorator] = NODES[name].decorator_list
    return decorator.args[0].value


def case(accelerator_module):
    names = {
        "__name__": __name__,
        "Future": Future,
        "Lock": threading.Lock,
        "get_cycles_per_ms": lambda: 1,
        "operator": operator,
        "threading": threading,
        "torch": torch,
    }
    helpers = ["TensorWrapper", "build_sparse_tensor", "_test_cuda_future_extraction", *NAMES]
    for name in helpers:
        NODES[name].decorator_list, decorators = [], NODES[name].decorator_list
        module = ast.Module([NODES[name]], [])
        exec(compile(module, str(SOURCE), "exec"), names)
        NODES[name].decorator_list = decorators
    globals()["TensorWrapper"] = names["TensorWrapper"]  # pickle finds it by name
    methods = {name: names[name] for name in helpers[2:]}
    return type("Case", (unittest.TestCase,), methods)()


@contextlib.contextmanager
def on(thing):
    """Make a device or a stream current."""
    index, stream = torch.accelerator.current_device_index(), torch.accelerator.current_stream()
    if isinstance(thing, torch.Stream):
        torch.accelerator.set_stream(thing)
    else:
        torch.accelerator.set_device_index(torch.device(thing).index)
    try:
        yield
    finally:
        torch.accelerator.set_stream(stream)
        torch.accelerator.set_device_index(index)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", NAMES)
def test_torch_cuda_future_test_passes(accelerator, name):
    if accelerator.device_count() < gpus(name):
        pytest.skip("this machine has fewer accelerators")
    if "sparse" in name:
        needs(accelerator, "sparse tensors")
    with contextlib.ExitStack() as stack:
        if DEVICE != "cuda":
            for attribute, ours in {
                "Event": getattr(accelerator, "Event", None),
                "Stream": lambda: torch.Stream(DEVICE),
                "_sleep": lambda cycles: accelerator.sleep(0.02),
                "device": on,
                "stream": on,
            }.items():
                stack.enter_context(mock.patch.object(torch.cuda, attribute, ours))
        getattr(case(accelerator), name)()


def test_torch_has_cuda_future_tests():
    assert len(NAMES) >= 13

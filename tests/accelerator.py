"""The accelerator that device tests run on: the simulated one, a real GPU, or torch_openreg.

``TORCHFUT_AIO_TEST_DEVICE`` selects it: ``cuda``, ``openreg``, or the simulated device by default.
The tests are the same. On each device a kernel can run until `wake` is called, so a test controls
whether kernels are still running, and a copy made too early has the old value.
"""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from torchfut_aio import Future
from torchfut_aio._devices import _events

from . import gpus
from .threads import PATIENCE

DEVICE = os.environ.get("TORCHFUT_AIO_TEST_DEVICE", "sim")
if DEVICE == "sim":
    gpus.hide()  # before any code counts the GPUs
FIRST, SECOND = f"{DEVICE}:0", f"{DEVICE}:1"

OLD, NEW = [0.0, 0.0], [7.0, 7.0]

several_devices = pytest.mark.several_devices

simulated_only = pytest.mark.skipif(
    DEVICE != "sim", reason="only the simulated device can be made to fail in this way"
)

# The promise holds for futures with and without declared devices.
declared_or_not = pytest.mark.parametrize(
    "devices", [[FIRST], None], ids=["declared", "undeclared"]
)


@pytest.fixture(scope="session")
def accelerator_module() -> Any:
    """Return the module of the device; build the simulated device unless it is cached."""
    if DEVICE != "sim":
        return importlib.import_module(f"tests.{DEVICE}_device")
    if not shutil.which(os.environ.get("CXX", "c++")) and "CI" not in os.environ:
        pytest.skip("there is no C++ compiler to build the simulated device with")
    return importlib.import_module("tests.simulated_device")


@pytest.fixture
def accelerator(accelerator_module: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The device under test, idle."""
    needs_two = request.node.get_closest_marker("several_devices") is not None
    if needs_two and accelerator_module.device_count() < 2:
        pytest.skip("this machine has one accelerator")
    write_zeros(accelerator_module)
    accelerator_module.reset_counters()
    # Drop events of a backend that an earlier test emulated.
    _events._pools.clear()  # noqa: SLF001
    yield accelerator_module
    accelerator_module.reset()


@pytest.fixture
def producer(accelerator: Any) -> torch.Stream:
    return torch.Stream(FIRST)


@pytest.fixture
def consumer(accelerator: Any) -> torch.Stream:
    return torch.Stream(FIRST)


def needs(accelerator: Any, feature: str) -> None:
    """Skip the test if the device lacks the feature, as its module says."""
    if feature in getattr(accelerator, "LACKS", ()):
        pytest.skip(f"{DEVICE} has no {feature}")


def ends_soon(stream: torch.Stream) -> bool:
    """Return whether all work on ``stream`` ends within a second.

    Streams of a GPU share a few hardware queues, so an idle stream may wait behind another one that
    is held up.
    """
    given_up = time.monotonic() + 1
    while not (ended := stream.query()) and time.monotonic() < given_up:
        time.sleep(0.001)
    return ended


# A stream cannot say whether it is about to write zeros, or is held up by a kernel that a test
# releases later. So the zeros that `being_filled` returns are written before a test begins.
_zeros: dict[torch.device, list[torch.Tensor]] = {}
# Their memory, which must not be freed while a kernel may still write to it.
_memory: list[Any] = []


def write_zeros(accelerator: Any, count: int = 80) -> None:
    """Write the tensors for `being_filled` on each device, while it is idle."""
    _memory.clear()
    for index in range(min(2, accelerator.device_count())):
        device = torch.device(DEVICE, index)
        _zeros[device] = [torch.zeros(2, device=device) for _ in range(count)]
        _memory.extend(tensor.untyped_storage() for tensor in _zeros[device])
        torch.accelerator.current_stream(device).synchronize()


def being_filled(accelerator: Any, device: str = FIRST, value: float = 7) -> torch.Tensor:
    """Return a tensor of zeros, and enqueue a kernel that fills it when `wake` is called."""
    tensor = _zeros[torch.device(device)].pop()
    accelerator.fill_after(tensor, value, PATIENCE)
    return tensor


def completed_on(stream: torch.Stream, accelerator: Any, devices: Any) -> Future[Any]:
    """Return a completed future whose value is still being filled on ``stream``."""
    fut: Future[Any] = Future(devices=devices)
    with stream:
        fut.set_result(being_filled(accelerator))
    return fut


def read_on_current_stream(tensor: torch.Tensor) -> torch.Tensor:
    """Enqueue a copy to the host; it has the values of the moment at which it runs."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def current_stream(device: str | int = FIRST) -> torch.Stream:
    return torch.accelerator.current_stream(device)

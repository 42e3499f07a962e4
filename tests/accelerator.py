"""The accelerator that device tests run on: the simulated one, a real GPU, or torch_openreg.

``TORCHFUT_AIO_TEST_DEVICE=cuda`` chooses, or ``openreg``; the tests are the same. A kernel that
"runs until woken" does so on each, so "while the kernels run" is a fact in a test, and a copy that
is made too early has the old value.
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
    gpus.hide()  # before anything counts them
FIRST, SECOND = f"{DEVICE}:0", f"{DEVICE}:1"

OLD, NEW = [0.0, 0.0], [7.0, 7.0]

several_devices = pytest.mark.several_devices

simulated_only = pytest.mark.skipif(
    DEVICE != "sim", reason="only the simulated device fails in this way when it is told to"
)

# The same holds for a future that was told its devices and one that was not.
told_or_not = pytest.mark.parametrize("devices", [[FIRST], None], ids=["declared", "undeclared"])


@pytest.fixture(scope="session")
def accelerator_module() -> Any:
    """The device's functions; builds the simulated one, unless that has been done before."""
    if DEVICE != "sim":
        return importlib.import_module(f"tests.{DEVICE}_device")
    if not shutil.which(os.environ.get("CXX", "c++")) and "CI" not in os.environ:
        pytest.skip("there is no C++ compiler to build the simulated device with")
    return importlib.import_module("tests.simulated_device")


@pytest.fixture
def accelerator(accelerator_module: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The device under test, at rest."""
    needs_two = request.node.get_closest_marker("several_devices") is not None
    if needs_two and accelerator_module.device_count() < 2:
        pytest.skip("this machine has one accelerator")
    write_zeros(accelerator_module)
    accelerator_module.reset_counters()
    _events._pools.clear()  # of events of a backend that an earlier test played
    yield accelerator_module
    accelerator_module.reset()


@pytest.fixture
def producer(accelerator: Any) -> torch.Stream:
    return torch.Stream(FIRST)


@pytest.fixture
def consumer(accelerator: Any) -> torch.Stream:
    return torch.Stream(FIRST)


def needs(accelerator: Any, feature: str) -> None:
    """Skips the test on a device that has no such thing, as its module says."""
    if feature in getattr(accelerator, "LACKS", ()):
        pytest.skip(f"{DEVICE} has no {feature}")


def ends_soon(stream: torch.Stream) -> bool:
    """Returns whether all that is enqueued on ``stream`` ends within a second.

    Streams of a GPU share a few hardware queues. So one may wait for another that is held up,
    although nothing orders it after that; but not each one does.
    """
    given_up = time.monotonic() + 1
    while not (ended := stream.query()) and time.monotonic() < given_up:
        time.sleep(0.001)
    return ended


# Whether a stream will soon write zeros, or is held up by a kernel that is not to end yet, nobody
# can tell. So those that `being_filled` returns are written before a test begins.
_zeros: dict[torch.device, list[torch.Tensor]] = {}
_memory: list[Any] = []  # of theirs: not to be freed while a kernel may still write to it


def write_zeros(accelerator: Any, count: int = 80) -> None:
    """Writes tensors for `being_filled`, on each device, which is at rest."""
    _memory.clear()
    for index in range(min(2, accelerator.device_count())):
        device = torch.device(DEVICE, index)
        _zeros[device] = [torch.zeros(2, device=device) for _ in range(count)]
        _memory.extend(tensor.untyped_storage() for tensor in _zeros[device])
        torch.accelerator.current_stream(device).synchronize()


def being_filled(accelerator: Any, device: str = FIRST, value: float = 7) -> torch.Tensor:
    """A tensor of zeros, and a kernel on the current stream that fills it once woken."""
    tensor = _zeros[torch.device(device)].pop()
    accelerator.fill_after(tensor, value, PATIENCE)
    return tensor


def completed_on(stream: torch.Stream, accelerator: Any, devices: Any) -> Future[Any]:
    """A future that is done, with a value that is being filled on ``stream``."""
    fut: Future[Any] = Future(devices=devices)
    with stream:
        fut.set_result(being_filled(accelerator))
    return fut


def read_on_current_stream(tensor: torch.Tensor) -> torch.Tensor:
    """Enqueues a copy to the host, which has the value that is there when its turn comes."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def current_stream(device: str | int = FIRST) -> torch.Stream:
    return torch.accelerator.current_stream(device)

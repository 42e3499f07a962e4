"""A CUDA GPU, with the functions of the simulated device that the tests use."""

from __future__ import annotations

import ctypes

import pytest
import torch

device_count = torch.cuda.device_count

# Where a stream waits for a number in the memory of the host, nothing computes, and no
# time limit is needed: the driver lets a stream wait until the number is large enough.
_driver = ctypes.CDLL("libcuda.so.1")
_woken = torch.zeros(1, dtype=torch.int32).pin_memory()


def _wait_until_woken() -> None:
    status = _driver.cuStreamWaitValue32_v2(
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        ctypes.c_uint64(_woken.data_ptr()),
        ctypes.c_uint32(int(_woken.item()) + 1),
        ctypes.c_uint(0),  # until it is that, or greater
    )
    assert status == 0, f"cuStreamWaitValue32 returned {status}"


def sleep(seconds: float) -> None:
    """Enqueues work of a second or less that takes that long, or that ends with `wake`."""
    if seconds > 1:
        _wait_until_woken()
    else:
        torch.cuda._sleep(int(seconds * torch.cuda.clock_rate() * 1e6))


def fill_after(tensor: torch.Tensor, value: float, seconds: float) -> None:
    """Enqueues `sleep`, then fills."""
    with torch.cuda.device(tensor.device):
        sleep(seconds)
        tensor.fill_(value)


def wake() -> None:
    """Ends all sleep enqueued so far."""
    _woken.add_(1)


def reset() -> None:
    """Wakes all kernels and waits for them."""
    wake()
    for device in range(device_count()):
        torch.cuda.synchronize(device)


def reset_counters() -> None:
    """Does nothing: CUDA counts nothing."""


def counters() -> dict[str, int]:
    """Skips the test that wants to know."""
    pytest.skip("CUDA does not count what is called")


def fail(_message: str) -> None:
    """Skips the test: after a failed kernel the process can use CUDA no more."""
    pytest.skip("a failed kernel ends the use of CUDA in the process")

"""A GPU under ``torch.cuda``, of CUDA or ROCm, with the functions of the simulated device.

It needs only torch, and the driver that torch has loaded.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import pytest
import torch

from . import cuda_runtime

device_count = torch.cuda.device_count

# The driver holds a stream up until a number in host memory is large enough. No kernel runs, and
# no time limit is needed.
_UNTIL_AT_LEAST = ctypes.c_uint(0)


@functools.cache
def _woken() -> torch.Tensor:
    # Not at import: it creates a context on the current device.
    return torch.zeros(1, dtype=torch.int32).pin_memory()


@functools.cache
def _wait_value() -> Any:
    """Return ``function(stream, address, number)`` of the driver."""
    if torch.version.hip:
        function = ctypes.CDLL("libamdhip64.so").hipStreamWaitValue32
        all_bits = ctypes.c_uint32(0xFFFFFFFF)
        return lambda *arguments: function(*arguments, _UNTIL_AT_LEAST, all_bits)
    function = ctypes.CDLL("libcuda.so.1").cuStreamWaitValue32_v2
    return lambda *arguments: function(*arguments, _UNTIL_AT_LEAST)


def _wait_until_woken() -> None:
    status = _wait_value()(
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        ctypes.c_void_p(_woken().data_ptr()),
        ctypes.c_uint32(int(_woken().item()) + 1),
    )
    assert status == 0, f"the driver returned {status} for a wait on a stream"


@functools.cache
def _cycles_per_second() -> float:
    """Measure the clock rate: `torch.cuda.clock_rate` needs nvidia-ml-py."""
    # The clock of an idle GPU is slow. The first kernel brings it up.
    for cycles in (10**9, 10**8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
    return cycles / begin.elapsed_time(end) * 1e3


def sleep(seconds: float) -> None:
    """Enqueue work of ``seconds``, or if that is over a second, work that `wake` ends."""
    if seconds > 1:
        _wait_until_woken()
    else:
        torch.cuda._sleep(int(seconds * _cycles_per_second()))


def fill_after(tensor: torch.Tensor, value: float, seconds: float) -> None:
    """Enqueue `sleep`, then fill the tensor."""
    with torch.cuda.device(tensor.device):
        sleep(seconds)
        tensor.fill_(value)


def wake() -> None:
    """End all sleeps enqueued so far."""
    _woken().add_(1)


def reset() -> None:
    """Wake all kernels and wait for them."""
    wake()
    for device in range(device_count()):
        torch.cuda.synchronize(device)


_COUNTED = {
    "event_queries": ["cudaEventQuery"],
    "synchronizations": ["cudaEventSynchronize", "cudaStreamSynchronize", "cudaDeviceSynchronize"],
    "events_created": ["cudaEventCreateWithFlags"],
    "events_destroyed": ["cudaEventDestroy"],
}
_before: dict[str, int] = {}


def _called() -> dict[str, int]:
    return {name: sum(map(cuda_runtime.calls, of)) for name, of in _COUNTED.items()}


@functools.cache
def _load_kernels() -> None:
    """Launch each kernel that tests launch while a stream is held up.

    The first launch of a kernel may load it, which may wait for the device.
    """
    for device in range(min(2, device_count())):
        tensor = torch.ones(2, device=torch.device("cuda", device))
        tensor.fill_(2).zero_()
        tensor.add_(1).mul_(2)
        str(tensor + tensor.clone())
        torch.zeros(2, 2, device=tensor.device)[1].fill_(2)  # another alignment, another kernel
        torch.arange(2, device=tensor.device)


def reset_counters() -> None:
    """Measure the clock and load kernels while no stream is held up; reset the counters."""
    _cycles_per_second()
    _load_kernels()
    if cuda_runtime.IS_INSTALLED:
        _before.update(_called())


def counters() -> dict[str, int]:
    """Return the stand-in's counters; on a GPU, skip the test."""
    if not cuda_runtime.IS_INSTALLED:
        pytest.skip("CUDA does not count what is called")
    return {name: number - _before[name] for name, number in _called().items()}


def fail(_message: str) -> None:
    """Skip the test: after a failed kernel the process can no longer use CUDA."""
    pytest.skip("a failed kernel ends the use of CUDA in the process")

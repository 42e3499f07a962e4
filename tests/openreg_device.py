"""torch_openreg, PyTorch's example of an accelerator, with the functions of the simulated device.

Its streams are threads of the host, which run jobs in order. But openreg fills and copies at once,
without waiting for the stream. So this module replaces these operations: they are enqueued on the
current stream, as on other accelerators. Any other operation copies its tensors to the host and
back, and so waits for the current stream.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_openreg

from torchfut_aio._devices._streams import side_stream

_SOURCE = Path(__file__).with_suffix(".cpp")
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "torchfut-aio"
_LIBRARIES = Path(torch_openreg.__file__).parent / "lib"


def _build() -> ctypes.CDLL:
    key = hashlib.sha256(f"{_LIBRARIES}\0{_SOURCE.read_text()}".encode()).hexdigest()[:16]
    library = _CACHE / f"openreg_device-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        new = library.with_suffix(f".{os.getpid()}")
        compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-shared", "-fPIC"]
        links = [f"-L{_LIBRARIES}", "-lopenreg", f"-Wl,-rpath,{_LIBRARIES}"]
        subprocess.run([*compiler, "-o", str(new), str(_SOURCE), *links], check=True)
        new.rename(library)
    return ctypes.CDLL(str(library))


_sleeper = _build()
_openreg = ctypes.CDLL(str(_LIBRARIES / "libopenreg.so"))

device_count = torch.accelerator.device_count
LACKS = {"sparse tensors"}


class Event(torch.Event):
    """The counterpart of ``torch.cuda.Event``, which openreg lacks."""

    def __new__(cls, enable_timing: bool = False) -> Event:
        return super().__new__(cls, "openreg", enable_timing=enable_timing)


def _check(status: int) -> None:
    assert status == 0, f"torch_openreg returned {status}"


# ----------------------------------------------------------------------------- streams


@contextlib.contextmanager
def _current(index: int) -> Iterator[None]:
    """Make a device current."""
    before = torch.accelerator.current_device_index()
    torch.accelerator.set_device_index(index)
    try:
        yield
    finally:
        torch.accelerator.set_device_index(before)


@functools.cache
def _queue_beside(stream: torch.Stream) -> torch.Stream:
    """Return a stream that runs the jobs enqueued on ``stream``.

    openreg's functions need a stream's address, which torch has only for external streams.
    """
    address = ctypes.c_void_p()
    with _current(stream.device_index):
        _check(_openreg.orStreamCreate(ctypes.byref(address)))
    assert address.value is not None
    return torch.Stream(
        stream_id=address.value, device_index=stream.device_index, device_type=stream.device_type
    )


def _enqueue(stream: torch.Stream, launch: Callable[[ctypes.c_void_p], int]) -> None:
    queue = _queue_beside(stream)
    queue.wait_event(stream.record_event())
    _check(launch(ctypes.c_void_p(queue.stream_id)))
    stream.wait_event(queue.record_event())
    # A query of an openreg stream returns True when its last job has started. So add one more.
    stream.record_event()


# torch.Stream returns each of these in turn, and so do callbacks. The first is the default stream
# as well, and the last one is for copies: a test begins between them.
_STREAMS = 32


def _draw_until(index: int) -> None:
    """Take streams from torch until the next one has this index."""
    for device in range(device_count()):
        while torch.Stream(f"openreg:{device}").stream_id >> 4 != index:
            pass


_draw_until(_STREAMS - 2)
for _index in range(device_count()):
    assert side_stream(torch.device("openreg", _index)).stream_id >> 4 == _STREAMS - 1


def sleep(seconds: float) -> None:
    """Enqueue a kernel that sleeps for ``seconds``, or until `wake`."""
    stream = torch.accelerator.current_stream()
    _enqueue(stream, lambda queue: _sleeper.enqueue_sleep(queue, ctypes.c_double(seconds)))


def wake() -> None:
    """End the sleep of all kernels enqueued so far."""
    _sleeper.wake_all()


def fill_after(tensor: torch.Tensor, value: float, seconds: float) -> None:
    """Enqueue `sleep`, then fill the tensor."""
    with _current(tensor.device.index):
        sleep(seconds)
        tensor.fill_(value)


def reset() -> None:
    """Wake all kernels and wait for them."""
    wake()
    for index in range(device_count()):
        with _current(index):
            _check(_openreg.orDeviceSynchronize())
    _in_use.clear()


# -------------------------------------------------------------------- fills and copies

_in_use: list[torch.UntypedStorage] = []  # by copies: openreg frees memory without waiting for them


def _is_on_device(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "openreg"


@contextlib.contextmanager
def _on_host(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensor's memory as a host tensor, to read and write."""
    if not _is_on_device(tensor):
        yield tensor
        return
    storage = tensor.untyped_storage()
    address = ctypes.c_void_p(storage.data_ptr())
    _check(_openreg.orMemoryUnprotect(address))
    try:
        memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
        flat = torch.frombuffer(memory, dtype=tensor.dtype)
        yield flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    finally:
        _check(_openreg.orMemoryProtect(address))


def _copy_from(
    source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False
) -> torch.Tensor:
    if not target.numel():
        return target
    on_device = [tensor for tensor in (source, target) if _is_on_device(tensor)]
    streams = [torch.accelerator.current_stream(tensor.device) for tensor in on_device]
    if not _is_plain(source, target):
        for stream in streams:
            stream.synchronize()
        with _on_host(source) as read, _on_host(target) as written:
            written.copy_(read)
        return target
    if not _is_on_device(source) and not source.is_pinned():
        source = source.clone()
    _in_use.extend((source.untyped_storage(), target.untyped_storage()))
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (target, source)]
    size = ctypes.c_size_t(target.numel() * target.itemsize)
    kind = 2 * _is_on_device(source) + _is_on_device(target)  # the numbers of orMemcpyKind
    first, last = streams[0], streams[-1]
    first.wait_event(last.record_event())
    _enqueue(first, lambda queue: _openreg.orMemcpyAsync(*addresses, size, kind, queue))
    last.wait_event(first.record_event())
    is_pinned = target.is_pinned() or not _is_on_device(source)
    if len(streams) == 1 and not (non_blocking and is_pinned):
        first.synchronize()
    return target


def _is_plain(source: torch.Tensor, target: torch.Tensor) -> bool:
    """Return True for a plain copy of bytes, which openreg can do on a stream."""
    return (
        (source.dtype, source.shape) == (target.dtype, target.shape)
        and source.is_contiguous()
        and target.is_contiguous()
    )


def _fill(tensor: torch.Tensor, value: float) -> torch.Tensor:
    return _copy_from(torch.full(tensor.shape, value, dtype=tensor.dtype), tensor, True)


def _item(tensor: torch.Tensor) -> Any:
    torch.accelerator.current_stream(tensor.device).synchronize()
    with _on_host(tensor) as read:
        return read.item()


_operations = torch.library.Library("aten", "IMPL")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # openreg's own copies, and item(), are replaced
    for _name, _function in {
        "_copy_from": _copy_from,
        "fill_.Scalar": _fill,
        "zero_": lambda tensor: _fill(tensor, 0),
        "_local_scalar_dense": _item,
    }.items():
        _operations.impl(_name, _function, "PrivateUse1")


# ------------------------------------------------------------- what openreg does not count


def reset_counters() -> None:
    """Draw a fresh stream for the test; there are no counters to reset."""
    _draw_until(0)


def counters() -> dict[str, int]:
    """Skip the test."""
    pytest.skip("torch_openreg does not count what is called")


def fail(_message: str) -> None:
    """Skip the test."""
    pytest.skip("no kernel of torch_openreg fails")

"""A device named ``sim`` for tests: host threads that behave as an accelerator's streams.

Importing this builds the C++ extension, once for each version of its source and of torch,
and registers two devices, ``sim:0`` and ``sim:1``, for the rest of the process. From then
on ``torch.accelerator`` and integers for devices mean these, even where there is a GPU.

Kernels are enqueued with ``fill_`` and ``copy_`` and with the functions below, on the
current stream. Any other operation is computed by the host, which waits for the current
streams first.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import io
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

_HERE = Path(__file__).parent
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "torchfut-aio"


def _build() -> ModuleType:
    # The ninja of an environment that has not been activated is found, too.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with mock.patch.dict(os.environ, PATH=path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A CUDA build may print that it has found no CUDA, which it need not.
        with contextlib.redirect_stderr(io.StringIO()):
            from torch.utils import cpp_extension

        sources = [(_HERE / name).read_text() for name in ("simulated_device.cpp", "streams.h")]
        built_for = [torch.__version__, torch.__file__, sys.version, str(_HERE), *sources]
        key = hashlib.sha256("\0".join(built_for).encode()).hexdigest()[:16]
        folder = _CACHE / f"simulated_device-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "one_at_a_time", "w") as lock:
            # The lock that load() itself uses outlives a process that was killed.
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "lock").unlink(missing_ok=True)
            return cpp_extension.load(
                "simulated_device",
                str(_HERE / "simulated_device.cpp"),
                # What torch compiled takes the time; of ours, most kernels sleep.
                extra_cflags=["-O0"],
                build_directory=str(folder),
            )


_extension = _build()
# After the threads of Python have ended and before the interpreter goes.
atexit.register(_extension.shut_down)

sleep = _extension.sleep
"""``sleep(seconds)`` enqueues a kernel that does nothing but take that long."""
fill_after = _extension.fill_after
"""``fill_after(tensor, value, seconds)`` enqueues a kernel that sleeps, then fills."""
wake = _extension.wake
"""``wake()`` ends the sleep of all kernels enqueued so far, so that no test depends on time."""
fail = _extension.fail
"""``fail(message)`` enqueues a kernel that fails. The stream runs no further kernel, and
queries and synchronisations of it, and of events recorded on it later, raise an error."""
reset = _extension.reset
"""``reset()`` wakes all kernels, waits for them, and forgets all failures."""
take_stream_pool_away = _extension.take_stream_pool_away
"""``take_stream_pool_away()``, until the next reset: callbacks of C++ futures cannot run, as on
MPS."""
refuse_events = _extension.refuse_events
"""``refuse_events()``, until the next reset: recording events, and having streams wait for them,
raises an error, as on CUDA once a kernel has failed."""
counters = _extension.counters
"""``counters()`` tells what was called, as a dict: numbers of ``event_queries``,
``stream_queries``, ``events_created``, ``events_destroyed`` and blocking
``synchronizations``, and the set of ``streams`` (device index, stream id) that ran a kernel."""
reset_counters = _extension.reset_counters


def finished_at(stream: torch.Stream) -> float:
    """Returns when the latest kernel of ``stream`` finished, by ``time.monotonic()``."""
    when: float = _extension.finished_at(stream.device_index, stream.stream_id)
    return when


torch.utils.rename_privateuse1_backend("sim")
# This module is what torch.get_device_module("sim") returns, so some names are torch's.
torch._register_device_module("sim", sys.modules[__name__])


class Event(torch.Event):
    """As ``torch.cuda.Event``."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False) -> Event:
        return super().__new__(cls, "sim", enable_timing=enable_timing, blocking=blocking)


class Stream(torch.Stream):
    """As ``torch.cuda.Stream``."""

    def __new__(cls, device: object = "sim", priority: int = 0) -> Stream:
        return super().__new__(cls, device, priority=priority)


current_device = torch.accelerator.current_device_index
current_stream = torch.accelerator.current_stream
set_device = torch.accelerator.set_device_index
synchronize = torch.accelerator.synchronize


def device_count() -> int:
    return _extension.DEVICES


def is_available() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def _lazy_init() -> None:
    """Nothing is left to do; but for torch 2.7, a device without this is never initialised."""


def manual_seed_all(seed: int) -> None:
    """Random numbers are made by the host."""

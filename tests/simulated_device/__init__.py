"""A device named ``sim`` for tests: host threads that behave as an accelerator's streams.

Importing this builds the C++ extension, once for each version of its source and of torch,
and registers two devices, ``sim:0`` and ``sim:1``, for the rest of the process. From then
on ``torch.accelerator`` and integers for devices mean these. Where there is a GPU, torch finds
it no more in this process.

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

from torchfut_aio._devices._streams import side_stream

from .. import gpus

gpus.hide()

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
take_new_streams_away = _extension.take_new_streams_away
"""``take_new_streams_away()``, until the next reset, as all functions below:
``torch.Stream(device)`` raises, as on MPS and other backends that have the default stream only."""
take_events_away = _extension.take_events_away
"""``take_events_away()``: whatever is asked of events raises "Backend doesn't support events.", as
on out-of-tree backends that have none."""
refuse_events = _extension.refuse_events
"""``refuse_events()``: recording events, and having streams wait for them, raises an error, as on
CUDA once a kernel has failed."""
keep_first_recordings = _extension.keep_first_recordings
"""``keep_first_recordings()``: an event that is recorded again while it is pending is done at its
first recording, as on torch_openreg."""
count_contexts = _extension.count_contexts
"""``count_contexts()``: from now on a device has a context if it was made current, or was current
while the device was asked anything, as on CUDA."""
has_context = _extension.has_context
"""``has_context(index)`` tells whether a device has a context."""


def reset() -> None:
    """Wakes all kernels, waits for them, forgets all failures, and is as at first."""
    global Event
    _extension.reset()
    Event = EventOfCuda
    side_stream.cache_clear()  # it may be the current one, as a test has taken new ones away


def take_event_class_of(backend: str) -> None:
    """Has ``sim.Event``, until the next reset, take what that of a backend takes.

    That of "xpu" has no argument ``blocking``; that of "mps" is no ``torch.Event`` either. That of
    "cuda before 2026" can be recorded on streams of the device's own class only.
    """
    global Event
    Event = {"xpu": EventOfXpu, "mps": EventOfMps, "cuda before 2026": EventOfOldCuda}[backend]


counters = _extension.counters
"""``counters()`` returns how often what was called, as a dict: ``event_queries``,
``events_created``, ``events_destroyed`` and blocking ``synchronizations``."""
reset_counters = _extension.reset_counters


def finished_at(stream: torch.Stream) -> float:
    """Returns when the latest kernel of ``stream`` finished, by ``time.monotonic()``."""
    when: float = _extension.finished_at(stream.device_index, stream.stream_id)
    return when


torch.utils.rename_privateuse1_backend("sim")
# This module is what torch.get_device_module("sim") returns, so some names are torch's.
torch._register_device_module("sim", sys.modules[__name__])
torch._C._sim_hasPrimaryContext = has_context  # type: ignore[attr-defined]  # as CUDA's


class EventOfXpu(torch.Event):
    """As ``torch.xpu.Event``."""

    def __new__(cls, enable_timing: bool = False) -> EventOfXpu:
        return super().__new__(cls, "sim", enable_timing=enable_timing)


class EventOfMps:
    """As ``torch.mps.Event``."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._event = torch.Event("sim", enable_timing=enable_timing)

    def record(self) -> None:
        self._event.record()


class EventOfCuda(torch.Event):
    """As ``torch.cuda.Event``."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False) -> EventOfCuda:
        return super().__new__(cls, "sim", enable_timing=enable_timing, blocking=blocking)


class EventOfOldCuda(EventOfCuda):
    """As ``torch.cuda.Event`` was, but it raises where that one broke the process."""

    def record(self, stream: torch.Stream | None = None) -> None:
        if not isinstance(stream, Stream):
            raise TypeError("this is no stream of the device's own class")
        super().record(stream)


Event: type = EventOfCuda


class Stream(torch.Stream):
    """As ``torch.cuda.Stream``."""

    def __new__(cls, device: object = None, priority: int = 0, **kwargs: int) -> Stream:
        if kwargs:  # the pieces of one that is there
            return super().__new__(cls, priority=priority, **kwargs)
        return super().__new__(cls, device or "sim", priority=priority)


current_device = torch.accelerator.current_device_index
current_stream = torch.accelerator.current_stream
set_device = torch.accelerator.set_device_index
synchronize = torch.accelerator.synchronize


def _maybe_exchange_device(index: int) -> int:
    """As that of ``torch.cuda``, which remembers a device without a context as the current one."""
    before: int = _extension.set_current_device_without_context(index)
    return before


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

"""A device named ``sim`` for tests: host threads that behave like an accelerator's streams.

Importing this builds the C++ extension, once for each version of its source and of torch, and
registers two devices, ``sim:0`` and ``sim:1``, for the rest of the process. After that
``torch.accelerator`` and integers for devices mean these, and torch finds no GPU in this process.

``fill_``, ``copy_`` and the functions below enqueue kernels on the current stream. Any other
operation waits for the current streams, and is computed by the host.
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
    # Also find ninja in an environment that is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with mock.patch.dict(os.environ, PATH=path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A CUDA build of torch may print that CUDA is missing, which does not matter here.
        with contextlib.redirect_stderr(io.StringIO()):
            from torch.utils import cpp_extension

        sources = [(_HERE / name).read_text() for name in ("simulated_device.cpp", "streams.h")]
        built_for = [torch.__version__, torch.__file__, sys.version, str(_HERE), *sources]
        key = hashlib.sha256("\0".join(built_for).encode()).hexdigest()[:16]
        folder = _CACHE / f"simulated_device-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "one_at_a_time", "w") as lock:
            # The lock of load() itself remains if its process is killed.
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "lock").unlink(missing_ok=True)
            return cpp_extension.load(
                "simulated_device",
                str(_HERE / "simulated_device.cpp"),
                # Without optimisation: torch's headers dominate the build, and most kernels sleep.
                extra_cflags=["-O0"],
                build_directory=str(folder),
            )


_extension = _build()
# After Python's threads have ended, and before the interpreter is finalized.
atexit.register(_extension.shut_down)

sleep = _extension.sleep
"""``sleep(seconds)`` enqueues a kernel that sleeps."""
fill_after = _extension.fill_after
"""``fill_after(tensor, value, seconds)`` enqueues a kernel that sleeps, then fills."""
wake = _extension.wake
"""``wake()`` ends the sleep of all kernels enqueued so far, so that no test depends on time."""
fail = _extension.fail
"""``fail(message)`` enqueues a kernel that fails. The stream runs no further kernel, and
queries and synchronisations of it, and of events recorded on it later, raise an error."""
take_new_streams_away = _extension.take_new_streams_away
"""``take_new_streams_away()``: until the next reset, ``torch.Stream(device)`` raises, as on MPS and
other backends that have only the default stream. (All functions below last until the reset.)"""
take_events_away = _extension.take_events_away
"""``take_events_away()``: every use of an event raises "Backend doesn't support events.", as on
out-of-tree backends without events."""
refuse_events = _extension.refuse_events
"""``refuse_events()``: recording an event, and making a stream wait for one, raises an error, as on
CUDA after a failed kernel."""
keep_first_recordings = _extension.keep_first_recordings
"""``keep_first_recordings()``: an event that is recorded again while pending completes with the
first recording, as on torch_openreg."""
count_contexts = _extension.count_contexts
"""``count_contexts()``: a device gets a context when it is made current, or is used while it is
current, as on CUDA."""
has_context = _extension.has_context
"""``has_context(index)`` returns whether a device has a context."""


def reset() -> None:
    """Wake all kernels, wait for them, and restore the initial state, without failures."""
    global Event
    _extension.reset()
    Event = EventOfCuda
    side_stream.cache_clear()  # a test that took new streams away may have cached the current one


def take_event_class_of(backend: str) -> None:
    """Make ``sim.Event`` behave like a backend's class, until the next reset.

    "xpu" has no argument ``blocking``; "mps" lacks it too, and is no subclass of ``torch.Event``.
    "cuda before 2026" can be recorded only on streams of the device's own class.
    """
    global Event
    Event = {"xpu": EventOfXpu, "mps": EventOfMps, "cuda before 2026": EventOfOldCuda}[backend]


counters = _extension.counters
"""``counters()`` returns the number of calls, as a dict: ``event_queries``, ``events_created``,
``events_destroyed`` and blocking ``synchronizations``."""
reset_counters = _extension.reset_counters


def finished_at(stream: torch.Stream) -> float:
    """Return when the latest kernel of ``stream`` finished, by ``time.monotonic()``."""
    when: float = _extension.finished_at(stream.device_index, stream.stream_id)
    return when


torch.utils.rename_privateuse1_backend("sim")
# This module is what torch.get_device_module("sim") returns, so some names are torch's.
torch._register_device_module("sim", sys.modules[__name__])
torch._C._sim_hasPrimaryContext = has_context  # type: ignore[attr-defined]  # as CUDA's


class EventOfXpu(torch.Event):
    """Like ``torch.xpu.Event``."""

    def __new__(cls, enable_timing: bool = False) -> EventOfXpu:
        return super().__new__(cls, "sim", enable_timing=enable_timing)


class EventOfMps:
    """Like ``torch.mps.Event``."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._event = torch.Event("sim", enable_timing=enable_timing)

    def record(self) -> None:
        self._event.record()


class EventOfCuda(torch.Event):
    """Like ``torch.cuda.Event``."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False) -> EventOfCuda:
        return super().__new__(cls, "sim", enable_timing=enable_timing, blocking=blocking)


class EventOfOldCuda(EventOfCuda):
    """Like the old ``torch.cuda.Event``, but raises where that one corrupted the process."""

    def record(self, stream: torch.Stream | None = None) -> None:
        if not isinstance(stream, Stream):
            raise TypeError("this is no stream of the device's own class")
        super().record(stream)


Event: type = EventOfCuda


class Stream(torch.Stream):
    """Like ``torch.cuda.Stream``."""

    def __new__(cls, device: object = None, priority: int = 0, **kwargs: int) -> Stream:
        if kwargs:  # the id and device of an existing stream
            return super().__new__(cls, priority=priority, **kwargs)
        return super().__new__(cls, device or "sim", priority=priority)


current_device = torch.accelerator.current_device_index
current_stream = torch.accelerator.current_stream
set_device = torch.accelerator.set_device_index
synchronize = torch.accelerator.synchronize


def _maybe_exchange_device(index: int) -> int:
    """Like that of ``torch.cuda``, which stores even a device without a context as current."""
    before: int = _extension.set_current_device_without_context(index)
    return before


def device_count() -> int:
    return _extension.DEVICES


def is_available() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def _lazy_init() -> None:
    """Do nothing. Without this function, torch 2.7 never initialises the device."""


def manual_seed_all(seed: int) -> None:
    """Do nothing: the host generates the random numbers."""

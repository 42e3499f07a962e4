"""What a future knows of the kernels that still fill its value.

A future hands out tensors of an accelerator while kernels still write to them. What makes
that safe is its *readiness*, made when it is completed, while the streams are current on which
the kernels were enqueued, and before anybody can see that it is complete. It has two parts:

- A C++ future with the devices of these tensors, completed then, so that it has events of
  its own on these streams. Waiting for it orders the current streams after the kernels; a
  callback of it runs on dedicated streams.
- Recorded events on these streams, for those who await that the kernels are done: the events
  that C++ records cannot be queried from Python.

For devices that were declared, torch tells which tensors count, by pickling. A
``torch.futures.Future`` made without ``devices`` hands them out with no synchronisation
at all; for ours, `found_readiness` looks for them. A process that uses no accelerator pays a
glance at the type of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from .._loops import Loop
from ._events import RecordedEvent, record_event
from ._reached import until_reached
from ._streams import accelerator_in_use, current_stream, on_stream
from ._tensors import device_of, tensors
from ._watcher import watcher_of

__all__ = ["Readiness", "declared_readiness", "found_readiness", "joint_readiness"]


class Readiness:
    """When the kernels that fill a value have finished, and how to order streams after them."""

    __slots__ = ("_cpp", "_events", "error")

    def __init__(
        self,
        devices: Iterable[torch.device],
        found: list[torch.Tensor],
        events: Sequence[RecordedEvent] | None = None,
    ) -> None:
        self.error: Exception | None = None
        """What the device said when streams could not be ordered for a callback."""
        self._cpp: torch._C.Future[list[torch.Tensor]] = torch._C.Future(list(devices))
        self._cpp.set_result(found)
        if events is None:
            used = {device for tensor in found if (device := device_of(tensor)).type != "cpu"}
            events = [record_event(current_stream(device)) for device in used]
        self._events = events

    def ready(self) -> Generator[Any, Any, None]:
        """Suspends the current task until the kernels have finished; for ``yield from``.

        Raises:
            RuntimeError: What the device says of a kernel that failed.
        """
        if self._events:
            yield from until_reached(self._events)
            self._events = ()  # so that they go back to the pool

    def notify_when_ready(
        self, loop: Loop, notify: Callable[[Exception | None], object]
    ) -> Callable[[], None]:
        """Has ``notify(error or None)`` called once the kernels have finished, or one failed.

        At once, if that is so now. If it raises later, it is called again, with what it raised.

        Args:
            loop: The loop that runs in this thread, and is to call it.
            notify: What to call. If it was interrupted, it is called again.

        Returns:
            A function that withdraws this.
        """
        return watcher_of(loop).notify_when_reached(self._events, notify)

    def wait(self) -> None:
        """Orders the current streams after the kernels.

        Raises:
            RuntimeError: The device cannot: its own error.
        """
        self._cpp.wait()

    def run(self, callback: Callable[[], object]) -> None:
        """Calls ``callback``, once, on dedicated streams that are ordered after the kernels.

        Where the device has no such streams, the current ones are ordered. Where nothing can be
        ordered, as after a kernel's error, it is called all the same, and ``error`` tells why.

        Raises:
            BaseException: What the callback raised; or an interrupt, which may have struck
                before the callback was called.
        """
        call = _Call(callback)
        failure: Exception | None = None
        interrupted = False
        try:
            self._cpp.add_done_callback(call.run)
            if not call.begun:
                # What interrupts C++ on its way into Python is printed there, and lost.
                self._cpp.add_done_callback(call.run)
                interrupted = call.begun
        except Exception as error:
            failure = error
        if not call.begun:
            self._order_current_streams(failure)
            callback()
        if call.error is not None or interrupted:
            try:
                raise call.error or KeyboardInterrupt
            finally:
                del call

    def _order_current_streams(self, failure: Exception | None) -> None:
        try:
            self._cpp.wait()
        except Exception as error:
            self.error = (failure or error).with_traceback(None)

    def tensors(self) -> list[torch.Tensor]:
        """Returns the tensors; raises if one is on a device that was not declared."""
        return self._cpp.value()


class _Call:
    """A call that C++ makes. An exception cannot cross C++ as itself, so this carries it."""

    __slots__ = ("_callback", "begun", "error")

    def __init__(self, callback: Callable[[], object]) -> None:
        self._callback = callback
        self.begun = False
        self.error: BaseException | None = None

    def run(self, _future: object) -> None:
        try:
            self.begun = True
            self._callback()
        except BaseException as error:
            self.error = error


def declared_readiness(
    devices: Sequence[torch.device], value: object
) -> tuple[Readiness | None, Exception | None]:
    """Returns the readiness of a value on ``devices``, and the error it is to fail with, if any."""
    readiness, found, error = None, [], None
    try:
        # C++ would call the same, and keep what it finds to itself.
        found = torch._jit_internal._extract_tensors(value)  # type: ignore[no-untyped-call]
    except Exception as exception:  # what cannot be pickled
        error = exception.with_traceback(None)
    try:
        readiness = Readiness(devices, found)
        readiness.tensors()
    except Exception as exception:  # on other devices; or the devices take no more events
        error = error or exception.with_traceback(None)
    return readiness, error


def found_readiness(value: object) -> tuple[Readiness | None, Exception | None]:
    """Returns the readiness of a value that holds something on an accelerator; or the error.

    There is an error if the accelerator, because a kernel has failed, takes no more events. A
    value that cannot be searched, whatever it raises, counts as one that holds nothing.
    """
    if type(value) is torch.Tensor and value.is_cpu:
        return None, None
    accelerator = accelerator_in_use()
    if accelerator is None:
        return None, None
    try:
        found = _tensors_on(accelerator.type, value)
    except Exception:
        found = []
    if not found:
        return None, None
    try:
        return Readiness(set(map(device_of, found)), found), None
    except Exception as error:
        return None, error.with_traceback(None)


# A function of its own: see tests/test_backward_jumps.py.
def _tensors_on(kind: str, value: object) -> list[torch.Tensor]:
    return [tensor for tensor in tensors(value) if device_of(tensor).type == kind]


def joint_readiness(
    parts: Iterable[Readiness | None],
) -> tuple[Readiness | None, Exception | None]:
    """Returns the readiness of several values together, if one of them has one; or the error."""
    some = [part for part in dict.fromkeys(parts) if part is not None]
    if len(some) < 2:
        return (some[0] if some else None), None
    try:
        return _joint_readiness(some), None
    except Exception as error:
        return None, error.with_traceback(None)


def _joint_readiness(parts: Sequence[Readiness]) -> Readiness:
    found = [tensor for part in parts for tensor in part.tensors()]
    devices = {device for tensor in found if (device := device_of(tensor)).type != "cpu"}
    with ExitStack() as streams:
        # On streams of its own, so as not to hold up those of whoever completes the last.
        for device in devices:
            streams.enter_context(on_stream(torch.Stream(device)))
        for part in parts:
            part.wait()
        return Readiness(devices, found, [event for part in parts for event in part._events])

"""What a future knows of the kernels that still fill its value.

A future hands out tensors of an accelerator while kernels still write to them. Its *readiness*
makes that safe. It is made when the future is completed: while the streams are current on which
the kernels were enqueued, and before anybody can see that the future is complete. It has:

- A C++ future with the devices of these tensors, completed then, so that it records events of
  its own on these streams. Waiting for it orders the current streams after the kernels; a
  callback of it runs on dedicated streams.
- Recorded events on these streams, for those who await that the kernels are done: Python cannot
  query the events of C++.

On devices that the program has declared, torch tells which tensors count, by pickling. For a
future without ``devices``, `found_readiness` looks for them; torch's own would hand them out with
no synchronisation at all. A process that uses no accelerator pays a glance at the result's type.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch

from .._loops import Loop
from .._pytorch import CppFuture, extract_tensors
from ._blocker import Notify
from ._events import RecordedEvent, record_event, says_no_events
from ._streams import (
    accelerator_in_use,
    call_with_current,
    current_stream,
    on_stream,
    stream_for_orders,
)
from ._tensors import device_of, tensors
from ._watcher import Attach, until_reached, watcher_of


class Readiness:
    """When the kernels that fill a value have finished, and how to order streams after them."""

    __slots__ = ("_cpp", "_device", "_events")

    def __init__(
        self,
        found: list[torch.Tensor],
        devices: Sequence[torch.device] = (),
        events: Sequence[RecordedEvent] | None = None,
    ) -> None:
        used = _devices_of(found)
        self._device = next(iter(used), None)  # one that has a context
        completed = partial(_completed, list(devices or used), found)
        self._cpp = call_with_current(self._device, completed)
        if events is None:
            events = [record_event(current_stream(device)) for device in used]
        self._events = events

    def ready(self) -> Generator[Any, Any, None]:
        """Suspends the current task until the kernels have finished, or one has failed."""
        if self._events:
            yield from until_reached(self._events)
            self._events = ()  # so that they go back to the pool

    def notify_when_ready(self, loop: Loop, notify: Notify, attach: Attach) -> None:
        """Does what `Watcher.notify_when_reached` does, on ``loop``, which runs in this thread."""
        watcher_of(loop).notify_when_reached(self._events, notify, attach)

    def notify_in_background(self, notify: Notify) -> None:
        """Calls ``notify(error or None)`` when the kernels have finished: in a thread, or now."""
        from ._background import when_reached

        events = iter(self._events)

        def wait_for_next(error: Exception | None = None) -> None:
            event = next(events, None)
            if error is not None or event is None:
                notify(error)
            else:
                when_reached(event, wait_for_next)

        wait_for_next()

    def wait(self) -> None:
        """Orders the current streams after the kernels; raises the device's error if it cannot."""
        call_with_current(self._device, self._cpp.wait)

    def run(self, callback: Callable[[], object]) -> None:
        """Calls ``callback``, once, on dedicated streams that are ordered after the kernels.

        On the current streams, where the device has no others. If nothing can be ordered, as
        after a kernel's error, it is called all the same. Raises what the callback raised, or an
        interrupt that may have come before the callback was called.
        """
        call = _Call(callback)
        interrupted = False
        try:
            self._cpp.add_done_callback(call.run)
            if not call.begun:
                # Ctrl-C between C++ and the first line of `run` is printed and lost: once more.
                self._cpp.add_done_callback(call.run)
                interrupted = call.begun
        except Exception:
            pass  # nothing can be ordered, or there are no dedicated streams
        if not call.begun:
            with suppress(Exception):
                self.wait()
            callback()
        if call.error is not None or interrupted:
            try:
                raise call.error or KeyboardInterrupt
            finally:
                del call

    def tensors(self) -> list[torch.Tensor]:
        """Returns the tensors; raises if one is on a device that was not declared."""
        return self._cpp.value()

    @staticmethod
    def joint(parts: Sequence[Readiness]) -> Readiness:
        """Returns the readiness of several values together."""
        found = [tensor for part in parts for tensor in part.tensors()]
        with ExitStack() as streams:
            # On streams of its own, so as not to hold up those of whoever completes the last.
            for device in _devices_of(found):
                streams.enter_context(on_stream(stream_for_orders(device)))
            for part in parts:
                part.wait()
            return Readiness(found, events=[event for part in parts for event in part._events])


def _completed(
    devices: list[torch.device], found: list[torch.Tensor]
) -> CppFuture[list[torch.Tensor]]:
    """Returns a C++ future that is done; without devices, if these have no events."""
    future: CppFuture[list[torch.Tensor]] = CppFuture(devices)
    try:
        future.set_result(found)
    except RuntimeError as error:
        if not says_no_events(error):
            raise
        future = CppFuture([])
        future.set_result(found)
    return future


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
        found = [*tensors(value)] if extract_tensors is None else extract_tensors(value)
    except Exception as exception:  # what cannot be pickled
        error = exception.with_traceback(None)
    try:
        readiness = Readiness(found, devices)
        readiness.tensors()
    except Exception as exception:  # on other devices; or the devices take no more events
        error = error or exception.with_traceback(None)
    return readiness, error


def found_readiness(value: object) -> tuple[Readiness | None, Exception | None]:
    """Returns the readiness of a value that holds something on an accelerator; or the error."""
    if type(value) is torch.Tensor and value.is_cpu:
        return None, None
    accelerator = accelerator_in_use()
    if accelerator is None:
        return None, None
    try:
        found = _tensors_on(accelerator.type, value)
    except Exception:  # it cannot be searched, so it counts as one that holds nothing
        found = []
    try:
        return (Readiness(found) if found else None), None
    except Exception as error:  # after a failed kernel, the accelerator takes no more events
        return None, error.with_traceback(None)


# A function of its own: see tests/test_backward_jumps.py.
def _tensors_on(kind: str, value: object) -> list[torch.Tensor]:
    return [tensor for tensor in tensors(value) if device_of(tensor).type == kind]


def _devices_of(found: Iterable[torch.Tensor]) -> set[torch.device]:
    return {device for tensor in found if (device := device_of(tensor)).type != "cpu"}


def joint_readiness(
    parts: Iterable[Readiness | None],
) -> tuple[Readiness | None, Exception | None]:
    """Returns the readiness of several values together, if one of them has one; or the error."""
    some = [part for part in dict.fromkeys(parts) if part is not None]
    if len(some) < 2:
        return (some[0] if some else None), None
    try:
        return Readiness.joint(some), None
    except Exception as error:
        return None, error.with_traceback(None)

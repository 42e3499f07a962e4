"""The readiness of a future: when the kernels have finished that fill its value.

A future returns tensors while kernels still write to them. Its *readiness* makes that safe. It is
made when the future is completed: the streams on which the kernels were enqueued are current then,
and nothing sees the future as done yet. Values that are set at the same moment share its events.

If the future has ``devices``, torch finds the tensors, by pickling the value. Otherwise torch would
synchronise nothing, so `found_readiness` searches the value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from .._loops import Loop
from .._pytorch import CppFuture, extract_tensors
from .._threads import Notify
from ._events import RecordedEvent, record_event
from ._streams import (
    accelerator_in_use,
    current_stream,
    dedicated_stream,
    devices_in_use,
    kind_of,
    on_streams,
)
from ._tensors import devices_of, keep_memory, search
from ._watcher import until_reached, watcher_of

# How many parts of a value are searched. A value with more counts as one that holds tensors.
_MOST_PARTS = 1000


class Moment:
    """The end of the work that is enqueued now on the current streams."""

    def __init__(self) -> None:
        self._events: dict[torch.device, RecordedEvent] = {}

    @functools.cached_property
    def accelerator(self) -> torch.device | None:
        """The accelerator, if it is in use."""
        return accelerator_in_use()

    def events(self, devices: Iterable[torch.device]) -> list[RecordedEvent]:
        """Return an event on the current stream of each device, recorded when first asked for."""
        for device in devices:
            if device not in self._events:
                self._events[device] = record_event(current_stream(device))
        return [self._events[device] for device in devices]


@dataclass(eq=False, slots=True)
class Readiness:
    """When the kernels that fill a value have finished, and how to order streams after them."""

    tensors: list[torch.Tensor]  # those in the value
    events: Sequence[RecordedEvent]  # recorded after the kernels; those reached may be missing
    devices: Iterable[torch.device]  # those on which a callback gets streams

    def ready(self) -> Generator[Any, Any, None]:
        """Suspend the current task until the kernels have finished, or one has failed."""
        if self.events:
            yield from until_reached(self.events)
            self.events = ()  # return them to the pool

    def notify_when_ready(self, loop: Loop, notify: Notify) -> Callable[[object], None]:
        """Do what `Watcher.notify_when_reached` does, on ``loop``, which runs in this thread."""
        return watcher_of(loop).notify_when_reached(self.events, notify)

    def notify_in_background(self, notify: Notify) -> None:
        """Call ``notify(error or None)`` when the kernels have finished: in a thread, or now."""
        from ._background import when_reached

        when_reached(self.events, notify)

    def wait(self) -> None:
        """Order the current streams after the kernels; raise the device's error if it cannot."""
        current: dict[torch.device, torch.Stream] = {}
        for event in self.events:
            device = event.event.device
            stream = current.get(device) or current.setdefault(device, current_stream(device))
            event.order(stream)
        keep_memory(self.tensors, current)

    def run(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` once, on dedicated streams that are ordered after the kernels.

        If the streams cannot be ordered, for example after a kernel's error, call it nevertheless.
        """
        begun = False
        try:
            with on_streams([dedicated_stream(device) for device in self.devices]):
                self.wait()
                begun = True  # right before the call, so that no interrupt comes in between
                callback()
        except BaseException as error:
            if begun:
                raise
            # The callback may be another thread's, so we call it also after an interrupt, and then
            # raise the interrupt.
            with suppress(Exception):
                self.wait()
            callback()
            if not isinstance(error, Exception):
                raise


def declared_readiness(
    devices: Sequence[torch.device], value: object, moment: Moment
) -> tuple[Readiness | None, Exception | None]:
    """Return the readiness of a value on ``devices``; and the error that it fails with, if any."""
    try:
        # C++ does the same, but does not return the tensors that it finds.
        found = search(value)[0] if extract_tensors is None else extract_tensors(value)
        used = devices_of(found)
        if not used <= {*devices}:
            _refuse(devices, found)
        return Readiness(found, moment.events(used), devices), None
    except Exception as error:  # no pickle, or an undeclared device, or the device has failed
        return Readiness([], (), devices), error.with_traceback(None)


def _refuse(devices: Sequence[torch.device], found: list[torch.Tensor]) -> None:
    """Raise the error of C++ for tensors on other devices than those declared."""
    future: CppFuture[list[torch.Tensor]] = CppFuture([*devices])
    future.set_result(found)
    future.value()


def found_readiness(value: object, moment: Moment) -> tuple[Readiness | None, Exception | None]:
    """Return the readiness of a value with tensors on an accelerator, or an error."""
    if type(value) is torch.Tensor and value.is_cpu:
        return None, None
    accelerator = moment.accelerator
    if accelerator is None:
        return None, None
    try:
        found, is_all = search(value, kind_of(accelerator), _MOST_PARTS)
    except Exception:  # it cannot be searched, so it counts as empty
        return None, None
    try:
        used = devices_of(found) if is_all else devices_in_use()
        return (Readiness(found, moment.events(used), used) if used else None), None
    except Exception as error:  # after a failed kernel, no event can be recorded
        return None, error.with_traceback(None)


def joint_readiness(parts: Iterable[Readiness | None]) -> Readiness | None:
    """Return the readiness of several values together; None if none of them has one."""
    some = [part for part in dict.fromkeys(parts) if part is not None]
    if len(some) < 2:
        return some[0] if some else None
    return Readiness(
        [tensor for part in some for tensor in part.tensors],
        [*dict.fromkeys(event for part in some for event in part.events)],
        {device for part in some for device in part.devices},
    )

"""What a future knows of the kernels that still fill its value.

A future hands out tensors of an accelerator while kernels still write to them. Its *readiness*
makes that safe. It is made when the future is completed: while the streams are current on which
the kernels were enqueued, and before anything can see that the future is complete. Values that are
set at the same moment share the events that it records.

On devices that the program has declared, torch finds the tensors, by pickling. For a future
without ``devices``, `found_readiness` looks for them; torch's own would hand them out with no
synchronisation at all. A process that uses no accelerator pays a glance at the result's type.
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
from ._tensors import devices_of, keep_memory, search, tensors
from ._watcher import until_reached, watcher_of

# A value of more parts is not searched to the end, but taken for one that holds tensors.
_MOST_PARTS = 1000


class Moment:
    """The end of what is enqueued now on the current streams, for all values that are set now."""

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
    """When the kernels that fill a value have finished, and how to order streams after them.

    Attributes:
        tensors: The tensors in the value.
        events: What the kernels end with; those that are known to be reached may be missing.
        devices: The devices on which a callback gets streams.
    """

    tensors: list[torch.Tensor]
    events: Sequence[RecordedEvent]
    devices: Iterable[torch.device]

    def ready(self) -> Generator[Any, Any, None]:
        """Suspends the current task until the kernels have finished, or one has failed."""
        if self.events:
            yield from until_reached(self.events)
            self.events = ()  # so that they go back to the pool

    def notify_when_ready(self, loop: Loop, notify: Notify) -> Callable[[object], None]:
        """Do what `Watcher.notify_when_reached` does, on ``loop``, which runs in this thread."""
        return watcher_of(loop).notify_when_reached(self.events, notify)

    def notify_in_background(self, notify: Notify) -> None:
        """Calls ``notify(error or None)`` when the kernels have finished: in a thread, or now."""
        from ._background import when_reached

        when_reached(self.events, notify)

    def wait(self) -> None:
        """Orders the current streams after the kernels; raises the device's error if it cannot."""
        current: dict[torch.device, torch.Stream] = {}
        for event in self.events:
            device = event.event.device
            stream = current.get(device) or current.setdefault(device, current_stream(device))
            event.order(stream)
        keep_memory(self.tensors, current)

    def run(self, callback: Callable[[], object]) -> None:
        """Calls ``callback``, once, on dedicated streams that are ordered after the kernels.

        On the current streams, where the device has no others. If nothing can be ordered, as
        after a kernel's error, it is called all the same. Raises what the callback raised, or an
        interrupt that came before the callback was called.
        """
        begun = False
        try:
            with on_streams([dedicated_stream(device) for device in self.devices]):
                self.wait()
                begun = True  # no call comes before the next, so no interrupt does
                callback()
        except BaseException as error:
            if begun:
                raise
            with suppress(Exception):
                self.wait()
            callback()
            if not isinstance(error, Exception):
                raise


def declared_readiness(
    devices: Sequence[torch.device], value: object, moment: Moment
) -> tuple[Readiness | None, Exception | None]:
    """Returns the readiness of a value on ``devices``, and the error it is to fail with, if any."""
    try:
        # C++ would call the same, and keep what it finds to itself.
        found = [*tensors(value)] if extract_tensors is None else extract_tensors(value)
        used = devices_of(found)
        if not used <= {*devices}:
            _refuse(devices, found)
        return Readiness(found, moment.events(used), devices), None
    except Exception as error:  # not to be pickled; on other devices; or these take no more events
        return Readiness([], (), devices), error.with_traceback(None)


def _refuse(devices: Sequence[torch.device], found: list[torch.Tensor]) -> None:
    """Raise the error of C++ for tensors on other devices than those declared."""
    future: CppFuture[list[torch.Tensor]] = CppFuture([*devices])
    future.set_result(found)
    future.value()


def found_readiness(value: object, moment: Moment) -> tuple[Readiness | None, Exception | None]:
    """Returns the readiness of a value that holds something on an accelerator; or the error."""
    if type(value) is torch.Tensor and value.is_cpu:
        return None, None
    accelerator = moment.accelerator
    if accelerator is None:
        return None, None
    try:
        found, is_all = search(value, kind_of(accelerator), _MOST_PARTS)
    except Exception:  # it cannot be searched, so it counts as one that holds nothing
        return None, None
    try:
        used = devices_of(found) if is_all else devices_in_use()
        return (Readiness(found, moment.events(used), used) if used else None), None
    except Exception as error:  # after a failed kernel, the accelerator takes no more events
        return None, error.with_traceback(None)


def joint_readiness(parts: Iterable[Readiness | None]) -> Readiness | None:
    """Returns the readiness of several values together, if one of them has one."""
    some = [part for part in dict.fromkeys(parts) if part is not None]
    if len(some) < 2:
        return some[0] if some else None
    return Readiness(
        [tensor for part in some for tensor in part.tensors],
        [*dict.fromkeys(event for part in some for event in part.events)],
        {device for part in some for device in part.devices},
    )

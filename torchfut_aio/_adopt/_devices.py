"""Recorded events, and streams: the work that is enqueued on them so far."""

from __future__ import annotations

from typing import Any

import torch

from .._arguments import Devices
from .._devices import RecordedEvent, record_event
from .._future import Future
from ._registry import adopts


# The classes of a device may be unrelated to those of torch.
@adopts("torch.Event", "torch.cuda.Event", "torch.xpu.Event")
def _from_event(source: torch.Event, *, devices: Devices = None) -> Future[None]:
    return _from_recorded(RecordedEvent(source), devices)


@adopts("torch.mps.Event")
def _from_event_of_mps(source: Any, *, devices: Devices = None) -> Future[None]:
    return _from_recorded(RecordedEvent(_EventOfMps(source)), devices)  # type: ignore[arg-type]


class _EventOfMps:
    """An event of MPS with a `device`: the only one."""

    device = torch.device("mps", 0)

    def __init__(self, event: Any) -> None:
        self.query = event.query
        self.synchronize = event.synchronize


@adopts("torch.Stream", "torch.cuda.Stream", "torch.xpu.Stream")
def _from_stream(source: torch.Stream, *, devices: Devices = None) -> Future[None]:
    return _from_recorded(record_event(source), devices)


def _from_recorded(event: RecordedEvent, devices: Devices) -> Future[None]:
    from .._devices._background import when_reached

    future: Future[None] = Future(devices=devices)

    def complete(error: Exception | None) -> None:
        if error is None:
            future.try_set_result(None)
        else:
            future.try_set_exception(error)

    when_reached([event], complete)
    return future

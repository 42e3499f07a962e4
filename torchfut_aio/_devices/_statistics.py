"""What event watchers count, and the sums of those whose loops have gone."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

__all__ = ["EndedWatchers", "Statistics", "total"]


class Statistics(NamedTuple):
    """What the event watcher of a loop, or those of all, have done and are doing.

    Attributes:
        pending: How many waits for device work are pending now.
        polls: How often the watcher polled pending events.
        queries: How many events it queried.
        hits: How many of these queries found the work done.
        intervals: The learned interval of each stream, in seconds: how long it was
            lately from one awaited piece of work to the next. By device and stream id.
    """

    pending: int = 0
    polls: int = 0
    queries: int = 0
    hits: int = 0
    intervals: Mapping[tuple[torch.device, int], float] = MappingProxyType({})


def total(parts: Iterable[Statistics]) -> Statistics:
    """Returns the sums, and the intervals of all."""
    parts = list(parts)
    intervals: dict[tuple[torch.device, int], float] = {}
    for part in parts:
        intervals.update(part.intervals)
    return Statistics(
        sum(part.pending for part in parts),
        sum(part.polls for part in parts),
        sum(part.queries for part in parts),
        sum(part.hits for part in parts),
        intervals,
    )


class EndedWatchers:
    """The statistics of watchers that are gone; summed up now and then, to stay short."""

    def __init__(self) -> None:
        self._parts: list[Statistics] = []
        self._summing = threading.Lock()

    def add(self, part: Statistics) -> None:
        """Adds a part. A finaliser may call this, in the middle of anything."""
        self._parts.append(part)
        if len(self._parts) > 50 and self._summing.acquire(blocking=False):
            try:
                count = len(self._parts)
                self._parts[:count] = [total(self._parts[:count])]
            finally:
                self._summing.release()

    def parts(self) -> list[Statistics]:
        """Returns the parts."""
        return list(self._parts)

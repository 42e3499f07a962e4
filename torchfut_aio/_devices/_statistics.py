"""What event watchers count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch


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
    result = Statistics()
    for part in parts:
        result = Statistics(
            result.pending + part.pending,
            result.polls + part.polls,
            result.queries + part.queries,
            result.hits + part.hits,
            {**result.intervals, **part.intervals},
        )
    return result

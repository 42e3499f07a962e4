"""What event watchers count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class PollStatistics:
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
    intervals: Mapping[tuple[torch.device, int], float] = field(default_factory=dict)


def total(parts: Iterable[PollStatistics]) -> PollStatistics:
    """Return the sums, and the intervals of all."""
    result = PollStatistics()
    for part in parts:
        result = PollStatistics(
            pending=result.pending + part.pending,
            polls=result.polls + part.polls,
            queries=result.queries + part.queries,
            hits=result.hits + part.hits,
            intervals={**result.intervals, **part.intervals},
        )
    return result

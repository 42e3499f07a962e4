"""Accelerators: when is the work of a device done that fills a value?

``_readiness.py`` keeps what a future has to know about that: the tensors in its value
(``_tensors.py``), and events (``_events.py``, ``_capture.py``) that are recorded on streams
(``_streams.py``). ``_watcher.py`` tells the tasks of a loop when events are reached:
``_stream_queue.py`` knows how few to query, ``_schedule.py`` when, ``_policy.py`` what the program
has set. A `BlockingThread` blocks instead, and ``_background.py``, imported where it is
used, serves where no loop runs.

Nothing here knows what a future of this package is.
"""

from ._events import RecordedEvent, record_event, says_no_events
from ._policy import PollPolicy, get_poll_policy, set_poll_policy
from ._readiness import (
    Moment,
    Readiness,
    declared_readiness,
    found_readiness,
    joint_readiness,
)
from ._statistics import PollStatistics
from ._streams import devices_in_use, finish_current_streams, finish_devices
from ._synchronize import synchronize, to_host
from ._tensors import HOST_ONLY
from ._watcher import poll_statistics

__all__ = [
    "HOST_ONLY",
    "Moment",
    "PollPolicy",
    "PollStatistics",
    "Readiness",
    "RecordedEvent",
    "declared_readiness",
    "devices_in_use",
    "finish_current_streams",
    "finish_devices",
    "found_readiness",
    "get_poll_policy",
    "joint_readiness",
    "poll_statistics",
    "record_event",
    "says_no_events",
    "set_poll_policy",
    "synchronize",
    "to_host",
]

"""Accelerators: when is the work of a device done that fills a value?

``_readiness.py`` keeps what a future has to know about that, and ``_tensors.py`` finds the
tensors in its value. ``_events.py`` records events on streams. ``_watcher.py`` tells the tasks
of a loop when events are reached: ``_stream_queue.py`` knows how few to query, ``_schedule.py``
when, ``_policy.py`` what the program has set; ``_blocker.py`` is for those who would rather
block a thread, ``_background.py`` for where no loop runs. ``_reached.py``, ``_synchronize.py``
and ``_to_host.py`` have what is awaited.

Nothing here knows what a future of this package is. What few programs need is imported
where it is used: ``_background.py``, and the loops' ``_timer.py``.
"""

from ._events import RecordedEvent, already_recorded, record_event
from ._policy import PollPolicy, set_poll_policy
from ._readiness import Readiness, declared_readiness, found_readiness, joint_readiness
from ._statistics import Statistics
from ._streams import devices_in_use, finish_current_streams
from ._synchronize import synchronize
from ._tensors import HOST_ONLY
from ._to_host import to_host
from ._watcher import statistics

__all__ = [
    "HOST_ONLY",
    "PollPolicy",
    "Readiness",
    "RecordedEvent",
    "Statistics",
    "already_recorded",
    "declared_readiness",
    "devices_in_use",
    "finish_current_streams",
    "found_readiness",
    "joint_readiness",
    "record_event",
    "set_poll_policy",
    "statistics",
    "synchronize",
    "to_host",
]

"""Accelerators: when have the kernels finished that fill a value?

A future keeps a `Readiness` (``_readiness.py``): the tensors in its value (``_tensors.py``), and
events (``_events.py``) that are recorded on streams (``_streams.py``). ``_watcher.py`` wakes the
tasks of a loop when events are reached: ``_stream_queue.py`` chooses which events to query, and
``_schedule.py`` when. ``_background.py``, imported on demand, watches events where no loop runs.

Nothing here depends on the futures of this package.
"""

from ._events import RecordedEvent, record_event, says_no_events
from ._readiness import (
    Moment,
    Readiness,
    declared_readiness,
    found_readiness,
    joint_readiness,
)
from ._schedule import PollPolicy, get_poll_policy, set_poll_policy
from ._streams import devices_in_use, finish_current_streams, finish_devices
from ._synchronize import synchronize, to_host
from ._tensors import HOST_ONLY
from ._watcher import PollStatistics, poll_statistics

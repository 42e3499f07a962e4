"""Accelerators: when is the work of a device done that fills a value?

``_events.py`` marks places in the work of streams. ``_watcher.py`` tells the tasks of a
loop when marks are reached, ``_policy.py`` when to look, ``_blocker.py`` is for those who
would rather block a thread, ``_background.py`` for where no loop runs. ``_tensors.py`` finds
the tensors in a value, ``_order.py`` keeps what a future has to know about them, and
``_synchronize.py`` has what is awaited.

Nothing here knows what a future of this package is. What few programs need is imported
where it is used: ``_background.py``, and the loops' ``_timer.py``.
"""

from ._events import Mark, devices_in_use, finish_current_streams, mark_of, mark_stream
from ._order import Order, declared_order, found_order, joint_order
from ._policy import PollPolicy, set_poll_policy
from ._synchronize import reached, synchronize, to_host
from ._tensors import HOST_ONLY
from ._watcher import Statistics, Wait, statistics, watcher_of

__all__ = [
    "HOST_ONLY",
    "Mark",
    "Order",
    "PollPolicy",
    "Statistics",
    "Wait",
    "declared_order",
    "devices_in_use",
    "finish_current_streams",
    "found_order",
    "joint_order",
    "mark_of",
    "mark_stream",
    "reached",
    "set_poll_policy",
    "statistics",
    "synchronize",
    "to_host",
    "watcher_of",
]

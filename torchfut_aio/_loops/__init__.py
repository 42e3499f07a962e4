"""How a completion, in any thread, reaches a task that waits on an event loop.

One file for each kind of loop, and one interface, `Loop`. A task that waits gets a *waiter* of its
loop, stores both where the completing thread will find them, and suspends. The completing thread
calls ``loop.wake(waiter)``; nothing else crosses threads. ``_loop.py`` has the queue and the
wake-up of a loop, and finds the loop that runs here. ``_asyncio.py`` and ``_trio.py`` resume tasks.
For waits in threads, see ``_waker.py``. An `Alarm` calls a function on the loop at a time that is
set again and again.

Nothing here knows what a future is, or a device.
"""

from ._alarm import Alarm
from ._asyncio import current as current_asyncio
from ._asyncio import stands_still
from ._loop import Loop, current, loop_in_this_thread, running
from ._waker import THREADS, ThreadWaiter, Waiter, Waker

__all__ = [
    "THREADS",
    "Alarm",
    "Loop",
    "ThreadWaiter",
    "Waiter",
    "Waker",
    "current",
    "current_asyncio",
    "loop_in_this_thread",
    "running",
    "stands_still",
]

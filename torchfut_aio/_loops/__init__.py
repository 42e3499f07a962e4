"""How a completion, in any thread, reaches a task that waits on an event loop.

A task that waits gets a *waiter* of its loop, stores both in the future, and suspends. The
completing thread calls ``loop.wake(waiter)``; nothing else crosses threads. ``_loop.py`` has the
interface, `Loop`, with the queue and the wake-up of a loop, and finds the loop that runs here.
``_asyncio.py`` and ``_trio.py`` resume tasks. ``_waker.py`` is for waits in threads. An `Alarm`
calls a function on the loop at a time that can be set again and again.

Nothing here depends on futures or devices.
"""

from ._alarm import Alarm
from ._asyncio import current as current_asyncio
from ._asyncio import stands_still
from ._loop import Loop, current, loop_in_this_thread, running
from ._waker import THREADS, ThreadWaiter, Waiter, Waker

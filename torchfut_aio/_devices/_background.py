"""Watches the events behind futures, on a separate loop in one thread.

Such a future may be awaited on any loop and outlive the loop where it was made, so no loop of the
program can watch its event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from .. import _loops
from .._threads import LoopThread, Notify, WorkerThread, call_contained
from ._events import RecordedEvent
from ._watcher import watcher_of


def when_reached(events: Sequence[RecordedEvent], notify: Notify) -> None:
    """Call ``notify(error or None)`` when all events are reached: in a thread, or now."""
    try:
        reached = all(map(RecordedEvent.query, events))
    except Exception as error:
        notify(error)
        return
    if reached:
        notify(None)
    else:
        _watching.submit(notify, events)


class _Watching(LoopThread):
    """Runs while there is an event to watch; ``work`` maps each notify function to its events."""

    # A daemon, so that an interpreter that exits does not wait for long kernels. But a query
    # releases the GIL, and a thread that takes it again after the interpreter has ended aborts the
    # process. So the thread has to end before that.
    timeout_at_exit = 1.0

    async def step(self, thread: WorkerThread) -> bool:
        watcher = watcher_of(_loops.current())
        for notify in self.take():
            events = self.work.get(notify)
            if events is not None:
                watcher.notify_when_reached(events, partial(self.fail, notify))
        return self.has_work() and not thread.should_end

    def fail(self, notify: Notify, error: Exception | None) -> None:
        self.woken.set()
        if self.work.pop(notify, None) is not None:
            call_contained(notify, error)


# Not asyncio.new_event_loop(): the policy of the program may not work in this thread.
_watching = _Watching("torchfut_aio watcher", asyncio.SelectorEventLoop)

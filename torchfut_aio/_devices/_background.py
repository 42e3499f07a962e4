"""Watches the events that futures are made of, on a loop of its own in one thread.

Such a future may be awaited on any loop and outlive the one where it was made, so no loop of
the program can watch its event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from .. import _loops
from .._worker import Worker, WorkerThread, call_contained
from ._blocker import Notify
from ._events import RecordedEvent
from ._watcher import watcher_of


def when_reached(events: Sequence[RecordedEvent], notify: Notify) -> None:
    """Calls ``notify(error or None)`` when all events are reached: in a thread, or now."""
    try:
        if all(map(RecordedEvent.query, events)):
            notify(None)
            return
    except Exception as error:
        notify(error)
        return
    _watching.submit(notify, events)


class _Watching(Worker):
    """Runs an event loop while there is an event to watch.

    ``work`` maps each notify function to its events.
    """

    # A daemon, as an interpreter that exits does not wait for kernels that may take long. But a
    # query lets go of the GIL, and a thread that asks for it back once the interpreter has
    # ended aborts the process. So the thread is told to end before that.
    patience_at_exit = 1.0

    def __init__(self) -> None:
        super().__init__("torchfut_aio watcher")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._rung = asyncio.Event()

    def ring(self) -> None:
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(self._rung.set)
            except RuntimeError:
                if not loop.is_closed():
                    raise
                # The thread will look again.

    def serve(self, thread: WorkerThread) -> None:
        try:
            self._rung = asyncio.Event()
            # Not one by the policy, which may make loops for other threads only.
            self._loop = loop = asyncio.SelectorEventLoop()
            try:
                loop.run_until_complete(self._watch(thread))
            finally:
                self._loop = None
                loop.close()
        except Exception as error:  # there is no memory, or no descriptor for a loop
            for notify in [*self.work]:
                self._notify(notify, error)

    async def _watch(self, thread: WorkerThread) -> None:
        watcher = watcher_of(_loops.current())
        while not thread.is_to_end:
            self._rung.clear()
            for notify in self.take():
                events = self.work.get(notify)
                if events is not None:
                    watcher.notify_when_reached(events, partial(self._notify, notify))
            if not self.has_work():
                return
            await self._rung.wait()

    def _notify(self, notify: Notify, error: Exception | None) -> None:
        self._rung.set()
        if self.work.pop(notify, None) is not None:
            call_contained(notify, error)


_watching = _Watching()

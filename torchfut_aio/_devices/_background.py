"""Recorded events that somebody waits for who is no task: a loop of their own, in one thread.

A future of an event may be awaited on any loop, and outlive the one where it was made; it
may be waited for in threads, and have callbacks. So no loop of the program watches it.

The thread is started by the first event, and ends with the last. No lock guards that. Who
brings an event appends it, then looks whether there is a thread. A thread that is about to
end says that there is none, then looks for events. So one of the two sees the other; and
two threads at a time would do no harm.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from .. import _loops
from ._events import RecordedEvent
from ._watcher import Watcher, watcher_of

__all__ = ["when_reached"]

_Notify = Callable[[Exception | None], object]


_jobs: deque[tuple[RecordedEvent, _Notify]] = deque()
_thread: _Thread | None = None


def when_reached(event: RecordedEvent, notify: _Notify) -> None:
    """Has ``notify(error or None)`` called when ``event`` is reached: in a thread, or at once."""
    global _thread
    try:
        if event.event.query():
            notify(None)
            return
    except Exception as error:
        notify(error)
        return
    _jobs.append((event, notify))
    thread = _thread
    if thread is None:
        _thread = thread = _Thread()
        try:
            thread.start()
        except BaseException:  # let the next one try
            _thread = None
            raise
    else:
        thread.ring()


class _Thread(threading.Thread):
    """Runs an event loop as long as there is an event to watch."""

    def __init__(self) -> None:
        # A daemon, as an interpreter that exits does not wait for kernels that may take long.
        super().__init__(name="torchfut_aio watcher", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bell = asyncio.Event()
        self._to_end = False

    def ring(self) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # it has closed, having seen what there was
                self._loop.call_soon_threadsafe(self._bell.set)

    def end(self) -> None:
        """Has it end, whatever is pending, and waits for that, unless a callback takes long."""
        self._to_end = True
        self.ring()
        self.join(timeout=1)

    def run(self) -> None:
        global _thread
        # Not one by the policy, which may make loops for other threads only.
        self._loop = asyncio.SelectorEventLoop()
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            if _thread is self:  # an error has ended it
                _thread = None
            self._loop.close()

    async def _serve(self) -> None:
        global _thread
        watcher = watcher_of(_loops.current())
        while True:
            self._bell.clear()
            self._take_in(watcher)
            if watcher.pending and not self._to_end:
                await self._bell.wait()
                continue
            _thread = None
            if self._to_end or not self._take_in(watcher):
                return
            _thread = self

    def _take_in(self, watcher: Watcher) -> bool:
        """Watches what is new; tells whether there was anything.

        By taking out, as that locks the deque where there is no GIL: what is not seen here comes
        from one who sees what this thread has written before.
        """
        found = False
        while (job := _next_job()) is not None:
            found = True
            event, notify = job
            watcher.notify_when_reached([event], partial(self._notify, notify))
        return found

    def _notify(self, notify: _Notify, error: Exception | None) -> None:
        self._bell.set()
        # Nobody is above to take what a callback of a future may pass on.
        with suppress(KeyboardInterrupt, SystemExit):
            notify(error)


def _next_job() -> tuple[RecordedEvent, _Notify] | None:
    try:
        return _jobs.popleft()
    except IndexError:
        return None


@atexit.register
def _end_before_the_interpreter() -> None:
    # A query lets go of the GIL. Who asks for it back from an interpreter that has ended is
    # thrown out of C++, which aborts the process.
    if _thread is not None:
        _thread.end()


def _forget() -> None:
    global _thread
    _thread = None
    _jobs.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

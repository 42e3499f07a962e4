"""How a task waits for recorded events."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from .. import _loops
from ._events import RecordedEvent
from ._stream_queue import Wait
from ._watcher import watcher_of

__all__ = ["Reached", "until_reached"]


def until_reached(events: Sequence[RecordedEvent]) -> Generator[Any, Any, None]:
    """Suspends the current task until all ``events`` are reached; for ``yield from``.

    Raises:
        RuntimeError: What the device says of a kernel that failed.
    """
    loop = _loops.current()
    watcher = watcher_of(loop)
    waits = watcher.waits
    waiter = loop.waiter()
    wait = Wait(events, lambda _: waiter.wake())
    try:
        if not watcher.watch(wait):
            return
        yield from waiter
    except BaseException:
        if wait in waits:
            del waits[wait]  # no call, so no interrupt can come before it
        watcher.close_if_idle()
        raise
    if wait in waits:  # somebody else has woken the task
        del waits[wait]
        yield from until_reached(events)
    elif wait.error is not None:
        try:
            # Others may raise the same one: each starts from an empty traceback.
            raise wait.error.with_traceback(None)
        finally:
            del wait


class Reached:
    """Awaits recorded events, with a checkpoint even if all are reached."""

    __slots__ = ("_events",)

    def __init__(self, events: Sequence[RecordedEvent]) -> None:
        self._events = events

    def __await__(self) -> Generator[Any, Any, None]:
        yield from _loops.current().checkpoint()
        yield from until_reached(self._events)

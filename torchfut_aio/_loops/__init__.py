"""How a completion, in any thread, reaches a task that waits on an event loop.

One file a kind of loop, and one interface, `Loop`. A task that waits gets a *waiter* of its loop,
leaves both where the completing thread will find them, and suspends. The completing thread calls
``loop.wake(waiter)``; nothing else crosses threads. `_loop` says how that wakes the loop, and
`_asyncio` follows a completion to its task.

What has to be done now and then gets an `Alarm`, so that the loop drives it.

A further kind of loop is one more file, with a class derived from `Loop` and a function
``current``, which returns the loop that runs in this thread or None; and a line in ``_KINDS``.

Nothing here knows what a future is, or a device.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from . import _asyncio
from ._alarm import Alarm
from ._loop import THREADS, Loop, ThreadWaiter, Waiter, Waker

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
    "stands_still",
]

# In the order in which they are asked: a module of the kind's library, what that has once it is
# imported, without which no loop of the kind can run, and the file here. trio comes first: in its
# guest mode a host loop runs in the same thread, and a task that trio runs is trio's.
_KINDS = (
    ("trio.lowlevel", "in_trio_task", "_trio"),
    ("asyncio", "get_running_loop", "_asyncio"),
)

current_asyncio = _asyncio.current
stands_still = _asyncio.stands_still

# The files of the kinds whose library is imported, and the libraries of the others. Two threads may
# admit a kind at once: as this is one object, the older of two is a whole one, and is mended.
_admitted: tuple[tuple[Any, ...], tuple[str, ...]] = (
    (_asyncio,),
    tuple(library for library, _, _ in _KINDS if library != "asyncio"),
)


def current() -> Loop:
    """Returns the loop that runs the calling task.

    Raises:
        RuntimeError: No event loop runs here.
    """
    files, not_imported = _admitted
    for library in not_imported:
        if library in sys.modules:
            files = _admit_imported()
    for file in files:
        loop: Loop | None = file.current()
        if loop is not None:
            return loop
    raise RuntimeError(
        "no asyncio, uvloop or trio event loop runs here to await a torchfut_aio "
        "future on; use wait() in code that is not asynchronous"
    )


def loop_in_this_thread() -> bool:
    """Tells whether blocking the calling thread would block an event loop."""
    return any(file.current() is not None for file in _admit_imported())


def _admit_imported() -> tuple[Any, ...]:
    """Imports the files of the kinds whose library the program has imported, and returns them."""
    global _admitted
    here = [kind for kind in _KINDS if hasattr(sys.modules.get(kind[0]), kind[1])]
    files = tuple(importlib.import_module("." + file, __name__) for _, _, file in here)
    _admitted = files, tuple(kind[0] for kind in _KINDS if kind not in here)
    return files

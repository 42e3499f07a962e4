"""What every kind of loop offers to the tasks that wait on it, and which loop runs here.

Waking a loop from another thread takes a write to its pipe: a system call that also hands over the
GIL, and costs more than the rest of the way. So completed waiters are appended to a queue, and a
wake-up is scheduled only if none is pending. It resumes every waiter that is queued by the time
it runs.

There is no lock, so signal handlers and finalisers may wake waiters.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable
from importlib import import_module
from threading import get_ident
from typing import Any, ClassVar, Protocol

from .._cpython import running_loop
from .._extension import speedup
from ._alarm import Alarm, TimerFd
from ._waker import Waiter

AsyncFunction = Callable[..., Coroutine[Any, Any, None]]

BURST = object()  # in ``wake_up``: the timer of the burst will run the wake-up


class TaskWaiter(Protocol):
    """One wait of a task: for ``await``, or for ``yield from`` in a generator."""

    def __await__(self) -> Generator[Any, Any, None]: ...

    def __iter__(self) -> Generator[Any, Any, None]: ...


class Loop(ABC):
    """A running event loop, as the tasks that wait on it see it.

    Attributes:
        closed: As of `Waker`.
        queue: The waiters that were completed and that the next wake-up resumes.
        wake_up: Stands for the pending wake-up; None if there is none.
        watcher: What the device side keeps for this loop.
        cancelled: What a task of the loop raises when it is cancelled.
        before_wait: A method that `waiter` calls before each wait of a task, on any loop; or None.
        checkpoints_suspend: Whether an await that need not wait suspends its task all the same.
            On trio it always does.
    """

    cancelled: ClassVar[type[BaseException]] = asyncio.CancelledError
    before_wait: ClassVar[Callable[[Any], object] | None] = None

    __slots__ = (
        "__weakref__",
        "_renewed",
        "checkpoints_suspend",
        "closed",
        "queue",
        "wake_up",
        "watcher",
    )

    def __init__(self) -> None:
        self.closed = False
        self.queue: deque[Any] = deque()
        self.wake_up: object = None
        self.watcher: Any = None
        self._renewed = False
        self.checkpoints_suspend = False

    # ------------------------------------------------------------- in any thread

    def wake(self, waiter: Any, /) -> None:
        """Wake ``waiter``. A kind of loop may know a shorter way in its own thread."""
        # Append *before* reading `wake_up`. The loop clears `wake_up`, then reads the queue. So
        # either we schedule a wake-up, or the loop sees the waiter.
        self.queue.append(waiter)
        if self.wake_up is None:
            self.schedule_wake_up()

    def wake_all(self, waiters: list[Any], /) -> None:
        """Wake several waiters with one wake-up; later, also in the loop's own thread."""
        self.queue.extend(waiters)
        if self.wake_up is None:
            self.schedule_wake_up()

    @speedup
    def schedule_wake_up(self) -> None:
        """Schedule a call of `run_wake_up`. If this is interrupted, the caller wakes again."""
        try:
            # KeyboardInterrupt can be raised after the loop has popped the call and before it runs
            # it. So that this is noticed, the loop holds the only reference to this method object.
            run_wake_up = self.run_wake_up
            self.wake_up = weakref.ref(run_wake_up, self._wake_up_lost)
            is_open = self.call_soon(run_wake_up)
        except BaseException:
            self.wake_up = None  # if the loop has the call, that will find nothing to do
            raise
        if not is_open:
            self.closed = True
            self.wake_up = None
            self.queue.clear()

    @abstractmethod
    def call_soon(self, function: Callable[[], object]) -> bool:
        """Call ``function`` on the loop; return False if the loop is closed.

        An interrupt that is raised in the loop just before the call loses the call. Each caller
        makes up for that: another wake-up is scheduled; the watcher also polls when its alarm
        fires, and closes after the next wait; the promise of an RPC fails when it is dropped.
        """

    def stands_still(self) -> bool:
        """Return True if the loop cannot run because its thread, which calls, runs another."""
        return False

    def describe(self, _waiter: Any, /) -> Waiter:
        """Return the task that waits, for people to read."""
        return Waiter(kind="task", name=None)

    # ------------------------------------------------------ in the loop's own thread

    def waiter(self) -> TaskWaiter:
        """Return a waiter for one wait of the current task, which is about to begin."""
        if self.before_wait is not None:
            self.before_wait()
        if self.wake_up is not None:
            self.renew_wake_up()
        return self.new_waiter()

    @abstractmethod
    def new_waiter(self) -> TaskWaiter:
        """Return a new waiter, hashable, for one wait of the current task.

        ``await waiter`` suspends the task until `wake` is called or the task is cancelled. If
        `wake` was called before, it does not suspend.
        """

    def run_wake_up(self) -> None:
        """Resume the waiters that are queued now."""
        # A waiter leaves the queue once it is resumed, and ``wake_up`` stays set until all are. If
        # an interrupt ends this early, the loop drops the call, and `_wake_up_lost` schedules
        # another. (A copy locks the deque where there is no GIL; len() does not.)
        self._renewed = False
        queue = self.queue
        for _ in range(len(queue.copy())):
            self.resume(queue[0])
            del queue[0]
        self.wake_up = None  # *before* reading the queue again: see `wake`
        if queue.copy():
            self.schedule_wake_up()

    @abstractmethod
    def resume(self, waiter: Any) -> None:
        """Resume the task of ``waiter``; do nothing if it is awake or was cancelled."""

    def renew_wake_up(self) -> None:
        """Schedule a second wake-up, once: the pending one may be lost.

        A traceback can keep the call that the loop dropped, so that `_wake_up_lost` does not run.
        The task that is about to wait is the one to check this, as most threads that wake find a
        wake-up pending, and would have to read the clock to find it late.
        """
        if not self._renewed and self.wake_up is not BURST:
            self._renewed = True
            self.schedule_wake_up()

    def _wake_up_lost(self, wake_up: object) -> None:
        if self.wake_up is wake_up:  # the loop dropped the call without making it
            self.wake_up = None
            if self.queue.copy():
                self.schedule_wake_up()

    def pause_in_burst(self, _found: int) -> TaskWaiter | None:
        """Return a waiter that is woken in a moment, if results arrive faster than a task can wake.

        A task has found ``found`` of them in a row. If a wake-up for the next one would be cheaper
        than the pause, return None.
        """
        return None

    @abstractmethod
    def checkpoint(self) -> Iterable[Any]:
        """Do what an await that need not wait does on this loop; for ``yield from``."""

    def current_task_name(self) -> str | None:
        """Return the name of the task that calls; None if it is unknown."""
        return None

    def abandon(self) -> None:
        """Forget the waiters and the watcher: the loop is closed. May be called again."""
        self.closed = True
        self.queue.clear()
        watcher, self.watcher = self.watcher, None
        if watcher is not None:
            watcher.abandon()

    @abstractmethod
    def spawn(self, ended: Callable[[], None], function: AsyncFunction, *args: object) -> None:
        """Run an async function, which must not raise, as a task of the loop.

        The loop calls ``ended`` when the task has ended, also if it was cancelled before its first
        step. If the loop closes before that, it drops both. asyncio holds tasks by weak references
        only: what the task waits for has to refer to it.
        """

    # ------------------- for alarms: in the loop's own thread, or when the loop is closed

    def alarm(self, function: Callable[[], object]) -> Alarm:
        return Alarm(self, function)

    @abstractmethod
    def watch(self, timer: TimerFd, function: Callable[[TimerFd], object]) -> None:
        """Call ``function(timer)`` whenever ``timer`` is readable; keep a reference to it.

        Raises:
            RuntimeError: The loop cannot watch files.
        """

    @abstractmethod
    def unwatch(self, timer: TimerFd) -> None:
        """Stop watching ``timer``; do nothing if it is not watched or the loop is closed."""

    @abstractmethod
    def call_later(self, seconds: float, function: Callable[[], object]) -> Any:
        """Call ``function`` in so many seconds, by the loop's own timers.

        Returns:
            An object with ``cancel()``, to which weak references can be made.

        Raises:
            RuntimeError: The loop is closed.
        """


# ------------------------------------------------------------------ which loop runs here

# The kinds that are asked before asyncio, whose loop can drive trio's, in guest mode, in the same
# thread: a task that trio runs is trio's. Of each: the module that a program has imported if such a
# loop may run, a name that the module has once it is whole, and the file here, with ``current()``.
KINDS = {"trio.lowlevel": ("in_trio_task", "_trio")}

_current_of: dict[str, Callable[[], Loop | None]] = {}  # of the kinds whose library is imported


class _ThisThread(threading.local):
    loop: Any = None  # the loop of asyncio's kind that ran here last: almost always the right one


_this_thread = _ThisThread()


def running() -> Loop | None:
    """Return the loop that runs the calling task, or None."""
    for library in KINDS:
        if library in sys.modules:
            other = (_current_of.get(library) or _current_function(library))()
            if other is not None:
                return other
    event_loop = running_loop()
    if event_loop is None:
        return None
    loop = _this_thread.loop
    # Not the last one either if it has run in another thread since then.
    if loop is None or loop.event_loop() is not event_loop or loop.thread != get_ident():
        from ._asyncio import loop_of

        loop = _this_thread.loop = loop_of(event_loop)
    return loop  # type: ignore[no-any-return]


def _current_function(library: str) -> Callable[[], Loop | None]:
    name, file = KINDS[library]
    if not hasattr(sys.modules[library], name):  # another thread is importing it
        return lambda: None
    function: Callable[[], Loop | None] = import_module("." + file, __package__).current
    _current_of[library] = function
    return function


def current() -> Loop:
    """Return the loop that runs the calling task.

    Raises:
        RuntimeError: No event loop runs here.
    """
    loop = running()
    if loop is None:
        raise RuntimeError(
            "no asyncio, uvloop or trio event loop runs here to await a torchfut_aio "
            "future on; use wait() in code that is not asynchronous"
        )
    return loop


def loop_in_this_thread() -> bool:
    """Return True if blocking the calling thread would block an event loop."""
    return running() is not None

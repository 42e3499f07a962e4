"""What every kind of loop offers to the tasks that wait on it. One file a kind implements it.

Waking a loop from another thread takes a write to its pipe, a system call that also hands the GIL
over: it costs more than all else on the way. So a waiter is posted to the queue of its loop.
Whoever finds no wake-up under way asks the loop for one, and the loop then serves all who have
been posted by the time it looks. A loop that has just found many may look again of its own
accord, in a moment: that counts as a wake-up under way, too.

No lock is held, so a signal handler or a finaliser may post. What makes that right is the order
of two steps on either side. A poster appends the waiter, then reads ``wake_up``. The loop sets
``wake_up`` to None, then reads the queue. Whichever way they interleave, either the poster sees
None and wakes the loop, or the loop sees the waiter. (Where there is no GIL, appending to a deque
and copying it lock it; asking for its length does not. So the loop copies it.)

Ctrl-C may strike in the loop when it has taken the call of `Loop.serve` from its list, and has
not made it. If posters went on to count on this call, the loop would never wake again. So
``wake_up`` is a weak reference to the call, which tells when the loop drops it. A traceback may
keep the call for longer. So a task that is about to wait, and finds a wake-up under way, asks for
another. (A poster does not. Most posters find one under way, and each would have to look at the
clock to tell whether it is late.)
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable
from dataclasses import dataclass
from sys import is_finalizing
from typing import Any, ClassVar, Final, Literal, Protocol

from ._alarm import Alarm, TimerFd

AsyncFunction = Callable[..., Coroutine[Any, Any, None]]

PAUSE = object()  # stands for a wake-up that the loop has seen to itself


class Waker(Protocol):
    """What wakes waiters: the loop of their tasks, or `THREADS`."""

    @property
    def gone(self) -> bool:
        """Whether it has been found closed, so that none of its waiters wakes any more."""

    def wake(self, waiter: Any, /) -> None:
        """Wakes ``waiter``, from any thread; does nothing if it is awake, or has gone."""

    def wake_all(self, waiters: list[Any], /) -> None:
        """Does the same for many, with one wake-up for all."""

    def describe(self, waiter: Any, /) -> Waiter:
        """Return the task or thread that waits, for people to read; from any thread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiter:
    """A task, thread or callback that waits.

    Attributes:
        kind: "task", "thread" or "callback".
        name: The name of the task, thread or function; None if it is unknown.
        since: When the wait began, on the clock of ``time.perf_counter``; None unless waits were
            recorded then.
        where: The function, file and line where a task waits, such as ``handler, app.py:42``: the
            innermost that belongs to neither this package, asyncio, anyio nor trio. None if it is
            unknown, as for threads and callbacks.
    """

    kind: Literal["task", "thread", "callback"]
    name: str | None
    since: float | None = None
    where: str | None = None

    def __str__(self) -> str:
        where = "" if self.where is None else f" in {self.where}"
        return f"{self.kind} {self.name or 'of unknown name'}{where}"


class TaskWaiter(Protocol):
    """One wait of a task: for ``await``, or for ``yield from`` in a generator."""

    def __await__(self) -> Generator[Any, Any, None]: ...

    def __iter__(self) -> Generator[Any, Any, None]: ...


class ThreadWaiter:
    """One wait of the calling thread, on a lock that is taken until it is woken.

    To acquire a lock is the one wait that takes a timeout, lets other threads run, and is
    interrupted by Ctrl-C, in every version of Python that is supported.

    Attributes:
        thread: The identifier of the thread.
    """

    __slots__ = ("_lock", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self._lock = threading.Lock()
        self._lock.acquire()

    def block(self, timeout: float | None) -> None:
        """Blocks until it is woken, or for ``timeout`` seconds, or as long as Python can wait.

        Raises:
            RuntimeError: The interpreter is finalizing: no other thread runs that could wake it.
        """
        if is_finalizing():
            raise RuntimeError("the interpreter is shutting down: no thread is left to wait for")
        limit = threading.TIMEOUT_MAX  # centuries
        self._lock.acquire(timeout=-1 if timeout is None else min(timeout, limit))

    def unblock(self) -> None:
        """Ends the wait; does nothing if it has ended."""
        try:
            self._lock.release()
        except RecursionError:
            raise
        except RuntimeError:  # it is not locked
            pass


class _Threads:
    gone = False

    def wake(self, waiter: ThreadWaiter, /) -> None:
        waiter.unblock()

    def wake_all(self, waiters: list[ThreadWaiter], /) -> None:
        for waiter in waiters:
            waiter.unblock()

    def describe(self, waiter: ThreadWaiter, /) -> Waiter:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return Waiter(kind="thread", name=names.get(waiter.thread))


THREADS: Final = _Threads()


class Loop(ABC):
    """A running event loop, as the tasks that wait on it see it.

    Attributes:
        gone: As of `Waker`.
        queue: Those that were completed elsewhere and await their wake-up.
        wake_up: What stands for the wake-up under way; None if there is none.
        watcher: What the device side keeps for this loop.
        cancelled: What a task of the loop raises that is cancelled.
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
        "gone",
        "queue",
        "wake_up",
        "watcher",
    )

    def __init__(self) -> None:
        self.gone = False
        self.queue: deque[Any] = deque()
        self.wake_up: object = None
        self.watcher: Any = None
        self._renewed = False
        self.checkpoints_suspend = False

    def post(self, waiter: Any) -> None:
        """Has the loop resume ``waiter``, from any thread."""
        self.queue.append(waiter)
        if self.wake_up is None:
            self.ask_for_wake_up()

    def serve(self) -> None:
        """Resumes, on the loop, all who have been posted when it starts."""
        self.wake_up = None
        try:
            self._renewed = False
            self.resume(len(self.queue.copy()))
        except BaseException:  # Ctrl-C cut it short
            if self.queue:
                self.ask_for_wake_up()
            raise

    def ask_for_wake_up(self) -> None:
        """Has the loop call `serve`; if this is interrupted, the next poster does."""
        try:
            serve = self.serve  # a method object that only this call refers to
            self.wake_up = weakref.ref(serve, self._wake_up_lost)
            is_open = self.call_soon(serve)
        except BaseException:
            self.wake_up = None  # if the loop was told, it will find nothing to do
            raise
        if not is_open:
            # Nobody is left to resume, here or in the queue.
            self.gone = True
            self.wake_up = None
            self.queue.clear()

    def renew_wake_up(self) -> None:
        """Asks for another wake-up, once, as that under way may be lost; for a task of the loop."""
        if not self._renewed and self.wake_up is not PAUSE:
            self._renewed = True
            self.ask_for_wake_up()

    def _wake_up_lost(self, wake_up: object) -> None:
        # The loop has dropped the call. Had it made it, another would be under way, or none.
        if self.wake_up is wake_up:
            self.wake_up = None
            if self.queue.copy():
                self.ask_for_wake_up()

    def abandon(self) -> None:
        """Forgets who waits, as the loop has closed or gone; may be called again."""
        self.gone = True
        self.queue.clear()
        watcher, self.watcher = self.watcher, None
        if watcher is not None:
            watcher.abandon()

    def alarm(self, function: Callable[[], object]) -> Alarm:
        """Returns an alarm that is not set; for the loop's own thread."""
        return Alarm(self, function)

    def wake_later(self, _waiter: Any, _found: int) -> bool:
        """Wakes ``waiter`` in a moment, if after ``found`` arrivals that is best; or returns False.

        It is best if they come faster than tasks can be woken for each. For the loop's own thread.
        """
        return False

    def waiter(self) -> TaskWaiter:
        """Announces that the current task is about to wait, and returns a waiter for that."""
        if self.before_wait is not None:
            self.before_wait()
        if self.wake_up is not None:
            self.renew_wake_up()
        return self.new_waiter()

    @abstractmethod
    def new_waiter(self) -> TaskWaiter:
        """Returns a waiter, hashable, for one wait of the current task.

        ``await waiter`` suspends the task until `wake` is called, or it is cancelled.
        """

    def wake(self, waiter: Any, /) -> None:
        """As `Waker.wake`. A kind of loop may know a shorter way in its own thread."""
        self.post(waiter)

    def wake_all(self, waiters: list[Any], /) -> None:
        """As `Waker.wake_all`. They are resumed later, in the loop's own thread, too."""
        self.queue.extend(waiters)
        if self.wake_up is None:
            self.ask_for_wake_up()

    def stands_still(self) -> bool:
        """Return whether the loop cannot run because its thread, which calls, runs another."""
        return False

    def describe(self, _waiter: Any, /) -> Waiter:
        """As `Waker.describe`."""
        return Waiter(kind="task", name=None)

    def current_task_name(self) -> str | None:
        """Returns the name of the task that calls; None if nobody can tell."""
        return None

    @abstractmethod
    def checkpoint(self) -> Iterable[Any]:
        """Does what an await that need not wait does on this loop; for ``yield from``."""

    @abstractmethod
    def resume(self, count: int) -> None:
        """Resumes the first ``count`` in the queue, if there are, and then takes each out."""

    @abstractmethod
    def call_soon(self, function: Callable[[], object]) -> bool:
        """Has the loop call ``function``, from any thread; returns False if it has closed.

        Ctrl-C that strikes the loop when it is about to make the call loses it. Each caller has
        something that makes up for that: there is another wake-up; the watcher polls by its alarm,
        too, and closes it after the next wait; and the promise of an RPC fails when it is dropped.
        """

    @abstractmethod
    def spawn(self, ended: Callable[[], None], function: AsyncFunction, *args: object) -> None:
        """Runs an async function, which must not raise, in the loop's own thread.

        The loop calls ``ended`` when the task has ended, also if it was cancelled before its
        first step. If the loop closes before that, it drops both. asyncio does not keep the
        task: what it waits for has to, or else it may be dropped.
        """

    # For alarms, in the loop's own thread, or when it has closed.

    @abstractmethod
    def watch(self, timer: TimerFd, function: Callable[[TimerFd], object]) -> None:
        """Has the loop, which must refer to ``timer``, call ``function(timer)`` if it is readable.

        Raises:
            RuntimeError: The loop cannot watch files.
        """

    @abstractmethod
    def unwatch(self, timer: TimerFd) -> None:
        """Has the loop watch ``timer`` no more; does nothing if it does not, or has closed."""

    @abstractmethod
    def call_later(self, seconds: float, function: Callable[[], object]) -> Any:
        """Has the loop call ``function`` in so many seconds, by its own timers.

        Returns an object with ``cancel()``, to which weak references can be made.

        Raises:
            RuntimeError: The loop has closed.
        """

"""What every kind of loop offers to the tasks that wait on it. One file a kind implements it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

from ._alarm import Alarm
from ._inbox import Inbox
from ._timer import TimerFd

__all__ = ["Handle", "Loop", "TaskWaiter", "Waiter"]


class Waiter(Protocol):
    """One wait of a task or a thread."""

    def wake(self) -> None:
        """Wakes it, from any thread; does nothing if it is awake, or has gone."""


class TaskWaiter(Waiter, Iterable[Any], Protocol):
    """One wait of a task: ``yield from waiter`` suspends it until it is woken, or cancelled."""


class Handle(Protocol):
    """A call that a loop is going to make, which weak references may refer to."""

    def cancel(self) -> object:
        """Makes it not be made; does nothing if it has been."""


class Loop(Inbox):
    """A running event loop, as the tasks that wait on it see it."""

    __slots__ = ("watcher",)

    watcher: Any
    """What the device side keeps for this loop."""

    def __init__(self) -> None:
        super().__init__()
        self.watcher = None

    def alarm(self, function: Callable[[], object]) -> Alarm:
        """Returns an alarm that is not set; for the loop's own thread."""
        return Alarm(self, function)

    def wake_later(self, _waiter: Any, _found: int) -> bool:
        """Wakes ``waiter`` in a moment, if after ``found`` arrivals that is best; or returns False.

        It is where arrivals come faster than tasks can be woken for each. For the loop's own
        thread.
        """
        return False

    def abandon(self) -> None:
        super().abandon()
        watcher, self.watcher = self.watcher, None
        if watcher is not None:
            watcher.abandon()

    @abstractmethod
    def waiter(self) -> TaskWaiter:
        """Returns a waiter, hashable, for one wait of the current task."""

    @abstractmethod
    def checkpoint(self) -> Iterable[Any]:
        """Does what an await that need not wait does on this loop; for ``yield from``."""

    @abstractmethod
    def call_soon(self, function: Callable[[], object]) -> None:
        """Has the loop call ``function``, from any thread; does nothing if it has closed."""

    @abstractmethod
    def spawn(
        self,
        ended: Callable[[], None],
        function: Callable[..., Coroutine[Any, Any, None]],
        *args: object,
    ) -> None:
        """Runs an async function, which must not raise, in the loop's own thread.

        The loop calls ``ended`` when the task has ended, also if it was cancelled before its
        first step. It cannot if it closes before: then it drops both. asyncio does not keep the
        task: what it waits for has to, or else it may be dropped.
        """

    # For alarms, in the loop's own thread, or when it has closed.

    @abstractmethod
    def watch(self, timer: TimerFd, function: Callable[[TimerFd], object]) -> None:
        """Has the loop call ``function(timer)`` whenever ``timer`` is readable.

        The loop has to refer to ``timer`` for as long as it watches it.

        Raises:
            RuntimeError: The loop cannot watch files.
        """

    @abstractmethod
    def unwatch(self, timer: TimerFd) -> None:
        """Has the loop watch ``timer`` no more; does nothing if it does not, or has closed."""

    @abstractmethod
    def call_later(self, seconds: float, function: Callable[[], object]) -> Handle:
        """Has the loop call ``function`` in so many seconds, by its own timers.

        Raises:
            RuntimeError: The loop has closed.
        """

"""What every kind of loop offers to the tasks that wait on it. One file a kind implements it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

from ._alarm import Alarm
from ._inbox import Inbox
from ._timer import TimerFd


class Waiter(Protocol):
    """One wait of a task or a thread."""

    def wake(self) -> None:
        """Wakes it, from any thread; does nothing if it is awake, or has gone."""


class TaskWaiter(Waiter, Iterable[Any], Protocol):
    """One wait of a task: ``yield from waiter`` suspends it until it is woken, or cancelled."""


class Loop(Inbox):
    """A running event loop, as the tasks that wait on it see it.

    Attributes:
        watcher: What the device side keeps for this loop.
    """

    __slots__ = ("watcher",)

    def __init__(self) -> None:
        super().__init__()
        self.watcher: Any = None

    def abandon(self) -> None:
        super().abandon()
        watcher, self.watcher = self.watcher, None
        if watcher is not None:
            watcher.abandon()

    def alarm(self, function: Callable[[], object]) -> Alarm:
        """Returns an alarm that is not set; for the loop's own thread."""
        return Alarm(self, function)

    def wake_later(self, _waiter: Any, _found: int) -> bool:
        """Wakes ``waiter`` in a moment, if after ``found`` arrivals that is best; or returns False.

        It is where arrivals come faster than tasks can be woken for each. For the loop's own
        thread.
        """
        return False

    @abstractmethod
    def waiter(self) -> TaskWaiter:
        """Returns a waiter, hashable, for one wait of the current task."""

    @abstractmethod
    def checkpoint(self) -> Iterable[Any]:
        """Does what an await that need not wait does on this loop; for ``yield from``."""

    @abstractmethod
    def spawn(
        self,
        ended: Callable[[], None],
        function: Callable[..., Coroutine[Any, Any, None]],
        *args: object,
    ) -> None:
        """Runs an async function, which must not raise, in the loop's own thread.

        The loop calls ``ended`` when the task has ended, also if it was cancelled before its
        first step. If the loop closes before that, it drops both. asyncio does not keep the
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
    def call_later(self, seconds: float, function: Callable[[], object]) -> Any:
        """Has the loop call ``function`` in so many seconds, by its own timers.

        Returns:
            What ``cancel()`` may be called on, and weak references may refer to.

        Raises:
            RuntimeError: The loop has closed.
        """

"""The threads of this package: each exists while there is work for it.

`Worker` is the base class, and `QueueWorker` that of those with a queue of items. `BlockingThread`
calls functions that block, and `LoopThread` runs an event loop.

Submitting takes no lock, so a finaliser or a signal handler may submit in the middle of another
submission. (Where a thread has to be started, that takes a lock of ``threading``.) Once it returns,
a running thread is going to take the item. If it raises, the item is withdrawn.

A forked child has none of the threads. At exit the interpreter waits for threads that are not
daemons, and `Worker.timeout_at_exit` ends daemons. Submitting raises while it finalizes.
"""

from __future__ import annotations

import _thread
import asyncio
import atexit
import contextvars
import logging
import math
import os
import queue
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from sys import is_finalizing
from typing import Any, ClassVar

from ._cpython import call_before_joining
from ._errors import drop_catching_frame, one_for_each
from ._repr import function_name

Notify = Callable[[Any], object]  # called with an error or None

_LINGER = 0.1  # seconds for which an idle `BlockingThread` waits for more calls, by default

_logger = logging.getLogger("torchfut_aio")


def call_contained(function: Callable[..., object], *args: object) -> None:
    """Call a function that may run the program's callbacks; log its errors."""
    try:
        function(*args)
    except (KeyboardInterrupt, SystemExit):
        pass  # a worker thread has no caller to pass it on to
    except BaseException:
        _logger.exception("Got the following error when calling %s:", function_name(function))


class WorkerThread(threading.Thread):
    """A thread of a worker.

    Attributes:
        is_running: Whether it is being started, or runs.
        is_polling: Whether it will check for work again.
        should_end: Whether `Worker.end` has been called.
        started: Receives None, or the error with which the start failed.
    """

    def __init__(self, worker: Worker) -> None:
        super().__init__(name=worker.name, daemon=worker.daemon)
        self._worker = worker
        self.is_running = self.is_polling = self.should_end = False
        self.started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def launch(self) -> None:
        try:
            self.is_running = True
            self.start()
        except BaseException as error:
            self.is_running = False
            self.started.put(error)
        else:
            self.started.put(None)

    def run(self) -> None:
        worker = self._worker
        try:
            self.is_polling = True
            self._run_while_there_is_work(worker)
        finally:
            # A statement *before* the first call: that may fail for want of memory, and a submitter
            # must not rely on a thread that has died.
            self.is_polling = self.is_running = False
            worker.release(self)
            # An error may have ended the loop, and a submitter that saw us polling relies on us.
            if worker.has_work():
                worker.ensure_thread()

    def _run_while_there_is_work(self, worker: Worker) -> None:
        while worker.claim(self):
            worker.run(self)
            # Stop polling *before* checking for work. A submitter adds work, then reads
            # `is_polling`, so one of the two sees the other.
            worker.release(self)
            if self.should_end or not worker.has_work():
                return
            self.is_polling = True


class Worker(ABC):
    """A thread while there is work; a subclass defines `run`, `has_work` and `wake`.

    Attributes:
        name: The name of the thread.
        daemon: Whether the interpreter exits without waiting for the thread. False if the thread
            blocks in torch: a daemon that returned from there at exit would abort the process.
        active: The thread that has claimed the work, if there is one.
        timeout_at_exit: How many seconds to wait at exit for a daemon to end; 0 to leave it.
    """

    timeout_at_exit: ClassVar[float] = 0.0

    def __init__(self, name: str, *, daemon: bool = True) -> None:
        self.name = name
        self.daemon = daemon
        self._reset()
        _workers[id(self)] = self

    def _reset(self) -> None:
        self.active: WorkerThread | None = None
        self._newest: WorkerThread | None = None
        self._claiming = threading.Lock()  # only worker threads take it

    @abstractmethod
    def run(self, thread: WorkerThread) -> None:
        """Do the work; return when none is left, or when ``thread.should_end``."""

    @abstractmethod
    def has_work(self) -> bool:
        """Return True if a thread is needed."""

    @abstractmethod
    def wake(self) -> None:
        """Wake the active thread, if it rests."""

    def ensure_thread(self) -> None:
        """Start a thread, unless one is running that will check for work again.

        Raises:
            RuntimeError: No thread could be started, or the interpreter is shutting down.
        """
        if is_finalizing():
            # Before Python 3.12 a thread can be started now, and never runs.
            raise RuntimeError(f"the interpreter is shutting down: no thread for {self.name}")
        for thread in (self.active, self._newest):
            if thread is not None and thread.is_polling:
                return
        # Two submitters may each start one. `claim` lets one of them work, and the other ends.
        self._newest = thread = WorkerThread(self)
        # Not `thread.start()`: Ctrl-C in there could leave locks of `threading` locked for ever.
        # Signal handlers run in the main thread only, so we let another thread call it.
        _thread.start_new_thread(thread.launch, ())
        error = thread.started.get()
        if error is not None:
            raise RuntimeError(str(error)) from error

    def threads(self) -> list[WorkerThread]:
        """Return the threads that run or are being started."""
        return [t for t in {self.active, self._newest} if t is not None and t.is_running]

    def end(self, timeout: float) -> bool:
        """End the thread and wait until it has ended; return False after ``timeout`` seconds.

        If items are left, another thread starts. A thread that ends itself does not wait.
        """
        threads = [t for t in {self.active, self._newest} if t is not None]
        for thread in threads:
            thread.should_end = True
        self.wake()
        give_up = time.monotonic() + timeout
        return all(_ended(thread, give_up) for thread in threads)

    def claim(self, thread: WorkerThread) -> bool:
        """Make ``thread`` the active one, or return False if there is another."""
        with self._claiming:
            if self.active is not None:
                return False
            self.active = thread
        return True

    def release(self, thread: WorkerThread) -> None:
        # Give up the claim *before* the flag. A submitter that finds the flag down starts a thread,
        # and that could not claim the work.
        if self.active is thread:
            self.active = None
        thread.is_polling = False

    def after_fork(self) -> None:
        """Continue in the child of a fork, which has no thread."""
        self._reset()

    def at_exit(self) -> None:
        if self.timeout_at_exit:
            self.end(self.timeout_at_exit)


class QueueWorker(Worker):
    """A worker whose work is submitted as items.

    Attributes:
        work: The pending items, each with a value that belongs to it. An item stays until it is
            done, so that a new thread continues where another stopped.
        new: The items that the thread has not taken yet.
        survives_fork: Whether the child of a fork continues with pending items, or drops them.
    """

    survives_fork: ClassVar[bool] = False

    def __init__(self, name: str, *, daemon: bool = True) -> None:
        self.work: dict[Any, Any] = {}
        self.new: deque[Any] = deque()
        super().__init__(name, daemon=daemon)

    def _reset(self) -> None:
        super()._reset()
        self._wakeups: queue.SimpleQueue[None] = queue.SimpleQueue()

    def submit(self, item: Any, value: Any = None) -> None:
        """Let the thread do ``item``.

        Raises:
            RuntimeError: No thread could be started.
        """
        try:
            # `work` *before* `new`: a thread that begins empties `new` and copies `work`, so it
            # finds the item in one of them.
            self.work[item] = value
            self.new.append(item)
            self.ensure_thread()
            if self.needs_wakeup(item):
                self.wake()
        except BaseException:
            self.work.pop(item, None)
            with suppress(ValueError, IndexError):
                self.new.remove(item)
            raise

    def needs_wakeup(self, _item: Any) -> bool:
        """Return False if the thread will see a new item soon enough by itself."""
        return True

    def wake(self) -> None:
        # One pending wake-up is enough: the thread takes new items after it has taken that.
        if self.active is not None and self._wakeups.empty():
            self._wakeups.put(None)

    def has_work(self) -> bool:
        return bool([*self.work])  # a copy locks the dict where there is no GIL, len() does not

    def take(self) -> list[Any]:
        """Return the items that are new to this thread; some may be repeated, or withdrawn."""
        items = []
        # Not a copy and `clear`, which would lose an item that comes between the two. Without a
        # GIL, `popleft` locks the deque. So a submitter whose item is missed sees everything that
        # this thread wrote before.
        with suppress(IndexError):
            while True:
                items.append(self.new.popleft())
        return items

    def rest(self, seconds: float) -> bool:
        """Wait until `wake` is called, but at most ``seconds``; return whether it was called."""
        with suppress(queue.Empty):
            self._wakeups.get(timeout=min(max(seconds, 0), threading.TIMEOUT_MAX))
            return True
        return False

    def claim(self, thread: WorkerThread) -> bool:
        claimed = super().claim(thread)
        if claimed:
            # The thread before us may have taken items and ended before it did them. We clear
            # *before* we copy: an item that comes in between is in the copy.
            self.new.clear()
            self.new.extend([*self.work])
        return claimed

    def after_fork(self) -> None:
        super().after_fork()
        self.new.clear()
        if not self.survives_fork:
            self.work.clear()
        elif self.has_work():
            self.ensure_thread()

    def at_exit(self) -> None:
        if self.timeout_at_exit:
            self.work.clear()  # or another thread would continue with it
        super().at_exit()


def _ended(thread: WorkerThread, give_up: float) -> bool:
    # A thread cannot wait for itself, and none runs once the interpreter is finalizing.
    if thread.ident == _thread.get_ident() or is_finalizing():
        return True
    while thread.is_running or thread.is_alive():
        if time.monotonic() > give_up:
            return False
        # Not an event: it has a lock, which a signal handler in this thread could find locked.
        time.sleep(0.0005)
    return True


class BlockingThread(QueueWorker):
    """Calls functions that block: ``submit(notify, function)``.

    The thread calls ``function()``, then ``notify(error or None)``. It makes one call for all items
    with the same function that it takes at once. To withdraw an item, pop ``notify`` from ``work``.
    It waits ``linger`` seconds for more items.
    """

    def __init__(self, name: str, *, daemon: bool = True, linger: float = _LINGER) -> None:
        super().__init__(name, daemon=daemon)
        self._linger = linger

    def run(self, thread: WorkerThread) -> None:
        self._call_new()
        while not thread.should_end and self.rest(self._linger):
            self._call_new()

    def _call_new(self) -> None:
        calls: defaultdict[Any, list[Notify]] = defaultdict(list)
        for notify in self.take():
            if (function := self.work.get(notify)) is not None:
                calls[function].append(notify)
        for function, waiting in calls.items():
            if not self.work.keys().isdisjoint(waiting):  # else all were withdrawn
                self._call(function, waiting)

    def _call(self, function: Callable[[], object], waiting: list[Notify]) -> None:
        errors: list[Any] = [None] * len(waiting)
        try:
            function()
        except BaseException as raised:
            errors = one_for_each(drop_catching_frame(raised), len(waiting))
        for notify, error in zip(waiting, errors, strict=True):
            # The pop decides: a withdrawn item is not notified, and no item is notified twice.
            if self.work.pop(notify, None) is not None:
                call_contained(notify, error)


class LoopThread(QueueWorker):
    """Runs an asyncio event loop; a subclass defines `step` and `fail`.

    Attributes:
        woken: Set this on the loop to call `step` again. It is set for each new item.
    """

    def __init__(self, name: str, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        super().__init__(name)
        self._new_loop = new_loop
        self._loop: asyncio.AbstractEventLoop | None = None
        self.woken = asyncio.Event()

    def wake(self) -> None:
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(self.woken.set)
            except RuntimeError:
                if not loop.is_closed():
                    raise
                # The thread will check for work once more.

    def run(self, thread: WorkerThread) -> None:
        try:
            with asyncio.Runner(loop_factory=self._new_loop) as runner:
                # On builds without a GIL, a thread inherits the context of its starter.
                runner.run(self._run_steps(thread), context=contextvars.Context())
        except Exception as error:  # no file descriptor is left for a loop
            for item in [*self.work]:
                self.fail(item, error)
        finally:
            self._loop = None

    def after_fork(self) -> None:
        self._loop = None  # the parent's
        super().after_fork()

    async def _run_steps(self, thread: WorkerThread) -> None:
        self.woken = asyncio.Event()  # it belongs to the first loop that waits for it
        # *Before* the first step: `wake` does nothing without a loop, and the step takes items
        # whose submitter has called it until now.
        self._loop = asyncio.get_running_loop()
        while await self.step(thread):
            await self.woken.wait()
            self.woken.clear()  # *before* the step: an item that comes during it sets it again

    @abstractmethod
    async def step(self, thread: WorkerThread) -> bool:
        """Begin the new items; return False to close the loop."""

    @abstractmethod
    def fail(self, item: Any, error: Exception) -> None:
        """Withdraw an item, as there is no loop."""


_workers: weakref.WeakValueDictionary[int, Worker] = weakref.WeakValueDictionary()  # by id


def workers() -> list[Worker]:
    """Return all workers of the process."""
    refs = _workers.valuerefs()  # a list, as other threads may add and remove workers
    return [worker for ref in refs if (worker := ref()) is not None]


def _for_each(function: Callable[[Worker], None]) -> None:
    for worker in workers():
        function(worker)


_exit_has_begun = False


def is_exiting() -> bool:
    """Return True if the interpreter has begun to exit. It first waits for threads."""
    return _exit_has_begun or not threading.main_thread().is_alive()


def program_runs() -> bool:
    """Return True if the interpreter, as it exits, waits for a thread that is not a worker's."""
    main = threading.main_thread()
    return any(
        not (thread.daemon or thread is main or isinstance(thread, WorkerThread))
        for thread in threading.enumerate()
    )


def _begin_exit() -> None:
    global _exit_has_begun
    _exit_has_begun = True
    _for_each(lambda worker: worker.wake())


LONGEST_REST: float = math.inf if call_before_joining(_begin_exit) else 0.1
"""How many seconds a thread that is no daemon may rest, and still notice `is_exiting` in time."""

atexit.register(_for_each, lambda worker: worker.at_exit())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _for_each(lambda worker: worker.after_fork()))

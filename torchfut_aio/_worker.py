"""A thread while there is work: the one primitive beneath all threads of this package.

What a `Worker` promises:

- **One thread at a time serves.** Threads that start at the same moment agree under a lock which
  of them does, and the others end at once. Nobody but these threads takes that lock.
- **Submitting takes no lock**, so that a finaliser or a signal handler may submit in the middle of
  anything, another submission included.
- **Nobody relies on a thread that somebody else is still starting.** Whoever submits returns when
  a thread is running that will look at the work again, or raises.
- **A start that fails, or is interrupted at any instruction, costs its own caller only.** That work
  is withdrawn; the next submission starts a thread if none is running.
- **Ctrl-C does not strike within** `threading`, whose locks might stay locked for ever, one of them
  for all threads of the process. Signal handlers run in the main thread. So another thread, which
  C starts in one call, starts that of the worker.
- **An item stays in** ``work`` **until somebody pops it, and whoever pops it deals with it.** A
  thread that begins looks at all that is there, whatever became of the thread before it.
- **It ends when there is no work**, but not with work left. Before it ends, the thread sets
  `will_look` to False, then checks for work. A submitter adds work, then reads `will_look`.
- **A fork leaves a worker that works** in the child, without the threads of the parent.
- **At exit** the interpreter waits for threads that are no daemons; daemons are told to end and
  waited for a moment, or left where they are. After that, when the last objects are finalized,
  nothing waits for a thread: to submit raises RuntimeError, and to end a worker returns.
"""

from __future__ import annotations

import _thread
import atexit
import logging
import os
import queue
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from sys import is_finalizing
from typing import Any, ClassVar

from ._repr import function_name

_logger = logging.getLogger("torchfut_aio")


def call_contained(function: Callable[..., object], *args: object) -> None:
    """Calls what may run callbacks of others, whose errors must not end the thread."""
    try:
        # A worker thread has no caller to pass KeyboardInterrupt on to.
        with suppress(KeyboardInterrupt, SystemExit):
            function(*args)
    except Exception:
        _logger.exception("Got the following error when calling %s:", function_name(function))


class WorkerThread(threading.Thread):
    """A thread of a worker: ``is_to_end`` tells whether it is to, whatever there is to do."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(name=worker.name, daemon=worker.daemon)
        self._worker = worker
        self.is_there = False  # it is being started, or runs
        self.will_look = False  # at the work again
        self.is_to_end = False
        self.hands_over = True  # another thread does what it leaves when it is to end
        self._launched_by: int | None = None  # the thread that is starting it
        # None when it runs, or why it could not be started.
        self.started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def launch(self) -> None:
        """Starts it; for a thread that is there for that only."""
        try:
            self.is_there = True
            self._launched_by = _thread.get_ident()
            self.start()
        except BaseException as error:
            self.is_there = False
            self.started.put(error)
        finally:
            self._launched_by = None

    def run(self) -> None:
        """Serves while there is work, unless another thread does."""
        worker = self._worker
        try:
            self.will_look = True
            self.started.put(None)
            self._serve_while_there_is_work()
        finally:
            self.will_look = self.is_there = False
            self.started.put(None)  # again, in case there was no memory
            worker.release(self)
            if self.hands_over and worker.has_work():
                worker.ensure_thread()

    def _serve_while_there_is_work(self) -> None:
        worker = self._worker
        while worker.claim(self):
            worker.serve(self)
            worker.release(self)
            if self.is_to_end or not worker.has_work():
                return
            self.will_look = True

    def has_ended(self, give_up: float) -> bool:
        """Waits until ``give_up`` on the monotonic clock for the end; tells whether it came.

        Whoever runs in this thread cannot wait, nor can a finaliser in the middle of its start.
        Once the interpreter is finalizing, the thread does not run any more.
        """
        if _thread.get_ident() in (self.ident, self._launched_by) or is_finalizing():
            return True
        while self.is_there or self.is_alive():
            if time.monotonic() > give_up:
                return False
            time.sleep(0.0005)  # an event would have a lock, which a signal handler could meet
        return True


class Worker(ABC):
    """A thread while there is work: see the module. Subclasses say what it does, in `serve`.

    Attributes:
        work: What is to be done: items, each with anything that belongs to it.
        new: The items that the thread has not taken yet.
        name: The name of the thread.
        daemon: Whether the interpreter exits without waiting for the thread. One that blocks in
            torch must be waited for: if the interpreter ends it when it comes back from there,
            C++ aborts the process.
        patience_at_exit: For how many seconds a daemon that was told to end is waited for at
            exit; 0 to leave it.
        survives_fork: Whether what is pending when the process forks is done in the child, too,
            and not dropped there.
    """

    daemon: ClassVar[bool] = True
    patience_at_exit: ClassVar[float] = 0.0
    survives_fork: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.work: dict[Any, Any] = {}
        self.new: deque[Any] = deque()
        self._reset()
        _workers[id(self)] = self

    def _reset(self) -> None:
        # The thread that serves, and the last that somebody began to start.
        self._server: WorkerThread | None = None
        self.newest: WorkerThread | None = None
        self._claiming = threading.Lock()
        # A put may interrupt a put, or a get.
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()

    def submit(self, item: Any, value: Any = None) -> None:
        """Has the thread see to ``item``, which is withdrawn if this raises.

        Raises:
            RuntimeError: No thread could be started.
        """
        try:
            self.work[item] = value
            self.new.append(item)
            self.ensure_thread()
            if self.has_to_know(item):
                self.ring()
        except BaseException:
            self.work.pop(item, None)
            with suppress(ValueError, IndexError):
                self.new.remove(item)
            raise

    def ensure_thread(self) -> None:
        """Starts a thread, unless one is running that will look at the work again.

        Raises:
            RuntimeError: No thread could be started, or the interpreter is shutting down.
        """
        if is_finalizing():
            # Before Python 3.12 a thread can be started now, and never runs.
            raise RuntimeError(f"the interpreter is shutting down: no thread for {self.name}")
        for thread in (self._server, self.newest):
            if thread is not None and thread.will_look:
                return
        self.newest = thread = WorkerThread(self)
        _thread.start_new_thread(thread.launch, ())
        error = thread.started.get()
        if error is not None:
            raise RuntimeError(str(error)) from error

    def has_to_know(self, _item: Any) -> bool:
        """Tells whether to ring for a new item, or the thread will see it soon enough."""
        return True

    def ring(self) -> None:
        """Wakes the thread that serves, if one does: by default, from `rest`."""
        if self._server is not None:
            self._bell.put(None)

    def threads(self) -> list[WorkerThread]:
        """Returns the threads that run or are being started."""
        return [t for t in {self._server, self.newest} if t is not None and t.is_there]

    def end(self, patience: float, *, hand_over: bool = True) -> bool:
        """Tells the thread to end, and waits for that; returns False if it takes too long.

        What is left is done by another thread, or else when something more is submitted.
        """
        threads = [t for t in {self._server, self.newest} if t is not None]
        give_up = time.monotonic() + patience
        for thread in threads:
            thread.hands_over = hand_over
            thread.is_to_end = True
        self.ring()
        return all(thread.has_ended(give_up) for thread in threads)

    @abstractmethod
    def serve(self, thread: WorkerThread) -> None:
        """Does the work; returns when there is none, or when ``thread.is_to_end``."""

    def has_work(self) -> bool:
        """Tells whether anything is to be done."""
        return bool([*self.work])  # a copy locks the dict where there is no GIL, len() does not

    def take(self) -> list[Any]:
        """Returns the items that are new to this thread; at times one twice, or one that has gone.

        Taking them out locks the deque where there is no GIL: an item that is missed was added
        by somebody who has read all that this thread wrote before.
        """
        items = []
        with suppress(IndexError):
            while True:
                items.append(self.new.popleft())
        return items

    def rest(self, seconds: float) -> bool:
        """Waits until somebody rings, or for so long; tells whether somebody rang."""
        with suppress(queue.Empty):
            self._bell.get(timeout=min(max(seconds, 0), threading.TIMEOUT_MAX))
            with suppress(queue.Empty):
                while True:
                    self._bell.get_nowait()
            return True
        return False

    def claim(self, thread: WorkerThread) -> bool:
        """Makes ``thread`` the one that serves, or returns False if another does."""
        with self._claiming:
            server = self._server  # once, as the other thread may release it meanwhile
            if server is not None and server.is_there:
                return False
            self._server = thread
        self.new.clear()
        self.new.extend([*self.work])  # whatever became of the thread before
        return True

    def release(self, thread: WorkerThread) -> None:
        """Undoes `claim`, before the thread looks once more whether there is work."""
        if self._server is thread:
            self._server = None
        thread.will_look = False

    def after_fork(self) -> None:
        self._reset()
        self.new.clear()
        if not self.survives_fork:
            self.work.clear()
        elif self.has_work():
            self.ensure_thread()

    def at_exit(self) -> None:
        if self.patience_at_exit:
            self.end(self.patience_at_exit, hand_over=False)


_workers: weakref.WeakValueDictionary[int, Worker] = weakref.WeakValueDictionary()  # by id


def workers() -> list[Worker]:
    """Return all workers of the process."""
    refs = _workers.valuerefs()  # a list, as workers may come and go meanwhile
    return [worker for ref in refs if (worker := ref()) is not None]


def _for_each(function: Callable[[Worker], None]) -> None:
    for worker in workers():
        function(worker)


atexit.register(_for_each, lambda worker: worker.at_exit())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _for_each(lambda worker: worker.after_fork()))

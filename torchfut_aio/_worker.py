"""A thread while there is work: the one primitive beneath all threads of this package.

A `Worker` has a dict of the work that is to be done, and a thread while there is any. What it
promises:

- **One thread at a time serves.** Threads that start at the same moment agree under a lock which
  of them does, and the others end at once. Nobody but these threads takes that lock.
- **Submitting takes no lock**, so that a finaliser or a signal handler may submit in the middle of
  anything, another submission included.
- **Nobody relies on a thread that somebody else is still starting.** Whoever submits returns when
  a thread is alive that will look at the work again, or raises.
- **A start that fails, or is interrupted at any instruction, costs its own caller only.** That work
  is withdrawn. The thread may run or not; either way the next submission finds out whether one is
  alive, and starts one if not. No flag has to be put back for that.
- **An item stays in `work` until somebody pops it, and whoever pops it deals with it.** A thread
  that begins looks at all that is there, whatever became of the thread before it.
- **It ends when there is no work**, but not with work left: it says first that it will not look
  again, and then looks once more. Whoever submits does these in the opposite order.
- **A fork leaves a worker that works** in the child, without the threads of the parent. What was
  pending is dropped there, or, if the class says so, is looked after by a new thread.
- **At exit** the interpreter waits for threads that are no daemons; daemons are told to end and
  waited for a moment, or left where they are, as the class says.

Subclasses say what the thread does, in `serve`, and how it is woken, in `ring`.
"""

from __future__ import annotations

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
from typing import Any, ClassVar

from ._repr import function_name

__all__ = ["Worker", "WorkerThread", "call_contained"]

_logger = logging.getLogger("torchfut_aio")


def call_contained(function: Callable[..., object], *args: object) -> None:
    """Calls what may run callbacks of others, whose errors must not end the thread."""
    try:
        # Nobody is above to take what a callback of a future may pass on.
        with suppress(KeyboardInterrupt, SystemExit):
            function(*args)
    except Exception:
        _logger.exception("Got the following error when calling %s:", function_name(function))


class WorkerThread(threading.Thread):
    """A thread of a worker."""

    __slots__ = ("_hands_over", "_starter", "_worker", "is_to_end", "will_look")

    def __init__(self, worker: Worker) -> None:
        super().__init__(name=worker.name, daemon=worker.daemon)
        self._worker = worker
        self._starter: int | None = None
        self._hands_over = True
        self.is_to_end = False
        self.will_look = True

    def start(self) -> None:
        """Starts it."""
        try:
            self._starter = threading.get_ident()
            super().start()
        finally:
            self._starter = None

    def run(self) -> None:
        """Serves while there is work, unless another thread does."""
        worker = self._worker
        try:
            self._serve_while_there_is_work()
        finally:
            worker._release(self)
            if self._hands_over and worker.has_work():
                worker.ensure_thread()

    def _serve_while_there_is_work(self) -> None:
        worker = self._worker
        while worker._claim(self):
            worker.serve(self)
            worker._release(self)
            if self.is_to_end or not worker.has_work():
                return
            self.will_look = True

    def tell_to_end(self, *, hand_over: bool) -> None:
        """Has it end, whatever there is to do; if told so, another thread does that then."""
        self._hands_over = hand_over
        self.is_to_end = True

    def has_ended(self, give_up: float) -> bool:
        """Waits until ``give_up`` on the monotonic clock for the end; tells whether it came.

        Whoever runs in this thread, or has interrupted whoever starts it, cannot wait.
        """
        me = threading.get_ident()
        while self._starter not in (None, me) and not self.is_alive():
            if time.monotonic() > give_up:
                return False
            time.sleep(0.0005)  # an event would have a lock, which a signal handler could meet
        if not self.is_alive() or self is threading.current_thread():
            return True
        self.join(max(give_up - time.monotonic(), 0))
        return not self.is_alive()

    @property
    def is_there(self) -> bool:
        """Whether it is alive, or is being started."""
        return self._starter is not None or self.is_alive()


class Worker(ABC):
    """A thread while there is work: see the module.

    Attributes:
        work: What is to be done: items, each with anything that belongs to it.
        name: The name of the thread.
    """

    daemon: ClassVar[bool] = True
    """Whether the interpreter exits without waiting for the thread to run out of work.

    A thread that blocks in torch must not be one: if the interpreter ends it when it comes back
    from there, C++ aborts the process.
    """

    patience_at_exit: ClassVar[float] = 0.0
    """For how many seconds a daemon that was told to end is waited for at exit; 0 to leave it."""

    survives_fork: ClassVar[bool] = False
    """Whether what is pending when the process forks is to be done in the child, too."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.work: dict[Any, Any] = {}
        self._new: deque[Any] = deque()
        self._reset()
        _workers[id(self)] = self

    def _reset(self) -> None:
        # The thread that serves, and the last that somebody began to start.
        self._server: WorkerThread | None = None
        self._newest: WorkerThread | None = None
        self._claiming = threading.Lock()
        # A put may interrupt a put, or a get.
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()

    # ---------------------------------------------------------- for whoever brings work

    def submit(self, item: Any, value: Any = None) -> None:
        """Has the thread see to ``item``; starts it if there is none.

        Raises:
            RuntimeError: No thread could be started. The item is withdrawn then, and also if
                Ctrl-C strikes.
        """
        try:
            self.work[item] = value
            self._new.append(item)
            self.ensure_thread()
            if self.has_to_know(item):
                self.ring()
        except BaseException:
            self.work.pop(item, None)
            with suppress(ValueError, IndexError):
                self._new.remove(item)
            raise

    def ensure_thread(self) -> None:
        """Starts a thread, unless one is alive that will look at the work again.

        Raises:
            RuntimeError: No thread could be started.
        """
        for thread in (self._server, self._newest):
            if thread is not None and thread.will_look and thread.is_alive():
                return
        self._newest = thread = WorkerThread(self)
        thread.start()

    def has_to_know(self, _item: Any) -> bool:
        """Tells whether to ring for a new item, or the thread will see it soon enough."""
        return True

    def ring(self) -> None:
        """Wakes the thread that serves, if one does: by default, from `rest`."""
        if self._server is not None:
            self._bell.put(None)

    def threads(self) -> list[WorkerThread]:
        """Returns the threads that are alive or are being started."""
        return [t for t in {self._server, self._newest} if t is not None and t.is_there]

    def end(self, patience: float, *, hand_over: bool = True) -> bool:
        """Tells the thread to end, and waits for that; returns False if it takes too long.

        What is still to be done then is done by another thread, or, without ``hand_over``, when
        something more is submitted.
        """
        threads, give_up = self.threads(), time.monotonic() + patience
        for thread in threads:
            thread.tell_to_end(hand_over=hand_over)
        self.ring()
        return all(thread.has_ended(give_up) for thread in threads)

    # ---------------------------------------------------------------------- for the thread

    @abstractmethod
    def serve(self, thread: WorkerThread) -> None:
        """Does the work; returns when there is none, or when ``thread.is_to_end``."""

    def has_work(self) -> bool:
        """Tells whether anything is to be done."""
        return bool([*self.work])  # a copy locks the dict where there is no GIL, len() does not

    def take(self) -> list[Any]:
        """Returns the items that are new to this thread; some that have gone, or twice, at times.

        By taking out, as that locks the deque where there is no GIL: what is not seen here comes
        from one who sees what this thread has written before.
        """
        items = []
        with suppress(IndexError):
            while True:
                items.append(self._new.popleft())
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

    def _claim(self, thread: WorkerThread) -> bool:
        with self._claiming:
            if self._server is not None and self._server.is_alive():
                return False
            self._server = thread
        self._new.clear()
        self._new.extend([*self.work])  # whatever became of the thread before
        return True

    def _release(self, thread: WorkerThread) -> None:
        if self._server is thread:
            self._server = None
        thread.will_look = False

    # -------------------------------------------------------------------- the process

    def _after_fork(self) -> None:
        self._reset()
        self._new.clear()
        if not self.survives_fork:
            self.work.clear()
        elif self.has_work():
            self.ensure_thread()

    def _at_exit(self) -> None:
        if self.patience_at_exit:
            self.end(self.patience_at_exit, hand_over=False)


_workers: weakref.WeakValueDictionary[int, Worker] = weakref.WeakValueDictionary()  # by id


def _alive() -> list[Worker]:
    return [worker for ref in _workers.valuerefs() if (worker := ref()) is not None]


def _after_fork_in_child() -> None:
    for worker in _alive():
        worker._after_fork()


@atexit.register
def _at_exit() -> None:
    for worker in _alive():
        worker._at_exit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)

"""Threads in tests: started together, joined, their errors raised."""

from __future__ import annotations

import contextvars
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import anyio.to_thread
import pytest

from torchfut_aio._threads import Worker, WorkerThread, workers

PATIENCE = 60.0  # seconds after which a test gives up
# The same for a new process, which must import torch first. On a machine whose load is ten times
# its number of cores, that alone takes a minute.
PATIENCE_WITH_PROCESSES = 10 * PATIENCE

has_gil: bool = getattr(sys, "_is_gil_enabled", lambda: True)()


def needs_gil(why: str) -> pytest.MarkDecorator:
    """Skip a test without a GIL, and say why its promise does not hold there."""
    return pytest.mark.skipif(not has_gil, reason=f"without a GIL: {why}")


@contextmanager
def running(*functions: Callable[[], Any]) -> Iterator[None]:
    """Run ``functions`` in one thread each, released together; join the threads at the end.

    Each runs in a new context. On builds without a GIL, threads inherit the context of their
    creator, and anyio reads from it which event loop runs here.
    """
    errors: list[BaseException] = []
    start = threading.Barrier(len(functions) + 1)

    def run(function: Callable[[], Any]) -> None:
        start.wait(PATIENCE)
        try:
            contextvars.Context().run(function)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    start.wait(PATIENCE)
    try:
        yield
    finally:
        for thread in threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


@asynccontextmanager
async def alongside(*functions: Callable[[], Any]) -> AsyncIterator[None]:
    """Like `running`, for async code: joins without blocking the loop."""
    threads = running(*functions)
    await anyio.to_thread.run_sync(threads.__enter__)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(threads.__exit__, None, None, None)


def worker_named(name: str) -> Worker:
    """Return the package's worker whose thread has this name."""
    [found] = [worker for worker in workers() if worker.name == name]
    return found


def cannot_start(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@contextmanager
def no_thread_starts() -> Iterator[None]:
    """Make the package's threads fail to start; those of an event loop, such as trio's, start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkerThread, "start", cannot_start)
        yield


def until(condition: Callable[[], bool]) -> None:
    """Return once ``condition`` holds: for conditions without an event."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, "timed out"
        time.sleep(0.0005)

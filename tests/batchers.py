"""Batchers for tests, and functions that block until a test lets them return."""

from __future__ import annotations

import threading
import time

import anyio

from torchfut_aio import Batcher

from .threads import PATIENCE, until

NAME = "torchfut_aio batcher in a test"


def double(items):
    return [2 * item for item in items]


async def double_soon(items):
    await anyio.sleep(0.001)
    return double(items)


def batcher_of(function=double, *, max_batch_size=8, max_queue_size=100, **options):
    options = {"name": NAME} | options
    return Batcher(
        function, max_batch_size=max_batch_size, max_queue_size=max_queue_size, **options
    )


def settled(futures):
    """Return the futures when all of them are done."""
    until(lambda: all(fut.done() for fut in futures))
    return futures


def threads():
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def give_up(fut):
    fut.cancel()


class Gated:
    """A function that blocks until it may return, or raise ``error``; it stores its batches."""

    def __init__(self, error=None):
        self.batches = []
        self.error = error
        self.began, self.may_return = threading.Event(), threading.Event()

    def __call__(self, items):
        self.batches.append(items)
        self.began.set()
        assert self.may_return.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return double(items)


def running_batcher(gated, **options):
    """Return a batcher whose function is running, with item 0, until it may return."""
    batcher = batcher_of(gated, **options)
    first = batcher.submit(0)
    give_up = time.monotonic() + PATIENCE
    while not gated.began.is_set():  # spins, as the test may run on a loop
        assert time.monotonic() < give_up
    return batcher, first

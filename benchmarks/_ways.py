"""Ways to await what another thread completes: those of this package, and those by hand.

`Way.complete` is called in another thread, with all futures to complete in one go, and their
values. A bare future is what the loop itself has: ``loop.create_future()``, or on trio an Event
and a value. The floor is the least that can complete one future at a time: a deque, and one wake-up
of the loop for many.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import trio

import torchfut_aio

SET_RESULT, SET_RESULTS = "set_result", "set_results"
BARE, BARE_BATCH = "bare future", "bare future, one wake-up a batch"
BRIDGE, WRAP, THREAD = "bridge by hand", "asyncio.wrap_future", "a thread in fut.wait()"
FLOOR, FLOOR_OF_TORCH = "floor: no torch", "floor, and a C++ future"
WAYS = (SET_RESULT, SET_RESULTS, BARE, BARE_BATCH, BRIDGE, WRAP, THREAD, FLOOR_OF_TORCH, FLOOR)


class Way(NamedTuple):
    new: Callable[[], Any]
    wait: Callable[[Any], Awaitable[Any]]
    complete: Callable[[Sequence[Any], Sequence[Any]], object]


class Arrival:
    """A bare future of trio."""

    __slots__ = ("event", "value")

    def __init__(self) -> None:
        self.event = trio.Event()

    def set(self, value: Any) -> None:
        self.value = value
        self.event.set()

    async def wait(self) -> Any:
        await self.event.wait()
        return self.value


class Native(NamedTuple):
    """What a loop has: how to make, await and set a bare future, to wake it, to use a thread."""

    new: Callable[[], Any]
    wait: Callable[[Any], Awaitable[Any]]
    set: Callable[[Any, Any], None]
    wake: Callable[..., object]
    run_in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]


def native(loop_name: str) -> Native:
    if loop_name == "trio":
        wake: Callable[..., object] = trio.lowlevel.current_trio_token().run_sync_soon
        return Native(Arrival, Arrival.wait, Arrival.set, wake, trio.to_thread.run_sync)
    loop = asyncio.get_running_loop()
    in_thread = partial(loop.run_in_executor, None)
    return Native(loop.create_future, itself, set_unless_done, loop.call_soon_threadsafe, in_thread)


def itself(fut: Any) -> Any:
    return fut


def set_unless_done(fut: asyncio.Future[Any], value: Any) -> None:
    if not fut.done():
        fut.set_result(value)


def each(complete: Callable[[Any, Any], object]) -> Callable[[Sequence[Any], Sequence[Any]], None]:
    def complete_all(futures: Sequence[Any], values: Sequence[Any]) -> None:
        for fut, value in zip(futures, values, strict=True):
            complete(fut, value)

    return complete_all


def through_deque(of: Native) -> Callable[[Any, Any], None]:
    arrived: deque[tuple[Any, Any]] = deque()
    armed = False

    def serve() -> None:
        nonlocal armed
        armed = False
        for _ in range(len(arrived)):
            of.set(*arrived.popleft())

    def complete(fut: Any, value: Any) -> None:
        nonlocal armed
        arrived.append((fut, value))
        if not armed:
            armed = True
            of.wake(serve)

    return complete


def way(loop: str, name: str) -> Way:
    """Return a way, for the loop that runs in this thread."""
    of = native(loop)
    ours, torchs, plain = torchfut_aio.Future, torch.futures.Future, concurrent.futures.Future
    from_deque = through_deque(of)

    def bridged(fut: torch.futures.Future[Any]) -> Awaitable[Any]:
        waiter = of.new()
        fut.add_done_callback(lambda fut: of.wake(of.set, waiter, fut.value()))
        return of.wait(waiter)

    def complete_both(pair: tuple[Any, torch._C.Future], value: Any) -> None:
        from_deque(pair[0], value)
        pair[1].set_result(value)

    return {
        SET_RESULT: Way(ours, itself, each(ours.set_result)),
        SET_RESULTS: Way(ours, itself, torchfut_aio.set_results),
        BARE: Way(of.new, of.wait, each(partial(of.wake, of.set))),
        BARE_BATCH: Way(of.new, of.wait, partial(of.wake, each(of.set))),
        BRIDGE: Way(torchs, bridged, each(torchs.set_result)),
        WRAP: Way(plain, asyncio.wrap_future, each(plain.set_result)),
        THREAD: Way(torchs, lambda fut: of.run_in_thread(fut.wait), each(torchs.set_result)),
        FLOOR: Way(of.new, of.wait, each(from_deque)),
        FLOOR_OF_TORCH: Way(
            lambda: (of.new(), torch._C.Future([])),
            lambda pair: of.wait(pair[0]),
            each(complete_both),
        ),
    }[name]


def ways(loop: str) -> list[str]:
    """Return the names of the ways that a loop has."""
    return [name for name in WAYS if loop != "trio" or name != WRAP]

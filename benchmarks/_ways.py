"""Ways of awaiting what another thread completes: ours, and what is written today.

`Way.complete` is called in another thread, with all the futures that it completes in one go, and
with their values. What a loop itself has for this is a bare future: ``loop.create_future()``, on
trio an Event and a value, which has no torch object. The floor is the least that can be done for
one future at a time: a deque, and one wake-up of the loop for many.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

import torchfut_aio

SET_RESULT, SET_RESULTS = "set_result", "set_results"
BARE, BARE_BATCH = "bare future", "bare future, one wake-up a batch"
BRIDGE, WRAP, THREAD = "bridge by hand", "asyncio.wrap_future", "a thread in fut.wait()"
FLOOR, FLOOR_OF_TORCH = "floor: no torch", "floor, and a C++ future"


class Way(NamedTuple):
    """How a future is made and awaited, and how many are completed."""

    new: Callable[[], Any]
    wait: Callable[[Any], Awaitable[Any]]
    complete: Callable[[Sequence[Any], Sequence[Any]], object]


class Native(NamedTuple):
    """A bare future of a loop: how it is made, awaited and set, and how the loop is woken."""

    new: Callable[[], Any]
    wait: Callable[[Any], Awaitable[Any]]
    set: Callable[[Any, Any], None]
    wake: Callable[..., object]
    wait_in_thread: Callable[[Any], Awaitable[Any]]


class Arrival:
    """A bare future of trio."""

    __slots__ = ("event", "value")

    value: Any

    def __init__(self) -> None:
        import trio

        self.event = trio.Event()

    def set(self, value: Any) -> None:
        """Gives the value to the task that waits."""
        self.value = value
        self.event.set()

    async def wait(self) -> Any:
        """Returns the value."""
        await self.event.wait()
        return self.value


def set_unless_done(fut: asyncio.Future[Any], value: Any) -> None:
    if not fut.done():
        fut.set_result(value)


def itself(fut: Any) -> Any:
    return fut


def native(loop_name: str) -> Native:
    if loop_name == "trio":
        import trio

        wake: Callable[..., object] = trio.lowlevel.current_trio_token().run_sync_soon
        return Native(
            Arrival,
            Arrival.wait,
            Arrival.set,
            wake,
            lambda fut: trio.to_thread.run_sync(fut.wait),
        )
    loop = asyncio.get_running_loop()
    return Native(
        loop.create_future,
        itself,
        set_unless_done,
        loop.call_soon_threadsafe,
        lambda fut: loop.run_in_executor(None, fut.wait),
    )


def one_by_one(
    complete: Callable[[Any, Any], object],
) -> Callable[[Sequence[Any], Sequence[Any]], None]:
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


def bare(of: Native) -> Way:
    return Way(of.new, of.wait, one_by_one(partial(of.wake, of.set)))


def bare_batch(of: Native) -> Way:
    return Way(of.new, of.wait, partial(of.wake, one_by_one(of.set)))


def floor(of: Native) -> Way:
    return Way(of.new, of.wait, one_by_one(through_deque(of)))


def floor_of_torch(of: Native) -> Way:
    complete = through_deque(of)

    def complete_both(futures: tuple[Any, torch._C.Future], value: Any) -> None:
        complete(futures[0], value)
        futures[1].set_result(value)

    return Way(
        lambda: (of.new(), torch._C.Future([])),
        lambda pair: of.wait(pair[0]),
        one_by_one(complete_both),
    )


def bridge(of: Native) -> Way:
    def wait(fut: torch.futures.Future[Any]) -> Awaitable[Any]:
        waiter = of.new()
        fut.add_done_callback(lambda fut: of.wake(of.set, waiter, fut.value()))
        return of.wait(waiter)

    return Way(torch.futures.Future, wait, one_by_one(torch.futures.Future.set_result))


def in_thread(of: Native) -> Way:
    kind = torch.futures.Future
    return Way(kind, of.wait_in_thread, one_by_one(kind.set_result))


def wrap_future(_: Native) -> Way:
    kind = concurrent.futures.Future
    return Way(kind, asyncio.wrap_future, one_by_one(kind.set_result))


def ours(complete: Callable[[Sequence[Any], Sequence[Any]], object], _: Native) -> Way:
    return Way(torchfut_aio.Future, itself, complete)


_WAYS: dict[str, Callable[[Native], Way]] = {
    SET_RESULT: partial(ours, one_by_one(torchfut_aio.Future.set_result)),
    SET_RESULTS: partial(ours, torchfut_aio.set_results),
    BARE: bare,
    BARE_BATCH: bare_batch,
    BRIDGE: bridge,
    WRAP: wrap_future,
    THREAD: in_thread,
    FLOOR_OF_TORCH: floor_of_torch,
    FLOOR: floor,
}


def ways(loop: str) -> list[str]:
    """Returns the names of the ways that there are on a loop."""
    return [name for name in _WAYS if loop != "trio" or name != WRAP]


def way(loop: str, name: str) -> Way:
    """Returns a way, for the loop that runs in this thread."""
    return _WAYS[name](native(loop))

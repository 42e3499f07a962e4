"""Ways of awaiting what another thread completes: ours, and what is written today.

Each function is called on the loop that its futures are for, and is what a peer is made
of. Those that await need nothing else; those that complete are in another thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from queue import SimpleQueue
from threading import Thread, get_ident
from typing import Any, NamedTuple

import anyio
import anyio.from_thread
import torch

import torchfut_aio

__all__ = ["FLOOR", "FLOOR_OF_TORCH", "Way", "bare", "bare_name", "producers", "run", "ways"]

FLOOR = "floor: no torch"
FLOOR_OF_TORCH = "floor, and a C++ future"


class Way(NamedTuple):
    """How a future is made, awaited, and completed with a value."""

    new: Callable[[], Any]
    wait: Callable[[Any], Awaitable[Any]]
    complete: Callable[[Any, Any], object]
    around: AbstractAsyncContextManager[Any] = nullcontext()
    """Entered while it is used."""


def ours() -> Way:
    return Way(torchfut_aio.Future, lambda fut: fut, torchfut_aio.Future.set_result)


def through_portal() -> Way:
    portal = anyio.from_thread.BlockingPortal()
    thread = get_ident()

    async def wait(fut: torch.futures.Future[Any]) -> Any:
        arrived = anyio.Event()

        def wake(_: object) -> None:
            if get_ident() == thread:  # it was done already
                arrived.set()
            else:
                portal.start_task_soon(arrived.set)

        fut.add_done_callback(wake)
        await arrived.wait()
        return fut.value()

    return Way(torch.futures.Future, wait, torch.futures.Future.set_result, portal)


# ----------------------------------------------------------------------- asyncio, uvloop


def hand_written_bridge() -> Way:
    loop = asyncio.get_running_loop()

    def wait(fut: torch.futures.Future[Any]) -> asyncio.Future[Any]:
        waiter: asyncio.Future[Any] = loop.create_future()

        def resume(value: Any) -> None:
            if not waiter.done():
                waiter.set_result(value)

        def bridge(fut: torch.futures.Future[Any]) -> None:
            loop.call_soon_threadsafe(resume, fut.value())

        fut.add_done_callback(bridge)
        return waiter

    return Way(torch.futures.Future, wait, torch.futures.Future.set_result)


def wrap_future() -> Way:
    kind = concurrent.futures.Future
    return Way(kind, asyncio.wrap_future, kind.set_result)


def run_in_executor() -> Way:
    loop = asyncio.get_running_loop()
    kind = torch.futures.Future
    return Way(kind, lambda fut: loop.run_in_executor(None, fut.wait), kind.set_result)


def to_thread() -> Way:
    kind = torch.futures.Future
    return Way(kind, lambda fut: asyncio.to_thread(fut.wait), kind.set_result)


def floor() -> Way:
    """The least that any way can do: a deque, and one wake-up of the loop a batch."""
    loop = asyncio.get_running_loop()
    arrived: deque[tuple[asyncio.Future[Any], Any]] = deque()
    armed = False

    def serve() -> None:
        nonlocal armed
        armed = False
        for _ in range(len(arrived)):
            fut, value = arrived.popleft()
            fut.set_result(value)

    def complete(fut: asyncio.Future[Any], value: Any) -> None:
        nonlocal armed
        arrived.append((fut, value))
        if not armed:
            armed = True
            loop.call_soon_threadsafe(serve)

    return Way(loop.create_future, lambda fut: fut, complete)


def floor_of_torch() -> Way:
    """The least that any way can do that also completes a C++ future of torch for each."""
    _, _, complete, _ = floor()
    loop = asyncio.get_running_loop()

    def complete_both(futures: tuple[asyncio.Future[Any], torch._C.Future], value: Any) -> None:
        complete(futures[0], value)
        futures[1].set_result(value)

    return Way(
        lambda: (loop.create_future(), torch._C.Future([])), lambda pair: pair[0], complete_both
    )


def call_soon_threadsafe() -> Way:
    loop = asyncio.get_running_loop()
    return Way(
        loop.create_future,
        lambda fut: fut,
        lambda fut, value: loop.call_soon_threadsafe(fut.set_result, value),
    )


# ---------------------------------------------------------------------------------- trio


def trio_bridge() -> Way:
    import trio

    token = trio.lowlevel.current_trio_token()

    async def wait(fut: torch.futures.Future[Any]) -> Any:
        arrived = trio.Event()
        fut.add_done_callback(lambda _: token.run_sync_soon(arrived.set))
        await arrived.wait()
        return fut.value()

    return Way(torch.futures.Future, wait, torch.futures.Future.set_result)


def trio_thread() -> Way:
    import trio

    kind = torch.futures.Future
    return Way(kind, lambda fut: trio.to_thread.run_sync(fut.wait), kind.set_result)


class Arrival:
    """A value, and the event that tells that it is there."""

    __slots__ = ("event", "value")

    value: Any

    def __init__(self) -> None:
        import trio

        self.event = trio.Event()

    async def wait(self) -> Any:
        await self.event.wait()
        return self.value


def trio_floor() -> Way:
    import trio

    token = trio.lowlevel.current_trio_token()
    arrived: deque[Arrival] = deque()
    armed = False

    def serve() -> None:
        nonlocal armed
        armed = False
        for _ in range(len(arrived)):
            arrived.popleft().event.set()

    def complete(arrival: Arrival, value: Any) -> None:
        nonlocal armed
        arrival.value = value
        arrived.append(arrival)
        if not armed:
            armed = True
            token.run_sync_soon(serve)

    return Way(Arrival, Arrival.wait, complete)


def run_sync_soon() -> Way:
    import trio

    token = trio.lowlevel.current_trio_token()

    def complete(arrival: Arrival, value: Any) -> None:
        arrival.value = value
        token.run_sync_soon(arrival.event.set)

    return Way(Arrival, Arrival.wait, complete)


# ------------------------------------------------------------------------- for each loop

_ASYNCIO = {
    "await fut": ours,
    "bridge by hand": hand_written_bridge,
    "asyncio.wrap_future": wrap_future,
    "run_in_executor": run_in_executor,
    "asyncio.to_thread": to_thread,
    "anyio's portal": through_portal,
    FLOOR_OF_TORCH: floor_of_torch,
    FLOOR: floor,
}
_TRIO = {
    "await fut": ours,
    "bridge by hand": trio_bridge,
    "trio.to_thread": trio_thread,
    "anyio's portal": through_portal,
    FLOOR: trio_floor,
}


def ways(loop: str) -> dict[str, Callable[[], Way]]:
    """Returns the ways of awaiting that there are on a loop, by name."""
    return dict(_TRIO if loop == "trio" else _ASYNCIO)


def bare_name(loop: str) -> str:
    """Returns what the loop's own function is called that wakes it from another thread."""
    return "bare run_sync_soon" if loop == "trio" else "bare call_soon_threadsafe"


def bare(loop: str) -> Callable[[], Way]:
    """Returns the way that calls this function for every future, and has no torch."""
    return run_sync_soon if loop == "trio" else call_soon_threadsafe


def run(loop: str, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Runs an async function on a fresh loop, "asyncio", "uvloop" or "trio"."""
    backend = "trio" if loop == "trio" else "asyncio"
    options = {"use_uvloop": loop == "uvloop"} if backend == "asyncio" else {}
    return anyio.run(function, *args, backend=backend, backend_options=options)


@contextmanager
def producers(
    complete: Callable[[Any, Any], object], count: int
) -> Iterator[Callable[[Sequence[Sequence[Any]]], None]]:
    """Runs threads, and gives what hands each of them its share of futures to complete."""
    queues: list[SimpleQueue[Sequence[Any] | None]] = [SimpleQueue() for _ in range(count)]

    def produce(queue: SimpleQueue[Sequence[Any] | None]) -> None:
        while (futures := queue.get()) is not None:
            for fut in futures:
                complete(fut, 1)
            futures = fut = None  # nobody pays for freeing them while the clock runs again

    def hand_out(shares: Sequence[Sequence[Any]]) -> None:
        for queue, share in zip(queues, shares, strict=True):
            queue.put(share)

    threads = [Thread(target=produce, args=(queue,)) for queue in queues]
    for thread in threads:
        thread.start()
    try:
        yield hand_out
    finally:
        for queue in queues:
            queue.put(None)
        for thread in threads:
            thread.join()

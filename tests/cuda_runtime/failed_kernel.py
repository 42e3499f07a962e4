"""A program in which a kernel fails while tasks and threads wait for it.

    python -m tests.cuda_runtime.failed_kernel asyncio|trio [blocking]

It prints, as JSON, the outcome of each wait, and of each later use of the package.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.to_thread
import torch

from torchfut_aio import (
    Future,
    PollPolicy,
    as_future,
    gather,
    poll_statistics,
    set_poll_policy,
    synchronize,
    to_host,
    with_timeout,
)

PATIENCE = 60.0
MILLISECOND = 10**6  # cycles of the stand-in

outcomes: dict[str, str] = {}


async def awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


async def note(name: str, use: Callable[[], Awaitable[Any]]) -> None:
    """Wait, and record the error that the wait raised."""
    try:
        with anyio.fail_after(PATIENCE):
            outcomes[name] = f"returned {await use()}"
    except Exception as error:
        outcomes[name] = f"{type(error).__name__}: {error}".partition("\n")[0]


def completed(value: object, devices: list[str] | None = None) -> Future[Any]:
    fut: Future[Any] = Future(devices=devices)
    fut.set_result(value)
    return fut


async def main(backend: str) -> None:
    on_device = torch.zeros(4, device="cuda")
    torch.cuda.synchronize()
    await to_host(on_device)  # so that what is created on first use exists
    failing, other = torch.Stream("cuda:0"), torch.Stream("cuda:0")
    with other:
        torch.cuda._sleep(60_000 * MILLISECOND)
        of_other_stream = completed(on_device + 1)
    called: list[object] = []
    with failing:
        torch.cuda._sleep(500 * MILLISECOND)
        torch._assert_async(torch.zeros(1, device="cuda"))
        tensor = on_device + 1
        declared, undeclared = completed(tensor, ["cuda:0"]), completed(tensor)
        called_back, part, in_thread, copied = (Future[Any]() for _ in range(4))
        called_back.add_done_callback(called.append)
        child = called_back.then(lambda fut: fut.value())
        for fut in (called_back, part, in_thread, copied):
            fut.set_result(tensor)
        event = torch.Event("cuda")
        event.record(failing)
        on_host = to_host(tensor)
    combined = gather([part, of_other_stream])
    copy, of_stream = as_future(event), as_future(failing)

    def wait_in_thread() -> Any:
        return in_thread.wait().tolist()

    waits: dict[str, Callable[[], Awaitable[Any]]] = {
        "await, devices declared": lambda: awaited(declared),
        "await, devices undeclared": lambda: awaited(undeclared),
        "await of another stream": lambda: awaited(of_other_stream),
        "synchronize(stream)": lambda: synchronize(failing),
        "synchronize(device)": lambda: synchronize("cuda:0"),
        "synchronize(event)": lambda: synchronize(event),
        "to_host": lambda: awaited(on_host),
        "as_future(event)": lambda: awaited(copy),
        "as_future(stream)": lambda: awaited(of_stream),
        "then": lambda: awaited(child),
        "gather": lambda: awaited(combined),
        "with_timeout": lambda: awaited(with_timeout(undeclared, PATIENCE)),
        "wait in a thread": lambda: anyio.to_thread.run_sync(wait_in_thread),
        "as_concurrent": lambda: anyio.to_thread.run_sync(copied.as_concurrent().result, PATIENCE),
    }
    if backend == "asyncio":
        waits["as_asyncio"] = lambda: awaited(copied.as_asyncio())
    async with anyio.create_task_group() as tasks:
        for name, use in waits.items():
            tasks.start_soon(note, name, use)
    outcomes["callbacks called"] = f"{len(called)}"

    uses: dict[str, Callable[[], Awaitable[Any]]] = {
        "an int": lambda: awaited(completed(5)),
        "an int, devices declared": lambda: awaited(completed(5, ["cuda:0"])),
        "a CPU tensor": lambda: awaited(completed(torch.ones(2))),
        "a CUDA tensor": lambda: awaited(completed(on_device)),
        "a CUDA tensor, devices declared": lambda: awaited(completed(on_device, ["cuda:0"])),
        "to_host of an int": lambda: to_host(5),
        "to_host of a CUDA tensor": lambda: to_host(on_device),
        "gather of ints": lambda: awaited(gather([completed(1), completed(2)])),
        "then of an int": lambda: awaited(completed(1).then(lambda fut: fut.value() + 1)),
        "synchronize()": lambda: synchronize(),
        "synchronize of the device": lambda: synchronize("cuda:0"),
        "the same future": lambda: awaited(declared),
        "as_future of the event": lambda: awaited(as_future(event)),
    }
    for name, use in uses.items():
        # A use may raise before it returns an awaitable.
        async def begin_and_await(use: Callable[[], Awaitable[Any]] = use) -> Any:
            return await use()

        await note(f"afterwards: {name}", begin_and_await)
    outcomes["pending"] = f"{poll_statistics().pending}"
    print(json.dumps(outcomes), flush=True)
    # PyTorch aborts the process when it frees the tensors of this function.
    os._exit(0)


if __name__ == "__main__":
    backend, *policy = sys.argv[1:]
    if policy == ["blocking"]:
        set_poll_policy(PollPolicy(blocking=True))
    anyio.run(main, backend, backend=backend)

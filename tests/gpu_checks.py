"""The first checks to run on a GPU: what the simulated device cannot show.

    TORCHFUT_AIO_TEST_DEVICE=cuda python -m tests.gpu_checks CHECK

Each check needs a new process, as some leave it unable to use the device. The exit status is 0 if
the check passes, 1 (with a traceback) if it fails, and 77 if this machine cannot run it. By default
the device is the simulated one, which tests the checks themselves.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from torchfut_aio import Future, PollPolicy, as_future, set_poll_policy, synchronize, to_host
from torchfut_aio._devices import _streams, record_event

from .accelerator import DEVICE, FIRST, NEW, SECOND, being_filled, current_stream, write_zeros
from .threads import PATIENCE, running

MISSING = 77  # the exit status if this machine cannot run the check


class CannotCheckError(Exception):
    """This machine lacks something that the check needs."""


def run_with_timeout(main: Any) -> Any:
    """Run ``main`` on asyncio; fail if it takes too long."""
    return asyncio.run(asyncio.wait_for(main, PATIENCE))


def blocking_policy(accelerator: Any) -> None:
    """A thread blocks for an event of the device's own class, on torch.accelerator's stream."""
    write_zeros(accelerator)
    before = set_poll_policy(PollPolicy(blocking=True))

    async def main() -> None:
        stream = torch.accelerator.current_stream()
        kind = torch.get_device_module(DEVICE).Event
        assert isinstance(record_event(stream).event, kind)
        tensor = being_filled(accelerator)
        waiting = asyncio.ensure_future(synchronize(stream))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        accelerator.wake()
        await waiting
        assert tensor.tolist() == NEW

    try:
        run_with_timeout(main())
    finally:
        set_poll_policy(before)


def failed_kernel(accelerator: Any) -> None:
    """All waits for a stream raise its kernel's error, and none hangs."""
    stream, other = torch.Stream(FIRST), torch.Stream(FIRST)

    async def main() -> list[Any]:
        ran: list[Any] = []
        fut: Future[Any] = Future()
        fut.add_done_callback(ran.append)
        child = fut.then(lambda fut: fut.value())
        copy = fut.as_asyncio()
        beside = asyncio.ensure_future(synchronize(other))
        with stream:
            tensor = torch.zeros(1, device=FIRST)
            if DEVICE == "sim":
                accelerator.fail("the kernel failed")
            else:
                torch._assert_async(tensor)
            fut.set_result(tensor)
        awaited = asyncio.ensure_future(_awaited(fut))
        ended = await asyncio.gather(awaited, copy, beside, return_exceptions=True)
        assert ran == [fut]
        assert child.done()
        return ended

    awaited, copy, _ = run_with_timeout(main())
    # CUDA reports the error on the other stream too; other devices do not.
    for error in (awaited, copy):
        assert isinstance(error, RuntimeError), type(error)


async def _awaited(fut: Future[Any]) -> Any:
    return await fut


def capture(accelerator: Any) -> None:
    """Awaiting kernels works while another thread captures a graph in "global" mode."""
    if DEVICE == "sim":
        raise CannotCheckError("the simulated device captures no graphs")
    tensor, stream = torch.zeros(2, device=FIRST), torch.Stream(FIRST)
    prepared, begun, end = threading.Event(), threading.Event(), threading.Event()

    async def main() -> None:
        with stream:
            accelerator.fill_after(tensor, 7, 0.001)
        await synchronize(stream)
        prepared.set()  # clock measured, kernels loaded, events of the package created
        await asyncio.to_thread(begun.wait, PATIENCE)
        for n in range(50):
            with stream:
                accelerator.fill_after(tensor, n, 0.001)
            await synchronize(stream)

    def capture_until_end() -> None:
        assert prepared.wait(PATIENCE)
        captured = torch.zeros(1, device=FIRST)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="global"):
            captured += 1
            begun.set()
            end.wait(PATIENCE)
            captured += 1
        graph.replay()
        torch.cuda.synchronize()
        assert captured.item() == 2

    assert _streams.mode_exchange("cuda") is not None, "the driver's function was not found"

    def await_then_end() -> None:
        try:
            run_with_timeout(main())
        finally:
            end.set()

    with running(capture_until_end, await_then_end):
        pass
    assert tensor.tolist() == [49, 49]


def copies(accelerator: Any) -> None:
    """A copy of an idle tensor is not delayed by kernels or callbacks on 33 other streams."""
    idle = torch.full((2,), 7.0, device=FIRST)
    current_stream().synchronize()

    async def main() -> None:
        await to_host(idle)  # allocates the pinned memory
        streams = [torch.Stream(FIRST) for _ in range(33)]
        for stream in streams:
            fut: Future[Any] = Future()
            fut.add_done_callback(lambda _: None)
            with stream:
                accelerator.sleep(PATIENCE)
                fut.set_result(idle)  # the callback's stream waits for this one
        assert (await to_host(idle)).tolist() == NEW
        assert not streams[0].query()
        accelerator.wake()

    run_with_timeout(main())


def external_streams(accelerator: Any) -> None:
    """The ids 2 (another stream in each thread) and a pointer (reused) do not identify a stream."""
    if DEVICE == "sim":
        raise CannotCheckError("the simulated device has no external streams")
    write_zeros(accelerator)
    other: Future[Any] = Future()
    # After the stream is destroyed, another may get the same pointer.
    pointer = torch.cuda.Stream(FIRST).cuda_stream
    assert record_event(torch.cuda.ExternalStream(pointer)).stream is None

    def of_this_thread() -> Any:
        return torch.cuda.stream(torch.cuda.ExternalStream(2))

    def held_up() -> None:
        with of_this_thread():
            other.set_result(being_filled(accelerator))

    async def main() -> None:
        await asyncio.to_thread(held_up)
        waiting = asyncio.ensure_future(_awaited(other))
        mine: Future[Any] = Future()
        with of_this_thread():
            mine.set_result(torch.ones(1, device=FIRST))
        await mine
        await asyncio.sleep(0.1)
        assert not waiting.done()
        accelerator.wake()
        assert (await waiting).tolist() == NEW

    run_with_timeout(main())


def contexts(accelerator: Any) -> None:
    """A program that uses only the second device gets no context on the first."""
    if accelerator.device_count() < 2:
        raise CannotCheckError("this machine has one device")
    if DEVICE == "sim":
        accelerator.count_contexts()
    has_context = getattr(torch._C, f"_{DEVICE}_hasPrimaryContext")

    def in_thread() -> None:
        # Otherwise torch itself would make device 0 current at the end of each ``with stream``.
        torch.accelerator.set_device_index(1)
        stream, event = torch.Stream(SECOND), torch.Event(DEVICE)

        async def main() -> None:
            for name, use in {
                "await": lambda: _awaited(completed()),
                "stream": lambda: synchronize(stream),
                "event": lambda: synchronize(event),
                "device": lambda: synchronize(SECOND),
                "to_host": lambda: to_host(torch.ones(2, device=SECOND)),
                "as_future": lambda: _awaited(as_future(event)),
                "callback": lambda: _awaited(completed().then(lambda fut: fut.value())),
                "as_asyncio": lambda: completed().as_asyncio(),
            }.items():
                with stream:
                    accelerator.sleep(0.001)
                    event.record(stream)
                await use()
                assert not has_context(0), f"{name} made a context on device 0"

        def completed() -> Future[Any]:
            fut: Future[Any] = Future()
            with stream:
                fut.set_result(torch.ones(2, device=SECOND))
            return fut

        run_with_timeout(main())

    with running(in_thread):
        pass
    assert has_context(1)


CHECKS: dict[str, Callable[[Any], None]] = {
    check.__name__: check
    for check in (blocking_policy, failed_kernel, capture, copies, external_streams, contexts)
}


def main(name: str) -> int:
    accelerator = importlib.import_module(
        "tests.simulated_device" if DEVICE == "sim" else f"tests.{DEVICE}_device"
    )
    start = time.monotonic()
    try:
        CHECKS[name](accelerator)
    except CannotCheckError as error:
        print(error)
        return MISSING
    except BaseException:
        traceback.print_exc()
        return 1
    print(f"{name}: passed in {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # after a kernel's error, the device's exit handlers may abort

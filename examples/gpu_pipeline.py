"""A GPU pipeline for an async server: copy in, compute and copy out, on three streams.

    pip install .    # in a checkout
    python examples/gpu_pipeline.py

Requests arrive at an event loop. For each, a worker thread enqueues the copy to the device
on one stream and the model on another, and completes a future while these are still running.
The loop copies the output back on a third stream, and resumes the request when the copy has
finished. Many requests are in flight, and a heartbeat measures whether anything blocks the
loop. Without an accelerator the same code runs on the CPU, which has no streams.
"""

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from time import perf_counter

import torch

from torchfut_aio import Future, poll_statistics, to_host

REQUESTS = 500
ARRIVALS_PER_SECOND = 1000
IN_FLIGHT = 16  # at most
BATCH, WIDTH, LAYERS = 64, 512, 4
HEARTBEAT = 0.005  # seconds


def model(x: torch.Tensor, layers: list[torch.Tensor]) -> torch.Tensor:
    for weights in layers:
        x = torch.tanh(x @ weights)
    return x


def on(stream: torch.Stream | None) -> AbstractContextManager[object]:
    # Two threads must not enter the same stream. Never await inside it: the current stream
    # belongs to the thread, and so to all of its tasks.
    return nullcontext() if stream is None else stream


class Pipeline:
    """Runs the model on a device; a worker thread enqueues the work."""

    def __init__(self, device: torch.device, layers: list[torch.Tensor]) -> None:
        self._device = device
        self._has_streams = device.type != "cpu"
        self._copy_in = torch.Stream(device) if self._has_streams else None
        self._compute = torch.Stream(device) if self._has_streams else None
        self._layers = [weights.to(device) for weights in layers]  # blocks until they are copied
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pipeline")

    def submit(self, request: torch.Tensor) -> Future[torch.Tensor]:
        """Return a future of the model's output for ``request``, on the device."""
        output: Future[torch.Tensor] = Future()
        self._worker.submit(self._enqueue, request, output)
        return output

    def close(self) -> None:
        """Wait until the worker has ended."""
        self._worker.shutdown()

    def _enqueue(self, request: torch.Tensor, output: Future[torch.Tensor]) -> None:
        copied: Future[torch.Tensor] = Future()
        try:
            with on(self._copy_in):
                if self._has_streams:
                    request = request.pin_memory()  # otherwise the copy would block
                copied.set_result(request.to(self._device, non_blocking=True))
            with on(self._compute):
                # This does not block, because the future is done. It orders this stream after
                # the copy and informs the allocator, as wait_event() and record_stream() do.
                x = copied.wait()
                output.set_result(model(x, self._layers))
        except BaseException as error:  # the client gets it, and the worker continues
            output.set_exception(error)


async def answer(pipeline: Pipeline, request: torch.Tensor) -> torch.Tensor:
    # The output is not ready yet, but its kernels are enqueued, so the copy out may follow.
    output = await pipeline.submit(request).stream_ordered()
    return await to_host(output)  # on another stream


async def serve(pipeline: Pipeline, requests: list[torch.Tensor]) -> list[torch.Tensor]:
    # Warm up: the first requests load the kernels and allocate pinned memory.
    await asyncio.gather(*(answer(pipeline, request) for request in requests[:IN_FLIGHT]))

    late: list[float] = []
    in_flight = asyncio.Semaphore(IN_FLIGHT)

    async def client(request: torch.Tensor) -> torch.Tensor:
        try:
            return await answer(pipeline, request)
        finally:
            in_flight.release()

    async def heartbeat() -> None:
        while True:
            due = perf_counter() + HEARTBEAT
            await asyncio.sleep(HEARTBEAT)
            late.append(perf_counter() - due)

    beats = asyncio.create_task(heartbeat())
    before, start = poll_statistics(), perf_counter()
    clients = []
    for request in requests:
        await asyncio.sleep(random.expovariate(ARRIVALS_PER_SECOND))
        await in_flight.acquire()
        clients.append(asyncio.create_task(client(request)))
    outputs = await asyncio.gather(*clients)
    after, seconds = poll_statistics(), perf_counter() - start
    beats.cancel()

    print(f"  requests    {len(outputs)}, at most {IN_FLIGHT} in flight")
    print(f"  throughput  {len(outputs) / seconds:,.0f} requests/s")
    print(f"  heartbeat   {len(late)} beats, the worst {max(late) * 1e3:.1f} ms late")
    print(f"  watcher     {after.queries - before.queries} queries of events")
    return outputs


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the event loop also needs a core
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    print(f"  device      {device}{': no accelerator is here' if device.type == 'cpu' else ''}")

    layers = [torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(LAYERS)]
    requests = [torch.randn(BATCH, WIDTH) for _ in range(REQUESTS)]
    with closing(Pipeline(device, layers)) as pipeline:
        outputs = asyncio.run(serve(pipeline, requests))

    for request, output in zip(requests, outputs, strict=True):
        torch.testing.assert_close(output, model(request, layers), rtol=1e-3, atol=1e-4)
    print("  results     the same as the host computes")
    print("You saw a loop answer requests while others were copied, computed and copied back.")


if __name__ == "__main__":
    main()

"""List and record the waits of a small server, for Perfetto.

    pip install .    # in a checkout
    python examples/tracing.py [trace.json]

Six requests use a batcher, whose function takes 20 ms per batch. Another request waits for a
future that is never completed, and one of the six blocks the loop, which delays answers that have
already arrived. The list of pending futures shows the first fault, and the trace shows the second.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import torch

from torchfut_aio import Batcher, Future
from torchfut_aio.debug import Recording, pending_futures

weight = torch.randn(64, 64)


def model(images: list[torch.Tensor]) -> list[torch.Tensor]:
    """Process a batch in the batcher's thread."""
    time.sleep(0.02)  # as a larger model would
    return list((torch.stack(images) @ weight).softmax(dim=-1))


async def request(batcher: Batcher[torch.Tensor, torch.Tensor], number: int) -> None:
    await asyncio.sleep(0.005 * number)
    answer = await batcher(torch.randn(64))
    if number == 2:
        time.sleep(0.03)  # noqa: ASYNC251  no task should do this: it blocks all others
    await batcher(answer)


def note(future: Future[None]) -> None:
    """Do nothing; the list names it nevertheless."""


async def lost(future: Future[None]) -> None:
    await future


async def serve(path: str) -> None:
    never = Future[None]()
    with Recording() as recording:
        never.add_done_callback(note)
        task = asyncio.create_task(lost(never), name="lost request")
        async with Batcher(model, max_batch_size=4, max_wait=0.002, max_queue_size=100) as batcher:
            requests = [
                asyncio.create_task(request(batcher, n), name=f"request {n}") for n in range(6)
            ]
            await asyncio.wait(requests)
        await asyncio.to_thread(recording.save, path)
    for pending in pending_futures():
        print(pending)
    never.cancel()
    await asyncio.wait([task])


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = sys.argv[1] if len(sys.argv) > 1 else f"{folder}/trace.json"
        asyncio.run(serve(path))
        print(f"recorded {Path(path).stat().st_size // 1000} kB for https://ui.perfetto.dev")


if __name__ == "__main__":
    main()

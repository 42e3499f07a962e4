"""Who waits for what: a small server, asked while it runs, and recorded for Perfetto.

    python examples/tracing.py [trace.json]

Six requests go through a batcher, whose worker takes 20 ms a batch. One request asks
for what nobody will ever deliver, and one blocks the loop, so that answers that are there wait for
it. The list names the first; in the trace, the second stands out.
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
    """Runs in the batcher's thread."""
    time.sleep(0.02)  # a larger model
    return list((torch.stack(images) @ weight).softmax(dim=-1))


async def request(batcher: Batcher[torch.Tensor, torch.Tensor], number: int) -> None:
    await asyncio.sleep(0.005 * number)
    answer = await batcher.submit(torch.randn(64))
    if number == 2:
        time.sleep(0.03)  # noqa: ASYNC251  what no task should do: all others stand still
    await batcher.submit(answer)


def note(future: Future[None]) -> None:
    """Does nothing; the list names it all the same."""


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

"""Futures in a script without an event loop, between worker threads and an async library.

    pip install .    # in a checkout
    python examples/script.py

This example measures a data set that is stored in files, one of which is broken. An async
library reads the files on a loop in another thread. Worker threads compute and complete
futures. The script chains these, combines them, and waits for them with timeouts.
"""

import io
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import anyio
import torch
from anyio.from_thread import BlockingPortal, start_blocking_portal

from torchfut_aio import (
    Future,
    as_completed,
    as_future,
    collect_all,
    gather,
    start_soon,
    wait_all,
    with_timeout,
)

FILES, ROWS = 8, 50_000
BROKEN = 5
PATIENCE = 30.0  # seconds


class Moments(NamedTuple):
    """Sums of some numbers, from which the mean and deviation of all can be computed."""

    numbers: int
    total: float
    squares: float

    def __str__(self) -> str:
        mean = self.total / self.numbers
        deviation = (self.squares / self.numbers - mean**2) ** 0.5
        return f"{self.numbers:,} numbers, mean {mean:.2f}, deviation {deviation:.2f}"


async def write(path: Path, content: bytes) -> int:
    return await anyio.Path(path).write_bytes(content)


async def read(path: Path) -> bytes:
    return await anyio.Path(path).read_bytes()


def encoded(chunk: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(chunk, buffer)
    return buffer.getvalue()


def measure(content: Future[bytes]) -> Moments:
    """Measure a file in a worker thread, which waits until the file has been read."""
    chunk: torch.Tensor = torch.load(io.BytesIO(content.wait(PATIENCE)), weights_only=True)
    chunk = chunk.double()
    return Moments(chunk.numel(), chunk.sum().item(), chunk.square().sum().item())


def combined(parts: list[Moments]) -> Moments:
    return Moments(*map(sum, zip(*parts, strict=True)))


def outcome(part: Future[Moments]) -> str:
    error = part.exception()
    return "fine" if error is None else type(error).__name__


def main(folder: Path, portal: BlockingPortal, pool: ThreadPoolExecutor) -> None:
    paths = [folder / f"{number}.pt" for number in range(FILES)]
    contents = [encoded(3 * torch.randn(ROWS) + 5) for _ in paths]
    contents[BROKEN] = b"not a tensor"

    # Async functions as futures: they run concurrently, and wait_all() blocks until all are done.
    sizes = wait_all(start_soon(portal, write, *file) for file in zip(paths, contents, strict=True))
    print(f"  written     {len(sizes)} files, {sum(sizes):,} bytes")

    # From the loop's thread to the workers: each worker waits for a file that the loop reads.
    parts = [as_future(pool.submit(measure, start_soon(portal, read, path))) for path in paths]
    # In the order of completion.
    intact = [part for part in as_completed(parts) if part.exception() is None]
    print(f"  measured    {len(intact)} of {len(parts)} files")

    # A chain is built in advance. Its callback runs in the thread that completes the future.
    total = gather(intact).then(lambda parts: combined(parts.value()))
    print(f"  total       {total.wait(PATIENCE)}")

    # When all are done, the outcome of each is still available.
    outcomes = collect_all(parts).then(lambda _: [outcome(part) for part in parts])
    print(f"  files       {', '.join(outcomes.wait(PATIENCE))}")

    # A timeout ends the wait for a future that is never completed.
    never: Future[Moments] = Future()
    try:
        never.wait(timeout=0.05)
    except TimeoutError as late:
        print(f"  wait        {late}")
    fallback = with_timeout(never, 0.05).then(
        lambda late: late.value() if late.exception() is None else total.value()
    )
    print(f"  fallback    {fallback.wait(PATIENCE)}")
    print(f"  afterwards  {never}")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the workers already use enough threads
    with (
        tempfile.TemporaryDirectory() as folder,
        start_blocking_portal() as portal,
        ThreadPoolExecutor(4) as pool,
    ):
        main(Path(folder), portal, pool)
    print("You saw a script wait for threads and for async code alike, without a loop.")

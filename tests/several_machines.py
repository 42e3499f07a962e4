"""A front end on a host of `tests.hosts`; ``test_several_machines.py`` runs it in a new process."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import anyio
import grpc_front_end
from worker_pool import WorkerError

from .hosts import Host
from .threads import PATIENCE

# The server of the example, with a vector of one number for each text. It starts without torch.
WORKER = """
import array, sys, grpc_worker
embed = lambda texts: array.array("f", [float(sys.argv[2])] * len(texts)).tobytes()
grpc_worker.start_server(sys.argv[1], embed).wait_for_termination()
"""
PORT = 50051
SLACK = 5.0  # seconds; on a busy machine, a task may resume late


class Worker:
    """A worker on a host; its vectors contain its number."""

    def __init__(self, host: Host, number: int) -> None:
        self.host, self.number, self.address = host, number, f"{host.address}:{PORT}"
        self.restart()

    def restart(self) -> None:
        self._process = self.host.start("-c", WORKER, self.address, str(self.number))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


FAULTS: dict[str, tuple[Callable[[Worker], None], Callable[[Worker], None]]] = {
    "dies": (Worker.kill, Worker.restart),
    "is cut off": (lambda worker: worker.host.cut(), lambda worker: worker.host.heal()),
    "is unplugged": (lambda worker: worker.host.unplug(), lambda worker: worker.host.plug_in()),
}


def front_end(*hosts: Host) -> None:
    """Break one of two workers; its batch fails in time, and it serves again after the repair."""
    workers = [Worker(host, number) for number, host in enumerate(hosts)]
    for fault, (break_it, repair) in FAULTS.items():
        print(f"a worker {fault}", flush=True)
        anyio.run(_front_end, break_it, repair, *workers)


async def _front_end(
    break_it: Callable[[Worker], None], repair: Callable[[Worker], None], *workers: Worker
) -> None:
    bad, good = workers
    numbers: list[float] = []
    failures: list[tuple[float, str]] = []

    async def use() -> None:
        began = time.monotonic()
        try:
            numbers.append((await batcher("text")).item())
        except WorkerError as error:
            failures.append((time.monotonic() - began, str(error)))

    async def use_until_both_serve() -> None:
        numbers.clear()
        while len({*numbers[-2:]}) < 2:
            with suppress(WorkerError):
                numbers.append((await batcher("text")).item())

    with anyio.fail_after(PATIENCE):
        async with grpc_front_end.embedder([worker.address for worker in workers]) as batcher:
            await use_until_both_serve()
            break_it(bad)
            numbers.clear()
            async with anyio.create_task_group() as group:
                while not (failures and numbers):
                    group.start_soon(use)
                    await anyio.sleep(0.01)
            assert {*numbers} == {good.number}  # it has gone on
            for seconds, text in failures:
                assert seconds < grpc_front_end.LIMIT + SLACK
                assert text.startswith(f"{bad.address}: "), text
            assert {(await batcher("text")).item() for _ in range(20)} == {good.number}
            repair(bad)
            await use_until_both_serve()

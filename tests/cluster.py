"""Processes of one torch.distributed group, on loopback: gloo, and RPC over TensorPipe.

Each process runs one function at a time, and sends back its result or its error.
"""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

import anyio

from .threads import PATIENCE, PATIENCE_WITH_PROCESSES

# All processes are forked from one server that has imported these modules, so they start at once.
# The server ignores modules that are not installed.
PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
PROCESSES.set_forkserver_preload(
    [
        "torch.distributed._functional_collectives",
        "tests.services",
        "tests.http_service",
        "tests.embeddings_service",
    ]
)

LOOPS = {
    "asyncio": {"backend": "asyncio"},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}


def run_on(loop: str, function: Callable[..., Any], *args: Any) -> Any:
    """Run an async function on that kind of loop, in this thread."""
    return anyio.run(function, *args, **LOOPS[loop])


class Cluster:
    """A number of worker processes, named ``worker0`` and so on in RPC."""

    def __init__(self, size: int, *, uvloop: bool = True, rpc: bool = True) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._pipes = []
        self.processes = []
        for rank in range(size):
            ours, theirs = PROCESSES.Pipe()
            process = PROCESSES.Process(
                target=_work,
                args=(theirs, rank, size, self._folder.name, uvloop, rpc),
                name=f"worker{rank}",
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)
        self.results()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the processes; after a test without an error they must exit with 0."""
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(0 if kind else PATIENCE_WITH_PROCESSES)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
            process.close()
        self._folder.cleanup()
        if kind is None:
            assert codes == [0] * len(codes) or self.killed, codes

    killed = False

    def start(self, rank: int, function: Callable[..., Any], *args: Any) -> None:
        """Start ``function(*args)`` in one process; the function is pickled by name."""
        # As bytes: PyTorch would send tensors as file descriptors, through a socket it keeps open.
        self._pipes[rank].send_bytes(pickle.dumps((function, args)))

    def result(self, rank: int) -> Any:
        """Return the result of the function that `start` started, or raise."""
        assert self._pipes[rank].poll(PATIENCE_WITH_PROCESSES), f"worker {rank} hangs"
        outcome, text = pickle.loads(self._pipes[rank].recv_bytes())
        if text is not None:
            raise AssertionError(f"worker {rank}: {text}")
        return outcome

    def call(self, rank: int, function: Callable[..., Any], *args: Any) -> Any:
        self.start(rank, function, *args)
        return self.result(rank)

    def results(self) -> list[Any]:
        return [self.result(rank) for rank in range(len(self._pipes))]

    def everywhere(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``function(*args)`` in all processes at once."""
        for rank in range(len(self._pipes)):
            self.start(rank, function, *args)
        return self.results()

    def kill(self, rank: int) -> None:
        self.killed = True
        self.processes[rank].kill()
        self.processes[rank].join()


def _work(pipe: Any, rank: int, size: int, folder: str, uvloop: bool, with_rpc: bool) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", TP_SOCKET_IFNAME="lo")
    import torch
    import torch.distributed as dist
    from torch.distributed import rpc

    def answer(outcome: Any, text: str | None = None) -> None:
        pipe.send_bytes(pickle.dumps((outcome, text)))

    torch.set_num_threads(1)
    store = pathlib.Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{store}/gloo", rank=rank, world_size=size)
    if with_rpc:
        options = rpc.TensorPipeRpcBackendOptions(
            init_method=f"file://{store}/rpc", rpc_timeout=PATIENCE_WITH_PROCESSES / 2
        )
        rpc.init_rpc(f"worker{rank}", rank=rank, world_size=size, rpc_backend_options=options)
    if not uvloop:
        _start_background_loop_without_uvloop()
    answer(rank)
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            return
        try:
            answer(function(*args))
        except BaseException:
            answer(None, traceback.format_exc())


def _start_background_loop_without_uvloop() -> None:
    from torchfut_aio.distributed import async_rpc

    async def nothing() -> None:
        pass

    sys.modules["uvloop"] = None  # type: ignore[assignment]
    async_rpc(nothing)().wait(PATIENCE)
    del sys.modules["uvloop"]

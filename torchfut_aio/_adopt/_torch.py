"""Futures of torch, ours among them, and the works of torch.distributed."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, TypeVar

import torch

from .._devices import finish_current_streams
from .._errors import InvalidStateError
from .._future import Future
from .._rpc_errors import parse_remote_error
from .._worker import Worker, WorkerThread, call_contained
from ._registry import Devices, adopts, copy_outcome, once

T = TypeVar("T")


@adopts("torchfut_aio.Future", kind=Future)
def _from_ours(source: Future[T], *, devices: Devices = None) -> Future[T]:
    return source if devices is None else _from_torch(source, devices=devices)


@adopts("torch.futures.Future", kind=torch._C.Future)
@once
def _from_torch(source: torch._C.Future[Any], future: Future[Any]) -> None:
    source.add_done_callback(lambda source: copy_outcome(source.value, future, parse_remote_error))


@adopts("torch.distributed.Work")  # not in builds of torch without torch.distributed
@once
def _from_work(source: torch.distributed.Work, future: Future[Any]) -> None:
    try:
        native = source.get_future()
    except RuntimeError:
        # Some works of gloo have none. They tell only a thread that blocks: one for each.
        _WorkWait().submit(source, future)
    else:
        native.add_done_callback(lambda done: copy_outcome(done.value, future))


class _WorkWait(Worker):
    """A thread that blocks for one work.

    At exit, the process leaves it behind: a peer may keep it waiting for as long as it likes, and
    nothing can interrupt it.
    """

    def __init__(self) -> None:
        super().__init__("torchfut_aio work")

    def serve(self, _thread: WorkerThread) -> None:
        for source in self.take():
            future = self.work.pop(source, None)
            if future is not None:
                call_contained(_wait_for_work, source, future)


def _wait_for_work(source: torch.distributed.Work, future: Future[Any]) -> None:
    def wait() -> None:
        source.wait()
        finish_current_streams()

    with suppress(InvalidStateError):  # somebody else has completed it
        copy_outcome(wait, future)

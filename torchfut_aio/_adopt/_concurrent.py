"""Futures of ``concurrent.futures``, and what hands one out."""

from __future__ import annotations

import concurrent.futures
from typing import Any

from .._arguments import Devices
from .._dependent import DependentFuture
from .._future import Future
from ._registry import Adoption, adopts, as_future, once


@adopts("concurrent.futures.Future")
@once
def _from_concurrent(source: concurrent.futures.Future[Any], future: DependentFuture[Any]) -> None:
    source.add_done_callback(Adoption(source, future).callback())


@adopts("grpc.Future")  # of a call that blocks no loop; those of grpc.aio are awaitables
@once
def _from_grpc(source: Any, future: DependentFuture[Any]) -> None:
    source.add_done_callback(Adoption(source, future).callback())


@adopts("torch.distributed.checkpoint.state_dict_saver.AsyncSaveResponse")
def _from_save(source: Any, *, devices: Devices = None) -> Future[Any]:
    # The upload begins with waiting for the staging, and fails with its error.
    return as_future(source.upload_completion, devices=devices)

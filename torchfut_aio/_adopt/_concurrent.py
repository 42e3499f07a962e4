"""Futures of ``concurrent.futures``, and what hands one out."""

from __future__ import annotations

from typing import Any

from .._arguments import Devices
from .._future import Future
from ._adopted import once
from ._registry import adopts, as_future

adopts("concurrent.futures.Future")(once())


@adopts("torch.distributed.checkpoint.state_dict_saver.AsyncSaveResponse")
def _from_save(source: Any, *, devices: Devices = None) -> Future[Any]:
    # The upload begins with waiting for the staging, and fails with its error.
    return as_future(source.upload_completion, devices=devices)

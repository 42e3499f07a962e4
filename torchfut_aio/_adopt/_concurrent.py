"""Futures of ``concurrent.futures``, and objects that have one."""

from __future__ import annotations

from typing import Any

from .._arguments import Devices
from .._future import Future
from ._adopted import once
from ._registry import adopts, as_future

adopts("concurrent.futures.Future")(once())


@adopts("torch.distributed.checkpoint.state_dict_saver.AsyncSaveResponse")
def _from_save(source: Any, *, devices: Devices = None) -> Future[Any]:
    # Not the staging: the upload first waits for that, and fails with its error.
    return as_future(source.upload_completion, devices=devices)

"""The GPUs of this machine, where the simulated device is under test."""

from __future__ import annotations

import os
from unittest import mock

import torch


def hide() -> None:
    """Hide all GPUs from torch in this process.

    If torch finds one, ``pin_memory=True`` allocates CUDA's memory even with another accelerator.
    Child processes are not affected.
    """
    variables = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "")
    with mock.patch.dict(os.environ, variables):
        assert not torch.cuda.is_available(), "torch has counted the GPUs before"

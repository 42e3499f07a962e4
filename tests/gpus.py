"""The GPUs of this machine, where the simulated device is under test."""

from __future__ import annotations

import os
from unittest import mock

import torch


def hide() -> None:
    """Let torch find no GPU in this process, from now on.

    Where it finds one, memory allocated with ``pin_memory=True`` is CUDA's, whatever the
    accelerator is. Processes that this one starts find theirs.
    """
    variables = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "")
    with mock.patch.dict(os.environ, variables):
        assert not torch.cuda.is_available(), "torch has counted the GPUs before"

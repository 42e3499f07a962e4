"""How a value is shown in the repr of the future that holds it."""

from __future__ import annotations

import reprlib

import torch


class _Short(reprlib.Repr):
    """Cuts values to a line; shows no numbers of tensors, as kernels may still compute them."""

    def __init__(self) -> None:
        super().__init__()
        self.maxother = self.maxstring = 80

    def repr_Tensor(self, tensor: torch.Tensor, level: int) -> str:  # noqa: N802, ARG002
        return f"<tensor {tuple(tensor.shape)} {tensor.dtype} {tensor.device}>"


short = _Short().repr

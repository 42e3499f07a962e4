"""How a value is shown in the repr of the future that holds it."""

from __future__ import annotations

import reprlib

import torch

__all__ = ["short"]


class _Short(reprlib.Repr):
    """Values cut to a line; a tensor by its kind, as its numbers may still be computed."""

    def __init__(self) -> None:
        super().__init__()
        self.maxother = self.maxstring = 80

    def repr_Tensor(self, tensor: torch.Tensor, level: int) -> str:  # noqa: N802, ARG002
        return f"<tensor {tuple(tensor.shape)} {tensor.dtype} {tensor.device}>"


short = _Short().repr

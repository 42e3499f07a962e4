"""What ``Future[int]`` is at run time: an annotation that PyTorch accepts as one of its own class.

DDP compares the annotation of a hook's result with ``torch.futures.Future[torch.Tensor]``, and
TorchScript compares the class behind it with ``torch.futures.Future``. Neither accepts subclasses.
So this alias is equal to PyTorch's, and ``typing.get_origin`` returns PyTorch's class; but calling
the alias, or deriving from it, uses ours.
"""

from __future__ import annotations

import types
import typing
from typing import Any

# By its name, as PyTorch does: a program may put our class in its place.
from torch.futures import Future as TorchFuture


class FutureAlias(types.GenericAlias):
    """``Future[...]``."""

    @property
    def __origin__(self) -> Any:
        return TorchFuture

    def __getitem__(self, item: Any) -> FutureAlias:
        substituted: Any = super().__getitem__(item)
        return FutureAlias(substituted.__origin__, substituted.__args__)

    def __eq__(self, other: object) -> bool:
        is_future = typing.get_origin(other) is TorchFuture
        return is_future and typing.get_args(other) == self.__args__

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((TorchFuture, self.__args__))  # as that of PyTorch's

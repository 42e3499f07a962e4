"""The class of ``Future[int]``: an annotation that PyTorch accepts in place of its own.

DDP compares the annotation of a hook's result with ``torch.futures.Future[torch.Tensor]``, and
TorchScript compares its origin with ``torch.futures.Future``. Neither accepts subclasses. So this
alias is equal to PyTorch's, and ``typing.get_origin`` returns PyTorch's class. But to call the
alias, or to derive from it, uses our class.
"""

from __future__ import annotations

import types
import typing
from typing import Any

# By its name, as PyTorch does: a program may replace it by our class.
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
        return hash((TorchFuture, self.__args__))  # equal to that of PyTorch's alias

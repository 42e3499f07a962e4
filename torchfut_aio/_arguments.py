"""What is wrong with an argument, said clearly."""

from __future__ import annotations

import math
import numbers

__all__ = ["check_callable", "check_timeout"]


def check_callable(callback: object) -> None:
    """Raises TypeError unless ``callback`` can be called."""
    if not callable(callback):
        raise TypeError(
            f"the callback must be callable with the future as its argument, "
            f"not {callback!r} of type {type(callback).__qualname__}"
        )


def check_timeout(timeout: float) -> None:
    """Raises TypeError or ValueError unless ``timeout`` is a number of seconds."""
    if not isinstance(timeout, numbers.Real):
        raise TypeError(
            f"timeout must be a number of seconds or None, not {timeout!r} "
            f"of type {type(timeout).__qualname__}"
        )
    if math.isnan(timeout):
        raise ValueError("timeout must be a number of seconds or None, not NaN")

"""Checks of arguments: the errors say what is wrong, and what to pass instead."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Iterable

import torch


def callback_checked(callback: object) -> None:
    """Raises TypeError unless ``callback`` can be called when a future completes."""
    if not callable(callback):
        raise TypeError(
            f"the callback must be callable with the future as its argument, "
            f"not {callback!r} of type {type(callback).__qualname__}"
        )
    if getattr(callback, "__module__", None) == "asyncio.tasks":
        # asyncio.wait() takes anything with add_done_callback. But its callback wakes no loop
        # when another thread calls it.
        raise TypeError(
            "asyncio.wait() takes futures of asyncio only: pass fut.as_asyncio(), "
            "or asyncio.ensure_future(fut)"
        )


def exception_checked(error: object, by: str) -> None:
    """Raises TypeError unless ``error`` is an exception, as the method called ``by`` takes."""
    if not isinstance(error, BaseException):
        raise TypeError(
            f"{by}() takes an exception instance, such as ValueError('...'), "
            f"not one of type {type(error).__qualname__}"
        )


def devices_checked(devices: Iterable[int | str | torch.device]) -> tuple[torch.device, ...]:
    """Returns the devices as a tuple; raises TypeError for a single one that is in no list."""
    if isinstance(devices, (str, int, torch.device)):
        raise TypeError(f"devices must be a list of devices, such as [{devices!r}]")
    return tuple(torch.device(device) for device in devices)


def timeout_checked(
    timeout: float, what: str = "timeout must be a number of seconds or None"
) -> float:
    """Returns ``timeout`` as a float, 0 if negative; raises TypeError or ValueError."""
    if not isinstance(timeout, numbers.Real):
        raise TypeError(f"{what}, not {timeout!r} of type {type(timeout).__qualname__}")
    try:
        seconds = float(timeout)
    except OverflowError:
        seconds = math.inf if timeout > 0 else 0.0
    if math.isnan(seconds):
        raise ValueError(f"{what}, not NaN")
    return max(seconds, 0.0)


def async_function_checked(func: object, by: str) -> None:
    """Raises TypeError unless ``func`` is what the decorator called ``by`` takes."""
    if isinstance(func, (staticmethod, classmethod)):
        kind = type(func).__name__
        raise TypeError(f"put @{kind} above @{by}, which takes the function itself")
    if hasattr(func, "_wrapped_async_rpc_function"):
        raise TypeError(f"{func!r} has been made a function for RPC already")
    if not inspect.iscoroutinefunction(func):
        raise TypeError(f"{by} takes an async def function, not {func!r}")

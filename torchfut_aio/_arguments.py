"""Checks of arguments; each error says what is wrong, and what to pass instead."""

from __future__ import annotations

import datetime
import inspect
import math
import numbers
import operator
from collections import UserString
from collections.abc import Iterable, Iterator, Sequence, ValuesView
from typing import Any, TypeAlias

import torch

from ._repr import described, function_name, short

Devices: TypeAlias = Iterable[int | str | torch.device] | None


def callback_checked(callback: object) -> None:
    if not callable(callback):
        raise TypeError(
            f"the callback must be callable with the future as its argument, "
            f"not {described(callback)}"
        )
    if getattr(callback, "__module__", None) == "asyncio.tasks":
        # asyncio.wait() takes any object with add_done_callback. But if another thread calls its
        # callback, that does not wake the loop.
        raise TypeError(
            "asyncio.wait() takes futures of asyncio only: pass fut.as_asyncio(), "
            "or asyncio.ensure_future(fut)"
        )


def exception_checked(error: object, by: str) -> None:
    if not issubclass(type(error), BaseException):  # not isinstance(): a mock defines __class__
        raise TypeError(
            f"{by}() takes an exception instance, such as ValueError('...'), not {short(error)}"
        )


def devices_checked(devices: Iterable[int | str | torch.device]) -> tuple[torch.device, ...]:
    """Return the devices as a tuple; raise TypeError for one device, or for anything else."""
    if isinstance(devices, (str, int, torch.device)):
        raise TypeError(f"devices must be a list of devices, such as [{short(devices)}]")
    return tuple(map(_device, devices))


def _device(device: int | str | torch.device) -> torch.device:
    if not isinstance(device, (str, int, torch.device)):
        raise TypeError(f"a device is a torch.device, string or index, not {described(device)}")
    return torch.device(device)


def size_checked(size: Any, name: str, kind: str = "an int") -> int:
    """Return a size as an int; raise TypeError or ValueError unless it is a positive one."""
    try:
        number = operator.index(size)
    except TypeError:
        raise TypeError(f"{name} must be {kind}, not {type(size).__qualname__}") from None
    if number < 1:
        raise ValueError(f"{name} must be positive, not {number}")
    return number


def timeout_checked(timeout: float | None) -> Any:
    """Return ``timeout`` as a float, 0 if negative, or None; raise TypeError or ValueError."""
    if timeout is None:
        return None
    return max(number_checked(timeout, "timeout must be a number of seconds or None"), 0.0)


def number_checked(number: float, what: str) -> float:
    """Return ``number`` as a float; raise TypeError or ValueError, which begins with ``what``."""
    check_number_of_seconds(number, what)
    try:
        value = float(number)
    except OverflowError:
        value = math.inf if number > 0 else -math.inf
    if math.isnan(value):
        raise ValueError(f"{what}, not NaN")
    return value


def check_number_of_seconds(seconds: object, what: str) -> None:
    """Raise TypeError, which begins with ``what``, unless ``seconds`` is a real number."""
    if not isinstance(seconds, numbers.Real):
        cure = ": pass its .total_seconds()" if isinstance(seconds, datetime.timedelta) else ""
        raise TypeError(f"{what}, not {short(seconds)}{cure}")


def async_function_checked(func: object, by: str) -> None:
    """Raise TypeError, for the decorator called ``by``, unless ``func`` is an async function."""
    if inspect.isasyncgenfunction(func):
        raise TypeError(
            f"{by} takes an async def function that returns one value, and {function_name(func)} "
            "is an async generator, which yields many: return a list of them, or one in each call"
        )
    async_checked(func)
    if not inspect.iscoroutinefunction(func):
        what = function_name(func) if callable(func) else described(func)
        raise TypeError(f"{by} takes an async def function, not {what}")


def async_checked(func: Any) -> None:
    """Raise TypeError if ``func`` is an async function that a plain decorator hides."""
    call: Any = func
    while not inspect.iscoroutinefunction(call):
        call = getattr(call, "__wrapped__", None)
        if call is None or call is func:
            return
    if call is not func:
        raise TypeError(hides_async(func))


def hides_async(func: object) -> str:
    """Return the message for a plain function that returns the coroutine of an async one."""
    return (
        f"{function_name(func)} is not `async def` and returns a coroutine: pass the async "
        "function itself, or make it `async def` and await there. A decorator such as "
        "@torch.inference_mode() also hides an async function, and applies only while its "
        "coroutine is made: remove it, and use a `with` block in the function, which "
        "task_local_state() keeps apart from other tasks"
    )


def listed(values: Any, what: str) -> list[Any]:
    """Return a list of ``values``, one for each future or place in a stream.

    ``values`` is a list, a tuple, another sequence that is not a string, or a tensor or array of at
    least one dimension, for its rows. Raise TypeError for anything else, such as a mapping, a
    string or an iterator; its text begins with ``what``, for example "put_many() takes".
    """
    kind: Any = type(values)
    if hasattr(kind, "__dlpack__") and hasattr(kind, "ndim"):
        if values.ndim:
            return [*values]
        problem = f"{described(values)} of no dimensions"
    elif issubclass(kind, tuple) and (hasattr(kind, "_fields") or hasattr(kind, "n_fields")):
        # A namedtuple, or a result of torch.max() or os.stat(): the fields of one object.
        problem = f"{described(values)}, whose items are named: pass one of them, or a list"
    elif issubclass(kind, Sequence) and not issubclass(kind, _TEXT):
        return [*values]
    elif issubclass(kind, (Iterator, ValuesView)):
        problem = f"{described(values)}: make a list of it first"
    else:
        problem = described(values)
    raise TypeError(f"{what} a list, not {problem}")


_TEXT = (str, bytes, bytearray, memoryview, UserString)

"""The error for what `as_future` cannot adopt, with what to pass instead."""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable, Iterable

import torch

from .._errors import NotAFutureError
from .._repr import described


def refusal(source: object, accepted: Iterable[str]) -> NotAFutureError:
    """Return the error for what is none of the types that are accepted."""
    problem = "Future can't be None" if source is None else f"{described(source)} is not a future"
    return NotAFutureError(
        f"{problem}. {_cure(type(source))}as_future() accepts {', '.join(accepted)}, "
        "and what is added with as_future.register()."
    )


def _cure(kind: type) -> str:
    # By the type alone: what the object says of itself may wait for a kernel or a peer.
    if kind is type(None):
        return (
            "A collective returns None without async_op=True; on a rank that is not in its group; "
            "and if it is for objects, such as all_gather_object(), which has no async_op: run "
            "that in a thread, by anyio.to_thread.run_sync(). "
        )
    if issubclass(kind, torch.Tensor):
        return (
            "A tensor is there already, but kernels may still fill it: await synchronize(), or "
            "to_host(tensor). "
        )
    if issubclass(kind, (str, int)):
        return "Of a dict of futures, pass its .values(). "
    if issubclass(kind, Awaitable):
        return "A coroutine must run first: pass asyncio.ensure_future(coroutine). "
    if issubclass(kind, AsyncIterable):
        return "Use `async for`: it gives its values one after the other. "
    if issubclass(kind, Callable):  # type: ignore[arg-type]
        return (
            "A function must be called first: an async one by start_soon(), another by an "
            "executor, whose future can be adopted. "
        )
    if issubclass(kind, Iterable):
        return "Pass many futures as one flat list to gather() or collect_all(). "
    return ""

"""The error for an object that `as_future` cannot adopt. It says what to pass instead."""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable, Iterable

import torch

from .._errors import NotAFutureError
from .._repr import described


def refusal(source: object, accepted: Iterable[str]) -> NotAFutureError:
    problem = "Future can't be None" if source is None else f"{described(source)} is not a future"
    return NotAFutureError(
        f"{problem}. {_cure(type(source))}as_future() accepts {', '.join(accepted)}, "
        "and types added with as_future.register()."
    )


def _cure(kind: type) -> str:
    # By the type alone: the methods of the object may wait for a kernel or a peer.
    if kind is type(None):
        return (
            "A collective returns None without async_op=True, and on a rank that is not in its "
            "group. Collectives of objects, such as all_gather_object(), have no async_op: run "
            "them in a thread, by anyio.to_thread.run_sync(). "
        )
    if issubclass(kind, torch.Tensor):
        return (
            "To wait for kernels that may still fill a tensor, await synchronize(), or "
            "to_host(tensor). "
        )
    if issubclass(kind, (str, int)):
        return "To pass a dict of futures, pass its .values(). "
    if issubclass(kind, Awaitable):
        return "A coroutine must run first: pass asyncio.ensure_future(coroutine). "
    if issubclass(kind, AsyncIterable):
        return "Read its values with `async for`. "
    if issubclass(kind, Callable):  # type: ignore[arg-type]
        return (
            "Call the function first: start_soon() starts an async one, and an executor returns a "
            "future of any other. "
        )
    if issubclass(kind, Iterable):
        return "Pass many futures as one flat list to gather() or collect_all(). "
    return ""

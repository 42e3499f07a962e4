"""What `as_future` says of what it cannot adopt, and what to pass instead.

It looks at the type alone: what the thing says of itself may wait for a kernel or a peer.
"""

from __future__ import annotations

from collections.abc import Iterable

from .._errors import NotAFutureError
from .._pytorch import COALESCING_MANAGER
from .._repr import described

_MANY = "Pass many futures as one flat list to gather() or collect_all()."
_FUNCTION = (
    "A function must be called first: an async one by start_soon(), another by an executor, whose "
    "future can be adopted."
)
_KEY = "Of a dict of futures, pass its .values()."
_STREAM = "Use `async for`: a stream gives its values one after the other."
_AWAITABLE = "A coroutine must run first: pass asyncio.ensure_future(coroutine)."

# By the full names of types, or what they derive from.
_CURES = {
    "NoneType": (
        "A collective returns None without async_op=True; on a rank that is not in its group; and "
        "if it is for objects, such as all_gather_object(), which has no async_op: run that in a "
        "thread, by anyio.to_thread.run_sync()."
    ),
    "torch.Tensor": (
        "A tensor is there already, but kernels may still fill it: await synchronize(), or "
        "to_host(tensor)."
    ),
    COALESCING_MANAGER: (
        "Pass manager.works of a coalescing manager to gather(), after its `with` block."
    ),
    "torch.distributed.rpc.rref_proxy.RRefProxy": (
        "Call a method of an RRef's proxy first, as in rref.rpc_async().method()."
    ),
    "multiprocessing.pool.IMapIterator": (
        "Use apply_async() or map_async() of the pool, whose AsyncResult can be adopted."
    ),
    "torchfut_aio.ValueStream": _STREAM,
    "torchfut_aio._stream._Listener": _STREAM,
    "torchfut_aio.Batcher": "Call submit(item) of the batcher, which returns a future.",
    "torchfut_aio._as_completed._AsCompleted": (
        "Use `async for`: as_completed() gives futures, one after the other."
    ),
    "ray.ObjectRefGenerator": "Iterate over it: each item is an ObjectRef, which can be adopted.",
    "coroutine": _AWAITABLE,
    "async_generator": "Use `async for` for what an async generator yields.",
    "function": _FUNCTION,
    "method": _FUNCTION,
    "functools.partial": _FUNCTION,
    "str": _KEY,
    "int": _KEY,
    "bytes": "",
}


def refusal(source: object, accepted: Iterable[str]) -> NotAFutureError:
    """Returns the error for what is none of the types that are accepted."""
    problem = f"{described(source)} is not a future"
    if source is None:
        problem = "Future can't be None"
    cure = _cure(type(source))
    return NotAFutureError(
        f"{problem}. {cure}{' ' if cure else ''}as_future() accepts {', '.join(accepted)}, "
        "and what is added with as_future.register()."
    )


def _cure(kind: type) -> str:
    for base in kind.__mro__:
        name = base.__qualname__
        cure = _CURES.get(name if base.__module__ == "builtins" else f"{base.__module__}.{name}")
        if cure is not None:
            return cure
    if hasattr(kind, "__await__"):
        return _AWAITABLE
    return _MANY if issubclass(kind, Iterable) else ""

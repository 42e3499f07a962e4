"""`as_future`, and the functions that register sources with it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, get_type_hints, overload

import torch

from .._arguments import Devices
from .._future import Future
from .._repr import described

T = TypeVar("T")
Source: TypeAlias = torch.futures.Future[T] | asyncio.Future[T] | concurrent.futures.Future[T]
_Adapter: TypeAlias = Callable[..., Future[Any]]
_A = TypeVar("_A", bound=_Adapter)

# The adapter of each type: of registered types, and of those of `_ours` that are imported.
_adapters: dict[type[Any], _Adapter] = {}

# The adapters of this package, by the names of types, as their libraries may not be imported yet.
_ours: dict[str, _Adapter] = {}


def adopts(*names: str) -> Callable[[_A], _A]:
    """Register an adapter for the types of these names."""

    def register(adapter: _A) -> _A:
        _ours.update(dict.fromkeys(names, adapter))
        return adapter

    return register


def adopts_in_contrib(module: str, *names: str) -> None:
    """Register the `adopt` of a module of ``contrib``, which is imported when it is called."""

    @adopts(*names)
    def adapter(source: object, **options: Any) -> Any:
        imported = importlib.import_module(f"..contrib.{module}", __package__)
        return imported.adopt(source, **options)


class _AsFuture:
    """Return a `Future` that completes as ``source`` does.

    An error arrives as it is, and a cancellation as `CancelledError`. An error that RPC delivers as
    text becomes an `RpcError`, which is also of the type of the original.

    If nothing can complete a source any more, because it was garbage-collected or its event loop
    has closed, the future is cancelled. (A ``torch.futures.Future`` with a callback is never
    garbage-collected while it is pending: the callback refers to it from C++.)

    For a pending source, it returns the same future each time, so that repeated calls, as after a
    timeout, add nothing to the source. For an event or a stream, it returns a new future each time,
    and one thread watches all of them until the work is done; to wait once, use `synchronize`. A
    source without callbacks occupies a thread until it is done: an RRef, an AsyncCollectiveTensor,
    the result of a pool, and some works of gloo.

    Other libraries add sources with ``@as_future.register``.

    Args:
        source: One of these, or an instance of a registered type:

            - a `Future`, which is returned as it is, or a ``torch.futures.Future``;
            - a ``concurrent.futures.Future``; an ``asyncio.Future`` or ``Task``, of any loop; a
              ``TaskHandle`` or ``Future`` of anyio, of the loop that runs in this thread; an
              ``AsyncResult`` of a ``multiprocessing`` pool;
            - a ``torch.distributed`` ``Work``; an ``AsyncCollectiveTensor``, from PyTorch 2.13 on,
              for the reduced tensor: leave the source alone until then; an ``RRef``, for what its
              ``to_here`` returns; an ``AsyncSaveResponse``, for the end of the upload;
            - a ``torch.Event`` that has been recorded, or one of ``torch.cuda``, ``torch.xpu`` or
              ``torch.mps``; a ``torch.Stream``, for the work enqueued on it so far. The result
              of these is None;
            - an ``ObjectRef`` of Ray; a ``Future`` of ``dask.distributed``; a ``grpc.Future``.
        devices: The devices of the future, as for `Future`. With devices, it never returns
            ``source`` itself.

    Raises:
        NotAFutureError: ``source`` is none of these; a TypeError.
        TypeError: The function registered for it does not return a `Future`.
        RuntimeError: ``source`` is a pending asyncio future of a loop that has closed, or that
            cannot run because this thread runs another loop. To await the future there also raises
            it.

    Example:
        >>> import concurrent.futures
        >>> with concurrent.futures.ThreadPoolExecutor() as pool:
        ...     torchfut_aio.as_future(pool.submit(pow, 2, 10)).wait()
        1024
    """

    def __init__(self) -> None:
        self.__name__ = self.__qualname__ = "as_future"

    def __repr__(self) -> str:
        return f"<function {self.__module__}.{self.__qualname__}>"

    def __reduce__(self) -> str:
        return self.__qualname__  # as a function, it is pickled by its name

    @overload
    def __call__(
        self,
        source: Source[T],
        *,
        devices: Devices = None,
    ) -> Future[T]: ...
    @overload
    def __call__(self, source: object, *, devices: Devices = None) -> Future[Any]: ...

    def __call__(self, source: object, *, devices: Devices = None) -> Future[Any]:
        adapter = _adapters.get(type(source)) or _adapter_of(source)
        future: object = adapter(source) if devices is None else adapter(source, devices=devices)
        if not isinstance(future, Future):
            raise TypeError(
                f"the function registered with as_future for {type(source).__qualname__} must "
                f"return a torchfut_aio.Future, and returned {described(future)}"
            )
        return future

    @overload
    def register(self, cls: type[Any], func: None = None) -> Callable[[_A], _A]: ...
    @overload
    def register(self, cls: type[Any], func: _A) -> _A: ...
    @overload
    def register(self, cls: _A, func: None = None) -> _A: ...

    def register(self, cls: Any, func: Any = None) -> Any:
        """Register a function that adopts instances of a type, as ``singledispatch`` does.

        Use it as a decorator, ``@as_future.register(Type)``, or call it with the function. The
        function takes the source, and the keyword ``devices`` if it was passed to `as_future`, and
        returns a `Future`. The type may be left out if the function's first parameter is annotated
        with it.
        """
        kinds = cls.__args__ if isinstance(cls, types.UnionType) else (cls,)
        if not all(isinstance(kind, type) for kind in kinds):
            hints = [*get_type_hints(cls).values()] if func is None and callable(cls) else []
            if not hints:
                raise TypeError(
                    "as_future.register() takes a type, or an annotated function: "
                    f"not {described(cls)}"
                )
            return self.register(hints[0], cls)
        if func is None:
            return functools.partial(self.register, cls)
        _adapters.update(dict.fromkeys(kinds, func))
        return func


_AsFuture.__call__.__qualname__ = "as_future"  # in TypeErrors about its arguments
as_future: _AsFuture = _AsFuture()


def _adapter_of(source: object) -> _Adapter:
    # First our own, so that no abstract class that was registered is taken for one of these.
    for name, adapter in [*_ours.items()]:
        module, _, attribute = name.rpartition(".")
        known = getattr(sys.modules.get(module), attribute, None)
        if isinstance(known, type):
            _adapters.setdefault(known, adapter)
    registered = _registered_for(type(source))
    if registered is not None:
        return registered
    if asyncio.isfuture(source):  # written in Python, or of another loop
        return _ours["asyncio.Future"]
    from ._refusals import refusal

    others = [kind for kind in [*_adapters] if _adapters[kind] not in _ours.values()]
    raise refusal(source, [*_ours, *(f"{kind.__module__}.{kind.__qualname__}" for kind in others)])


def _registered_for(kind: type[Any]) -> _Adapter | None:
    for base in kind.__mro__:
        if base in _adapters:
            return _adapters[base]
    # An abstract class may have subclasses that do not derive from it. Take the one registered
    # last. Search a copy, as `__subclasscheck__` may register another.
    virtual = filter(functools.partial(issubclass, kind), reversed([*_adapters]))
    return _adapters.get(next(virtual, object))

"""`as_future`, and how the files beside this one, or other libraries, add sources to it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import sys
import weakref
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, TypeAlias, TypeVar, get_type_hints, overload

import torch

from .. import _core
from .._arguments import devices_checked
from .._errors import CancelledError, drop_catching_frame
from .._future import Future
from .._repr import described

T = TypeVar("T")
Devices: TypeAlias = Iterable[int | str | torch.device] | None
Source: TypeAlias = torch.futures.Future[T] | asyncio.Future[T] | concurrent.futures.Future[T]
_Adapter: TypeAlias = Callable[..., Future[Any]]
_A = TypeVar("_A", bound=_Adapter)


class _AsFuture:
    """Returns a `Future` that completes as ``source`` does.

    An error arrives as it is, and a cancellation as the source's own CancelledError: that of
    ``concurrent.futures`` is not asyncio's. Only what RPC delivers as a text becomes an
    `RpcError`, of the original's own type, too.

    A future of asyncio or ``concurrent.futures`` that nobody can complete any more, because it was
    garbage-collected or its event loop has closed, arrives as cancelled.

    For a source that is still pending, it returns the same future each time, so that asking again
    after a timeout leaves nothing behind. For an event or a stream, it makes one each time, and
    one thread watches them all until the work is done; to wait once, use `synchronize`. A source
    that tells only who blocks costs a thread until it is done: an RRef, an AsyncCollectiveTensor,
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
              ``torch.mps``; a ``torch.Stream``, for the work enqueued on it so far. These give
              None;
            - an ``ObjectRef`` of Ray; a ``Future`` of ``dask.distributed``; a ``grpc.Future``.
        devices: The devices of the future, as for `Future`. With devices, ``source`` is never
            returned itself.

    Raises:
        NotAFutureError: ``source`` is none of these; a TypeError.
        TypeError: The function registered for it does not return a `Future`.
        RuntimeError: ``source`` is a pending asyncio future of a loop that has closed, or that
            cannot run because this thread runs another. Awaiting it on that other raises it, too.

    Example:
        >>> import concurrent.futures
        >>> with concurrent.futures.ThreadPoolExecutor() as pool:
        ...     torchfut_aio.as_future(pool.submit(pow, 2, 10)).wait()
        1024
    """

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
        adapter = _adapter_of(type(source))
        future: object = adapter(source) if devices is None else adapter(source, devices=devices)
        if not isinstance(future, Future):
            raise TypeError(
                f"what is registered with as_future for {type(source).__qualname__} must "
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
        """Registers a function that adopts instances of a type, as ``singledispatch`` does.

        Use it as a decorator, ``@as_future.register(Type)``, or call it with the function. The
        function takes the source, and the ``devices`` by keyword if `as_future` was given them,
        and returns a `Future`. The type may be left out if the function's first parameter is
        annotated with it.
        """
        if func is None and not isinstance(cls, type):
            # From Python 3.14 on, singledispatch reads __annotate__ only, which is None if a
            # decorator or a code generator has assigned the annotations.
            assigned = getattr(cls, "__annotate__", True) is None
            if assigned and (hints := get_type_hints(cls)):
                return _adapters.register(next(iter(hints.values())), cls)
        return _adapters.register(cls, func)


as_future: _AsFuture = _AsFuture()

# The adapters of this package, by the names of the types that they adopt.
_ours: dict[str, _Adapter] = {}


def adopts(*names: str, kind: type[Any] | None = None) -> Callable[[_A], _A]:
    """Registers what adopts instances of the types of these names.

    ``kind`` is a class to register at once; ``names`` are what messages call it. Without it, a type
    need not be imported yet: `as_future` looks again once it gets something unknown.
    """

    def register(adapter: _A) -> _A:
        _ours.update(dict.fromkeys(names, adapter))
        if kind is not None:
            _adapters.register(kind, adapter)
        _register_imported()
        return adapter

    return register


def _register_imported() -> None:
    for name, adapter in _ours.items():
        module, _, attribute = name.rpartition(".")
        kind = getattr(sys.modules.get(module), attribute, None)
        if kind is not None and kind not in _adapters.registry:
            _adapters.register(kind, adapter)


@functools.singledispatch
def _adapters(source: object, *, devices: Devices = None) -> Future[Any]:
    _register_imported()
    # Registering clears the cache of singledispatch. Another thread may have cached its old answer
    # after the first clear, so register once more.
    _adapters.register(object, _adapters.registry[object])
    adapter = _adapter_of(type(source))
    if adapter is not _adapters.registry[object]:
        return adapter(source, devices=devices)
    if asyncio.isfuture(source):  # written in Python, or of another loop
        return _ours["asyncio.Future"](source, devices=devices)
    from ._refusals import refusal

    registered = [
        f"{kind.__module__}.{kind.__qualname__}"
        for kind, adapter in [*_adapters.registry.items()]  # which others may add to
        if kind is not object and adapter not in _ours.values()
    ]
    raise refusal(source, [*_ours, *registered])


def _adapter_of(kind: type[Any]) -> _Adapter:
    while True:
        known = len(_adapters.registry)
        try:
            return _adapters.dispatch(kind)
        except RuntimeError:  # two that it could be, or another thread has registered one meanwhile
            if len(_adapters.registry) == known:
                raise


# The futures of sources that may still be pending, each made once. A source holds its future
# through the callback that it was given, not the other way.
_Made: TypeAlias = MutableMapping[Any, weakref.WeakValueDictionary[Any, Future[Any]]]
_made: _Made = weakref.WeakKeyDictionary()


def once(
    adopt: Callable[[Any, Future[Any]], None],
    kind: type[Future[Any]] = Future,
    made_of: _Made = _made,
) -> _Adapter:
    """Makes an adapter of ``adopt(source, future)``, which it calls once for a pending source.

    It makes futures of ``kind``, and notes them in ``made_of``.
    """

    def adapter(source: Any, *, devices: Devices = None) -> Future[Any]:
        key = () if devices is None else devices_checked(devices)
        made = made_of.setdefault(source, weakref.WeakValueDictionary())
        future = made.get(key)
        if future is None or _has_been_cancelled(future):
            future = kind(devices=key)
            adopt(source, future)
            made[key] = future
        return future

    return adapter


def _has_been_cancelled(future: Future[Any]) -> bool:
    """Tells whether somebody who adopted the source before has cancelled the future."""
    outcome = _core.outcome_of(future)
    return outcome is not None and type(outcome.error) is CancelledError


def copy_outcome(
    read: Callable[[], Any],
    future: Future[Any],
    translate: Callable[[BaseException], BaseException] = lambda error: error,
) -> None:
    """Completes ``future``, unless it is done, with what ``read`` returns or raises."""
    try:
        value = read()
    except BaseException as error:
        future.try_set_exception(translate(drop_catching_frame(error)))
    else:
        future.try_set_result(value)


class Adoption:
    """The only reference from a source to the future that adopted it: a callback of the source.

    A source that is collected while it is pending drops it, and it fails the future.
    """

    __slots__ = ("__weakref__", "_future")

    def __init__(self, future: Future[Any]) -> None:
        self._future: Future[Any] | None = future

    def __call__(self, source: Any) -> None:
        """Completes the future as ``source``, which is done."""
        if self._future is not None:
            copy_outcome(source.result, self._future)
        self._future = None  # the traceback of an error may lead here

    def end(self, why: str) -> None:
        """Fails the future with CancelledError if it is pending."""
        future = getattr(self, "_future", None)  # unless it was interrupted before it was whole
        if future is not None and not future.done():
            error = concurrent.futures.CancelledError(f"the adopted future was pending when {why}")
            future.try_set_exception(error)
        self._future = None

    def __del__(self) -> None:
        self.end("it was garbage-collected: nobody can complete it any more")

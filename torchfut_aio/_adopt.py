"""Futures of other kinds, made into ours: `as_future` and its registry of sources.

An adopted future completes as its source does, and in the thread where that does. It
does not control the source: there is no way to cancel or to complete that through it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import sys
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar, get_type_hints, overload

import torch

from . import _core
from ._arguments import devices_checked
from ._cpython import running_loop
from ._devices import RecordedEvent, already_recorded, finish_current_streams, record_event
from ._errors import InvalidStateError, NotAFutureError, drop_catching_frame
from ._future import Future
from ._rpc_errors import StandIn, parse_remote_error
from ._worker import Worker, WorkerThread, call_contained

__all__ = ["adopts_unimported", "as_future"]

T = TypeVar("T")
_Devices = Iterable[int | str | torch.device] | None
_Adapter = Callable[..., Future[Any]]
_A = TypeVar("_A", bound=_Adapter)


class _AsFuture:
    """Returns a `Future` that completes as ``source`` does.

    The error of a source arrives as it is, and its cancellation as its own
    CancelledError: that of ``concurrent.futures`` is not asyncio's. But what RPC delivers as
    a text becomes an `RpcError`, of the original's own type, too. Asked again for a
    source that is still pending, it returns the future that it made before, so that
    what times out and asks anew leaves nothing behind with the source. Not so for an
    event or a stream: each time it makes a future, which a thread watches, one for all of
    these, until the work is done. To wait just once, `synchronize` is better.

    Other libraries add theirs as with ``functools.singledispatch``: see the example.

    Args:
        source: A future of this package, which is returned as it is; a
            ``torch.futures.Future``; a ``torch.distributed`` ``Work``; a
            ``concurrent.futures.Future``; an ``asyncio.Future`` or ``Task``, of any
            loop; a ``TaskHandle`` or ``Future`` of anyio, of the loop that runs in this thread;
            a ``torch.Event`` that has been recorded, or a ``torch.Stream``, for a
            future that completes with None when the work enqueued so far has been done;
            or an instance of a registered type.
        devices: The devices of the future that is made, as for `Future`; for a future
            of this package too, if given, a new one is made.

    Raises:
        NotAFutureError: ``source`` is none of these; a TypeError.
        TypeError: What was registered for it does not return a `Future`.
        RuntimeError: ``source`` is a pending asyncio future of a loop that has closed.

    Example:
        >>> import concurrent.futures
        >>> with concurrent.futures.ThreadPoolExecutor() as pool:
        ...     torchfut_aio.as_future(pool.submit(pow, 2, 10)).wait()
        1024

        >>> class Ticket:  # of another library
        ...     def on_ready(self, function):
        ...         function(self, "ready")
        >>> @torchfut_aio.as_future.register(Ticket)
        ... def _(ticket, *, devices=None):
        ...     fut = torchfut_aio.Future(devices=devices)
        ...     ticket.on_ready(lambda ticket, value: fut.set_result(value))
        ...     return fut
        >>> torchfut_aio.as_future(Ticket()).wait()
        'ready'
    """

    @overload
    def __call__(
        self, source: torch.futures.Future[T], *, devices: _Devices = None
    ) -> Future[T]: ...
    @overload
    def __call__(self, source: asyncio.Future[T], *, devices: _Devices = None) -> Future[T]: ...
    @overload
    def __call__(
        self, source: concurrent.futures.Future[T], *, devices: _Devices = None
    ) -> Future[T]: ...
    @overload
    def __call__(self, source: object, *, devices: _Devices = None) -> Future[Any]: ...

    def __call__(self, source: object, *, devices: _Devices = None) -> Future[Any]:
        adapter = _adapters.dispatch(type(source))
        future: object = adapter(source) if devices is None else adapter(source, devices=devices)
        if not isinstance(future, Future):
            raise TypeError(
                f"what is registered with as_future for {type(source).__qualname__} must "
                f"return a torchfut_aio.Future, and returned {future!r}"
            )
        return future

    @overload
    def register(self, cls: type[Any], func: None = None) -> Callable[[_A], _A]: ...
    @overload
    def register(self, cls: type[Any], func: _A) -> _A: ...
    @overload
    def register(self, cls: _A, func: None = None) -> _A: ...

    def register(self, cls: Any, func: Any = None) -> Any:
        """Registers what adopts instances of a type, as ``functools.singledispatch`` does.

        Use it as a decorator, ``@as_future.register(Type)``, or call it with the
        function. That takes the source and, by keyword, the ``devices`` that
        `as_future` was given, if it was, and returns a `Future`. The type may be left
        out if the function's first parameter is annotated with it.
        """
        if func is None and not isinstance(cls, type):
            # From Python 3.14 on, singledispatch reads __annotate__ alone, which is None if
            # the annotations were assigned, as decorators and code generators do.
            assigned = getattr(cls, "__annotate__", True) is None
            if assigned and (hints := get_type_hints(cls)):
                return _adapters.register(next(iter(hints.values())), cls)
        return _adapters.register(cls, func)


_unimported: dict[tuple[str, str], _Adapter] = {}


def adopts_unimported(module: str, *names: str) -> Callable[[_A], _A]:
    """Registers what adopts instances of types of a module that may not be imported yet."""

    def register(adapter: _A) -> _A:
        _unimported.update({(module, name): adapter for name in names})
        return adapter

    return register


@functools.singledispatch
def _adapters(source: object, *, devices: _Devices = None) -> Future[Any]:
    for (module, name), adapter in _unimported.items():
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(source, kind):
            _adapters.register(kind, adapter)
            return adapter(source, devices=devices)
    if asyncio.isfuture(source):  # written in Python, or of another loop
        return _from_asyncio(source, devices=devices)
    problem, cure = f"{source!r} of type {type(source).__qualname__} is not a future", ""
    if source is None:
        problem, cure = "Future can't be None", " A collective needs async_op=True."
    elif asyncio.iscoroutine(source):
        cure = " A coroutine must run first: pass asyncio.ensure_future(coroutine)."
    registered = "".join(
        f", {kind.__module__}.{kind.__qualname__}"
        for kind, adapter in _adapters.registry.items()
        if kind not in _OWN and adapter not in _unimported.values()
    )
    raise NotAFutureError(
        f"{problem}; as_future() accepts torchfut_aio.Future, torch.futures.Future, "
        "torch.distributed.Work, torch.Event, torch.Stream, concurrent.futures.Future, "
        "asyncio.Future, asyncio.Task, anyio.TaskHandle, anyio.Future"
        f"{registered}, and what is added with as_future.register().{cure}"
    )


as_future = _AsFuture()

# What has been made of sources that may still be pending, so as to make it once. A
# source holds its future through the callback that it was given, not the other way.
_made: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[Any, Future[Any]]] = (
    weakref.WeakKeyDictionary()
)


def _once(
    adopt: Callable[[Any, Future[Any]], None],
) -> Callable[..., Future[Any]]:
    """Makes an adapter, ``adopt(source, future)``, that is run once a pending source."""

    @functools.wraps(adopt)
    def adapter(source: Any, *, devices: _Devices = None) -> Future[Any]:
        key = () if devices is None else devices_checked(devices)
        made = _made.setdefault(source, weakref.WeakValueDictionary())
        future = made.get(key)
        if future is None:
            future = Future(devices=key)
            adopt(source, future)
            made[key] = future
        return future

    return adapter


@_adapters.register(Future)
def _from_ours(source: Future[T], *, devices: _Devices = None) -> Future[T]:
    return source if devices is None else _from_torch(source, devices=devices)


@_adapters.register(torch._C.Future)
@_once
def _from_torch(source: torch._C.Future[Any], future: Future[Any]) -> None:
    source.add_done_callback(lambda source: _copy(source.value, future, parse_remote_error))


@_adapters.register(concurrent.futures.Future)
@_once
def _from_concurrent(source: concurrent.futures.Future[Any], future: Future[Any]) -> None:
    source.add_done_callback(lambda source: _copy(source.result, future))


@_adapters.register(asyncio.Future)
@_once
def _from_asyncio(source: asyncio.Future[Any], future: Future[Any]) -> None:
    def copy(source: asyncio.Future[Any]) -> None:
        _copy(source.result, future)

    loop = source.get_loop()
    if source.done():
        copy(source)
    elif running_loop() is loop:
        source.add_done_callback(copy)
    else:
        # asyncio's futures may be touched in the thread of their loop only.
        try:
            loop.call_soon_threadsafe(source.add_done_callback, copy)
        except RuntimeError as error:
            if not source.done():
                raise RuntimeError(
                    f"{source!r} is pending on a loop that has closed: it will never complete"
                ) from error
            copy(source)


def _copy(
    read: Callable[[], Any],
    future: Future[Any],
    told: Callable[[BaseException], BaseException] = lambda error: error,
) -> None:
    """Completes ``future`` with what ``read``, of a source that is done, gives or raises."""
    try:
        value = read()
    except BaseException as error:
        future.set_exception(told(drop_catching_frame(error)))
    else:
        future.set_result(value)


def _from_recorded(event: RecordedEvent, devices: _Devices) -> Future[None]:
    from ._devices._background import when_reached

    future: Future[None] = Future(devices=devices)

    def complete(error: Exception | None) -> None:
        with suppress(InvalidStateError):  # somebody has completed it instead
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    when_reached(event, complete)
    return future


@_adapters.register(torch.Event)
def _from_event(source: torch.Event, *, devices: _Devices = None) -> Future[None]:
    return _from_recorded(already_recorded(source), devices)


@_adapters.register(torch.Stream)
def _from_stream(source: torch.Stream, *, devices: _Devices = None) -> Future[None]:
    return _from_recorded(record_event(source), devices)


if torch.distributed.is_available():
    _core.install_stand_in(StandIn.of)

    @_adapters.register(torch.distributed.Work)
    @_once
    def _from_work(source: torch.distributed.Work, future: Future[Any]) -> None:
        try:
            native = source.get_future()
        except RuntimeError:
            # Some works of gloo have none, and only who blocks is told: one thread each.
            _WorkWait().submit(source, future)
        else:
            native.add_done_callback(lambda done: _copy(done.value, future))

    class _WorkWait(Worker):
        """A thread that blocks for one work.

        It is left behind at exit: what it waits for may take as long as a peer likes, and cannot
        be given up.
        """

        def __init__(self) -> None:
            super().__init__("torchfut_aio work")

        def serve(self, _thread: WorkerThread) -> None:
            for source in self.take():
                future = self.work.pop(source, None)
                if future is not None:
                    call_contained(_wait_for_work, source, future)

    def _wait_for_work(source: torch.distributed.Work, future: Future[Any]) -> None:
        def wait() -> None:
            source.wait()
            finish_current_streams()

        with suppress(InvalidStateError):  # somebody has completed it instead
            _copy(wait, future)


_OWN = frozenset(_adapters.registry)

"""`as_future`, and how the files beside this one, or other libraries, add sources to it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import sys
import time
import weakref
from _thread import start_new_thread
from collections.abc import Callable, Generator
from typing import Any, TypeAlias, TypeVar, get_type_hints, overload

import torch

from .. import _core
from .._arguments import Devices, devices_checked
from .._dependent import DependentFuture
from .._devices import finish_devices
from .._errors import CANCELLATIONS, AsyncioCancelledError, CancelledError, drop_catching_frame
from .._future import Future
from .._repr import described
from .._worker import call_contained

T = TypeVar("T")
Source: TypeAlias = torch.futures.Future[T] | asyncio.Future[T] | concurrent.futures.Future[T]
_Adapter: TypeAlias = Callable[..., Future[Any]]
_A = TypeVar("_A", bound=_Adapter)


class _AsFuture:
    """Returns a `Future` that completes as ``source`` does.

    An error arrives as it is, and a cancellation as `CancelledError`. What RPC delivers as a text
    becomes an `RpcError`, of the original's own type, too.

    A source that nothing can complete any more, because it was garbage-collected or its event loop
    has closed, arrives as cancelled, too.

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


# Those that were interrupted before their future was done, and their sources if known.
_stopped: dict[Adoption, Any] = {}

# Seconds for a source that is done to call its callbacks.
_GRACE = 0.05


class _Ref(weakref.ref[Any]):
    """A weak reference to a source, by identity, as a source may define ``==`` as it likes."""

    __slots__ = ("_id",)

    def __init__(self, source: Any, _forget: Callable[[Any], object]) -> None:
        self._id = id(source)

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: Any) -> bool:
        # A source that has gone is equal to none, not even to another in its place in memory.
        source = self()
        return self is other or (source is not None and source is other())


# The futures of sources that may still be pending, each made once. A source holds its future
# through the callback that it was given, not the other way.
_made: dict[_Ref, dict[Any, weakref.ref[Future[Any]]]] = {}


def _forget(source: _Ref) -> None:
    _made.pop(source, None)


def once(adopt: Callable[[Any, DependentFuture[Any]], None]) -> _Adapter:
    """Make an adapter of ``adopt(source, future)``, which it calls once for a pending source."""

    def adapter(source: Any, *, devices: Devices = None) -> Future[Any]:
        key = () if devices is None else devices_checked(devices)
        # setdefault is atomic: a dict begins its search again if `__eq__` lets another thread in.
        made = _made.setdefault(_Ref(source, _forget), {})
        ref = made.get(key)
        future: Any = None if ref is None else ref()
        if future is None or _was_cancelled(future):
            future = DependentFuture(devices=key)
            adopt(source, future)
            made[key] = weakref.ref(future)
        else:
            future.check()
        return future  # type: ignore[no-any-return]

    return adapter


def _was_cancelled(future: Future[Any]) -> bool:
    """Return whether a caller that adopted the source before has cancelled the future.

    True also of an asyncio source that was cancelled: it is done, and may be adopted again.
    """
    outcome = _core.outcome_of(future)
    return outcome is not None and type(outcome.error) is AsyncioCancelledError


class Adoption(_core.Promise):
    """The promise of a future that adopted a source; `callback` is for the source to call."""

    __slots__ = ("_is_recovering", "_source")

    def __init__(self, source: Any, future: DependentFuture[Any]) -> None:
        super().__init__(future, "the adopted future")
        # Weak, as the source refers to its callbacks; C++ would hide the cycle from the collector.
        self._source = weakref.ref(source)
        self._is_recovering = False
        future.depend_on(self)

    def callback(self) -> Callable[[Any], object]:
        """Return what completes the future when it is called with the source, which is done."""
        generator = _until_done(self)
        next(generator)
        return generator.send

    def adopt(self, source: Any) -> None:
        """Complete the future as ``source``, which is done."""
        try:
            error = source.exception()  # not result(), which would add frames to the traceback
        except (RecursionError, MemoryError):
            raise
        except (Exception, asyncio.CancelledError) as raised:
            error = raised.with_traceback(None)
            if source.cancelled() and not issubclass(type(error), CANCELLATIONS):  # gRPC's
                error = CancelledError(*error.args)
        if error is None:
            self.keep(source.result())
        else:
            try:
                self.fail(error)
            finally:
                del error

    def recover(self, source: Any, error: BaseException) -> None:
        """Complete the future after ``error`` has stopped `adopt`; in a thread of its own."""
        _stopped.pop(self, None)
        source = self._source() if source is None else source
        if source is None:
            self.fail(error)
        elif self.is_pending():
            try:
                finish_devices()  # on which streams the value is filled is not known here
                self.adopt_again(source)
            except Exception as failure:
                self.fail(drop_catching_frame(failure))

    def adopt_again(self, source: Any) -> None:
        """Do what `adopt` does, in a thread that nothing interrupts."""
        self.adopt(source)

    def check(self, blocks: bool = False) -> None:  # noqa: ARG002
        """Recover if the source is done and had no frame left to call the callback."""
        source = self._source()
        if source is not None and source.done() and not self._is_recovering:
            self._is_recovering = True
            start_new_thread(call_contained, (self._recover_later, source))

    def _recover_later(self, source: Any) -> None:
        # Nearly always the source is about to call the callback, in another thread.
        time.sleep(_GRACE)
        self.recover(source, RuntimeError("the source is done"))

    def cancel_at_end(self) -> None:
        """Complete the future when the source is garbage-collected."""
        self.fail_pending("it was garbage-collected: nothing can complete it any more")

    def fail_pending(self, why: str) -> None:
        """Fail the future, as its source will never complete it."""
        text = f"the adopted future was pending when {why}"
        self.fail(CancelledError(text))


def _until_done(adoption: Adoption) -> Generator[None, Any, None]:
    # It is suspended within the `try` before the source is done. The source calls ``send``, which
    # is C: so no interrupt can come between the call and the handler.
    source = None
    try:
        source = yield
        adoption.adopt(source)
    except GeneratorExit:  # the source was dropped
        return
    except BaseException as error:
        # On a full stack no call is possible. This is none: the next use of the future recovers.
        _stopped[adoption] = source
        start_new_thread(call_contained, (adoption.recover, source, error))
        raise
    finally:
        del source, adoption  # a source may keep its callbacks
    yield

"""Running the callbacks of a future that has completed.

A callback may complete another future, whose callbacks complete a third, and so on: a chain. If
each link ran within the one before, a chain of ten thousand would overflow the stack. So
completions nest up to `MAX_DEPTH` in a thread, as in ``torch.futures``. Callbacks of deeper ones
are deferred: the outermost completion of the thread runs them before it returns.
"""

from __future__ import annotations

import logging
import threading
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any, Final

from .._repr import function_name, type_name
from ._outcome import Outcome

MAX_DEPTH = 32

CALLBACK: Final = "callback"  # in the state of a future, the value of a key that is a callback

_logger = logging.getLogger("torchfut_aio")

_State = dict[Any, Any]
_Callbacks = Sequence[Any]


class DoneCallback:
    """Runs when a future completes; the base class of each kind."""

    __slots__ = ()  # not an ABC: isinstance() would take ten times as long

    run: Callable[[Any], object]
    """Called with the future once it has completed."""

    uses_streams = True
    """Whether it may enqueue kernels: then it runs on streams ordered after those of the value."""

    function: Callable[[Any], object] | None = None
    """The argument of ``add_done_callback`` or ``then``, if this was made by one of these."""

    @property
    def name(self) -> str:
        """Its name in logs."""
        return type_name(self) if self.function is None else function_name(self.function)

    def fail(self, future: Any, error: BaseException, /) -> None:
        """Complete, with ``error``, every future that this callback has left pending.

        It is called if the error ended `run`, possibly before its first line.
        """


class FunctionCallback(DoneCallback):
    """A function that was given to ``add_done_callback``; it runs in the context of that call."""

    __slots__ = ("function", "run")

    def __init__(self, function: Callable[[Any], object]) -> None:
        self.function = function
        # A partial, which is C: so a traceback begins with the frame of the function.
        self.run: Any = partial(copy_context().run, function)  # type: ignore[call-arg]


class _Nesting:
    """How deep completions nest in one thread, and the callbacks that it has deferred."""

    __slots__ = ("deferred", "depth")

    def __init__(self) -> None:
        self.depth = 0
        self.deferred: deque[tuple[Any, Outcome, _State, _Callbacks]] = deque()


class _ThisThread(threading.local):
    nesting: _Nesting


_this_thread = _ThisThread()


def _nesting_here() -> _Nesting:
    # Not an assignment: a finaliser may complete a future in the middle of this, and create one.
    nesting: _Nesting = _this_thread.__dict__.setdefault("nesting", _Nesting())
    return nesting


def run(future: Any, outcome: Outcome, state: _State, callbacks: _Callbacks) -> None:
    """Run the callbacks that are still in ``state``, in order, or defer them.

    Raises:
        KeyboardInterrupt, SystemExit: A callback raised it. The others have run.
    """
    try:
        here = _this_thread.nesting
    except AttributeError:
        here = _nesting_here()
    depth = here.depth
    if depth >= MAX_DEPTH:
        here.deferred.append((future, outcome, state, callbacks))
        return
    interrupt: BaseException | None = None
    here.depth = depth + 1
    try:
        interrupt = _run_each(future, outcome, state, callbacks)
        if depth == 0 and here.deferred:
            interrupt = _run_deferred(here) or interrupt
    finally:
        here.depth = depth
    if interrupt is not None:
        raise interrupt


def run_all(due: Iterable[tuple[Any, Outcome, _State, _Callbacks]]) -> None:
    """Run the callbacks of many futures, also if one raises KeyboardInterrupt or SystemExit."""
    interrupt: BaseException | None = None
    for each in due:
        try:
            run(*each)
        except (KeyboardInterrupt, SystemExit) as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def run_now(future: Any, outcome: Outcome, state: _State, callback: DoneCallback) -> None:
    """Run one callback, at any depth, unless another thread has deleted it from ``state``."""
    interrupt = _run_each(future, outcome, state, [callback])
    if interrupt is not None:
        raise interrupt


def run_deferred() -> None:
    """Run the callbacks that completions in this thread have deferred.

    A thread that is about to block calls this: they may include the one that would wake it.
    """
    interrupt = _run_deferred(_nesting_here())
    if interrupt is not None:
        raise interrupt


def _run_deferred(here: _Nesting) -> BaseException | None:
    interrupt: BaseException | None = None
    while here.deferred:
        due = here.deferred[0]
        del here.deferred[0]
        try:
            interrupt = _run_until_done(due) or interrupt
        except BaseException:
            here.deferred += (due,)  # not append(): the stack may have no room for a call
            raise
    return interrupt


def _run_until_done(due: tuple[Any, Outcome, _State, _Callbacks]) -> BaseException | None:
    try:
        return _run_each(*due)
    except BaseException as interrupt:  # between callbacks: the rest are still in the state
        try:
            _run_each(*due)
        except BaseException:
            start_new_thread(_run_each, due)
        return interrupt


# A separate function: from Python 3.12 on, an interrupt at the jump that closes a loop may miss the
# ``finally`` around it.
def _run_each(
    future: Any, outcome: Outcome, state: _State, callbacks: _Callbacks
) -> BaseException | None:
    """Run the callbacks; return the KeyboardInterrupt or SystemExit that one raised, or None."""
    interrupt: BaseException | None = None
    for callback in callbacks:
        try:
            del state[callback]
        except KeyError:
            continue  # another thread runs it, or it was removed
        # After the `del` this thread has to run the callback. No interrupt can come between it and
        # the `try`: CPython checks for signals at calls, functions' entries and backward jumps.
        try:
            if outcome.readiness is None or not callback.uses_streams:
                callback.run(future)
            else:
                # On dedicated streams that are ordered after the kernels.
                outcome.readiness.run(partial(callback.run, future))
        except BaseException as error:
            try:
                interrupt = _fail(future, callback, error) or interrupt
            except BaseException as second:
                # The stack may be full; a new thread has its own.
                try:
                    start_new_thread(callback.fail, (future, error))
                except BaseException:
                    # No call is possible, so `fail` has not begun. The repetition runs it.
                    state[callback] = CALLBACK
                    raise
                for one in (error, second):
                    if issubclass(type(one), (KeyboardInterrupt, SystemExit)):
                        interrupt = one
    return interrupt


def _fail(future: Any, callback: DoneCallback, error: BaseException) -> BaseException | None:
    callback.fail(future, error)
    if issubclass(type(error), (KeyboardInterrupt, SystemExit)):
        return error
    _logger.error(
        "Got the following error when running the callback %s of %r:",
        callback.name,
        future,
        exc_info=error,
    )
    return None

"""Running the callbacks of a future that has completed.

A callback may complete further futures, whose callbacks complete others: a chain. Run naively,
each link is a few stack frames deeper, and a chain of ten thousand ends the process. So
completions nest up to `MAX_DEPTH` in a thread, as ``torch.futures`` nests them; a future that
completes any deeper is put off, and the outermost completion of that thread runs its callbacks
before it returns.

A thread that is about to block may itself owe the callbacks that would wake it: `run_deferred`
lets it pay first.

CPython checks for signals after calls, on entry of functions and on backward jumps. From the
statement that deletes a callback, which makes it ours to run, to the ``try`` that sees to it,
there is none of these.
"""

from __future__ import annotations

import logging
import threading
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

from ._outcome import Outcome

MAX_DEPTH = 32

CALLBACK: Final = "callback"  # what a callback is stored with in the state of its future

_logger = logging.getLogger("torchfut_aio")

_State = dict[Any, Any]
_Followers = Sequence[Any]  # waiters, and the key of the outcome, are among them


class DoneCallback:
    """What runs when a future completes; the base of each kind."""

    __slots__ = ()  # and no abstract methods: isinstance() would take ten times as long

    run: Callable[[Any], object]
    """Called with the future, once that has completed."""

    def fail(self, future: Any, error: BaseException, /) -> None:
        """Called if ``error`` aborted `run`, possibly before its first line.

        Whatever depends on this callback and is not complete must be completed with the error.
        """


class FunctionCallback(DoneCallback):
    """A function that was given to ``add_done_callback``."""

    __slots__ = ("run",)

    def __init__(self, function: Callable[[Any], object]) -> None:
        self.run = function

    def fail(self, future: Any, error: BaseException) -> None:
        """Does nothing: what the function began is the business of who wrote it."""


class _Nesting:
    """How deep completions nest in one thread, and the futures whose callbacks they put off."""

    __slots__ = ("deferred", "depth")

    def __init__(self) -> None:
        self.depth = 0
        self.deferred: deque[tuple[Any, Outcome, _State, _Followers]] = deque()


class _ThisThread(threading.local):
    def __init__(self) -> None:
        self.nesting = _Nesting()


_this_thread = _ThisThread()


def run(future: Any, outcome: Outcome, state: _State, followers: _Followers) -> None:
    """Runs those callbacks among ``followers`` that are still in ``state``, in order.

    Or puts them off, if nested too deep.

    Raises:
        KeyboardInterrupt, SystemExit: A callback raised it, after the others were run.
    """
    here = _this_thread.nesting
    depth = here.depth
    if depth >= MAX_DEPTH:
        here.deferred.append((future, outcome, state, followers))
        return
    interrupt: BaseException | None = None
    here.depth = depth + 1
    try:
        interrupt = _run_each(future, outcome, state, followers)
        if depth == 0 and here.deferred:
            interrupt = _run_deferred(here) or interrupt
    finally:
        here.depth = depth
    if interrupt is not None:
        raise interrupt


def run_all(due: Iterable[tuple[Any, Outcome, _State, _Followers]]) -> None:
    """As `run`, for many futures; one that raises does not keep the others from running theirs."""
    interrupt: BaseException | None = None
    for each in due:
        try:
            run(*each)
        except (KeyboardInterrupt, SystemExit) as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def run_now(future: Any, outcome: Outcome, state: _State, callback: DoneCallback) -> None:
    """Runs one callback, however deep, unless another thread has taken it out of ``state``."""
    interrupt = _run_each(future, outcome, state, [callback])
    if interrupt is not None:
        raise interrupt


def run_deferred() -> None:
    """Runs what the completions under way in this thread have put off."""
    interrupt = _run_deferred(_this_thread.nesting)
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
            here.deferred += (due,)  # not one call is possible here
            raise
    return interrupt


def _run_until_done(due: tuple[Any, Outcome, _State, _Followers]) -> BaseException | None:
    try:
        return _run_each(*due)
    except BaseException as struck:  # somewhere in between: what is left is still in the state
        try:
            _run_each(*due)
        except BaseException:
            start_new_thread(_run_each, due)
        return struck


# A function of its own: from Python 3.12 on, an interrupt at the jump that closes a loop may
# miss the ``finally`` around it.
def _run_each(
    future: Any, outcome: Outcome, state: _State, followers: _Followers
) -> BaseException | None:
    """As `run`; returns what is to be raised."""
    interrupt: BaseException | None = None
    for callback in followers:
        try:
            del state[callback]
        except KeyError:
            continue  # another thread runs it, or it was removed
        try:
            if outcome.readiness is None:
                callback.run(future)
            else:
                # On dedicated streams that are ordered after the kernels.
                outcome.readiness.run(partial(callback.run, future))
        except BaseException as error:
            try:
                interrupt = _fail(future, callback, error) or interrupt
            except BaseException as struck:
                # As where the stack is full: a new thread has one of its own.
                try:
                    start_new_thread(callback.fail, (future, error))
                except BaseException:
                    # Not one call is possible, so it has not begun. Whoever serves again runs it.
                    state[callback] = CALLBACK
                    raise
                for one in (error, struck):
                    if isinstance(one, (KeyboardInterrupt, SystemExit)):
                        interrupt = one
    return interrupt


def _fail(future: Any, callback: DoneCallback, error: BaseException) -> BaseException | None:
    callback.fail(future, error)
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return error
    _logger.error(
        "Got the following error when running the callback %r of %r:",
        callback.run,
        future,
        exc_info=error,
    )
    return None

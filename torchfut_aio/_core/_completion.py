"""The state of a future: its followers and its outcome. It is changed here.

Two changes are in ``_future.py``: `Future` makes the state, and a wait that ends deletes its own
waiter. It does so by a statement, as Ctrl-C may strike a call before that has begun.

The state is one dict. Each step below is one operation on it that no other thread can divide.

1. A *follower* is a key of the dict: a waiter, stored with the waker that wakes it, or a
   `DoneCallback`, stored with ``CALLBACK``. A completion wakes the waiters and runs the
   callbacks. A thread deletes a callback before it runs it, so no callback runs twice.
   ``IGNORED`` is a third kind of key, with the value None: nobody is told of it, but if the
   future fails, its error counts as retrieved.
2. The outcome is stored under the key ``OUTCOME``, by ``dict.setdefault``. If several threads
   try, the dict keeps the first outcome, and the thread that finds its own there has won. So one
   step both claims the future and publishes the outcome. Neither changes again.
3. A follower is stored first; then its thread checks whether there is an outcome. A completion
   stores the outcome first, then lists the followers. So at least one of the two sees the other:
   a follower may be served twice, never zero times. (Waking a waiter twice does nothing.)
4. A completion serves the followers in three steps: it wakes the waiters, completes the C++
   future, and runs the callbacks. Each step can be repeated. If an exception interrupts them,
   such as KeyboardInterrupt or MemoryError, the completion repeats them all, then raises the
   exception. If the repetition fails, too, for instance on a full stack, a new thread serves.
   `complete_all` completes the C++ futures first, so that no awake loop competes for the GIL. A
   RuntimeError of a device without events is not raised.
5. There is no lock, so nothing here can deadlock. A signal handler, a finaliser or a C++ callback
   may use the same future in the middle of any step; it is no different from another thread.

Without a GIL, storing to a dict and listing it lock the dict; see also ``_cpython.py``.
"""

from __future__ import annotations

from _thread import start_new_thread
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Final, NoReturn, TypeVar

import torch

from .._devices import says_no_events
from .._errors import CANCELLATIONS, InvalidStateError
from .._loops import Waker
from . import _callbacks
from ._callbacks import CALLBACK, DoneCallback
from ._outcome import Outcome, joined_outcome, outcome_of_error, outcome_of_value
from ._torch_future import complete_in_torch, set_value_in_torch

T = TypeVar("T")

OUTCOME: Final = "outcome"
IGNORED: Final = "ignored"  # stored by `ignore_error`

_GONE: Any = object()


class Completable(torch.futures.Future[T]):
    """A ``torch.futures.Future`` whose state is kept here; see the header of this file."""

    __slots__ = ("_devices", "_state")

    _devices: tuple[torch.device, ...]
    _state: dict[Any, Any]


def devices_of(future: Completable[Any]) -> tuple[torch.device, ...]:
    """Returns the devices that were declared for the future."""
    return future._devices


def outcome_of(future: Completable[Any]) -> Outcome | None:
    """Returns the outcome of a future that is done, or None."""
    return future._state.get(OUTCOME)


def complete(future: Completable[Any], outcome: Outcome) -> None:
    """Completes a pending future, and serves its followers.

    Raises:
        InvalidStateError: It is done already.
    """
    state = future._state
    try:
        won = _claim_and_serve(future, outcome, state)
    except BaseException as error:
        # This thread may have won before it was interrupted.
        if OUTCOME in state and state[OUTCOME] is outcome:
            try:
                _serve_again(future, outcome, state)
            except BaseException:
                # This call fits on the stack: the exception came from a deeper one.
                start_new_thread(_serve_in_thread, (future, outcome, state))
            # Without events, C++ raises after completing its future. That is no failure.
            if says_no_events(error):
                return
        raise
    if not won:
        # The caller still has this error: do not log it as unretrieved.
        outcome.exception()
        _refuse_second(future)


def _claim_and_serve(future: Completable[Any], outcome: Outcome, state: dict[Any, Any]) -> bool:
    """Tells whether the future has this outcome; if so, its followers have been served."""
    if state.setdefault(OUTCOME, outcome) is not outcome:
        return False
    # A follower that is stored from here on sees the outcome: stores are in one order.
    callbacks = _wake_waiters(state) if len(state) > 1 else ()
    if outcome.error is None:
        set_value_in_torch(future, outcome.value)
    else:
        if IGNORED in state:
            outcome.exception()
        complete_in_torch(future, outcome)
    if callbacks:
        _callbacks.run(future, outcome, state, callbacks)
    return True


def complete_all(
    futures: Sequence[Completable[Any]], outcomes: Sequence[Outcome]
) -> list[Completable[Any]]:
    """As `complete`, for many, with one wake-up a loop; returns those that were done already."""
    waiters: dict[Waker, list[Any]] = {}
    try:
        return _complete_all(futures, outcomes, waiters)
    except BaseException as error:
        try:
            refused = _complete_all(futures, outcomes, waiters, again=True)
        except BaseException:
            start_new_thread(_complete_all, (futures, outcomes, waiters, True))
        else:
            if says_no_events(error):
                return refused
        raise


def _complete_all(
    futures: Sequence[Completable[Any]],
    outcomes: Sequence[Outcome],
    waiters: dict[Waker, list[Any]],
    again: bool = False,
) -> list[Completable[Any]]:
    refused, due = [], []
    for future, outcome in zip(futures, outcomes, strict=True):
        state = future._state
        if state.setdefault(OUTCOME, outcome) is outcome:
            if IGNORED in state:
                outcome.exception()
            if again or outcome.error is not None:
                complete_in_torch(future, outcome)
            else:
                set_value_in_torch(future, outcome.value)
            callbacks = _take_waiters(state, waiters)
            if callbacks:
                due.append((future, outcome, state, callbacks))
        else:
            outcome.exception()  # as in `complete`
            refused.append(future)
    # C++ let go of the GIL for each of them: now that a loop wakes up, nobody fights for it.
    for waker, of_waker in waiters.items():
        waker.wake_all(of_waker)
    _callbacks.run_all(due)
    return refused


def complete_with_value(future: Completable[Any], value: object) -> None:
    """As `complete`, with the outcome that ``value`` has here and now."""
    complete(future, outcome_of_value(value, future._devices))


def complete_with_parts(
    future: Completable[Any], value: object, parts: Iterable[Completable[Any]]
) -> None:
    """As `complete`, with a value made of the values of other futures, which are done.

    The value is ready when theirs are.
    """
    outcomes = [part._state[OUTCOME] for part in parts]
    complete(future, joined_outcome(value, outcomes))


def complete_with_error(future: Completable[Any], error: BaseException) -> None:
    """As `complete`, with an error."""
    complete(future, outcome_of_error(error, future._devices))


def try_complete_with_value(future: Completable[Any], value: object) -> bool:
    """As `complete_with_value`; returns False if the future is done already."""
    if OUTCOME in future._state:
        return False
    try:
        complete_with_value(future, value)
    except InvalidStateError:  # another thread was faster
        return False
    return True


def try_complete_with_error(future: Completable[Any], error: BaseException) -> bool:
    """As `complete_with_error`; returns False if the future is done already."""
    if OUTCOME in future._state:
        return False
    try:
        complete_with_error(future, error)
    except InvalidStateError:  # another thread was faster
        return False
    return True


def complete_as(future: Completable[Any], source: Completable[Any]) -> None:
    """As `complete`, with the very outcome of another future, which is done.

    So an error that somebody retrieves from one of them is retrieved from both.
    """
    complete(future, source._state[OUTCOME])


def _wake_waiters(state: dict[Any, Any]) -> list[DoneCallback]:
    """Wakes the waiters of a future that is done; returns its callbacks."""
    callbacks = []
    for follower in [*state]:
        if follower is OUTCOME:
            continue
        waker = state.get(follower)  # None if somebody has removed the follower meanwhile
        if waker is CALLBACK:
            callbacks.append(follower)
        elif waker is not None:
            waker.wake(follower)
            state.pop(follower, None)  # a future that is done keeps no waiter, nor its loop
    return callbacks


def _take_waiters(state: dict[Any, Any], waiters: dict[Waker, list[Any]]) -> list[DoneCallback]:
    """Moves the waiters of a future that is done to ``waiters``; returns its callbacks."""
    callbacks = []
    for follower in [*state]:
        if follower is OUTCOME:
            continue
        waker = state.get(follower)
        if waker is CALLBACK:
            callbacks.append(follower)
        elif waker is not None:
            if waker not in waiters:
                waiters[waker] = []
            waiters[waker].append(follower)
            state.pop(follower, None)
    return callbacks


def _serve_again(future: Completable[Any], outcome: Outcome, state: dict[Any, Any]) -> None:
    callbacks = _wake_waiters(state)
    complete_in_torch(future, outcome)
    _callbacks.run(future, outcome, state, callbacks)  # also what this thread has put off


def _serve_in_thread(future: Completable[Any], outcome: Outcome, state: dict[Any, Any]) -> None:
    with suppress(KeyboardInterrupt, SystemExit):  # of a callback; this thread has no caller
        _serve_again(future, outcome, state)


def add_waiter(future: Completable[Any], waiter: object, waker: Waker) -> bool:
    """Has ``waker.wake(waiter)`` called when the future completes.

    Returns:
        False if the future is done. The waiter is removed then, and may have been woken.
    """
    state = future._state
    state[waiter] = waker
    if OUTCOME not in state:
        return True
    state.pop(waiter, None)
    return False


def add_callback(future: Completable[Any], callback: DoneCallback) -> None:
    """Has ``callback`` run when the future completes, or at once if it is done."""
    state = future._state
    state[callback] = CALLBACK
    outcome = state.get(OUTCOME)
    if outcome is not None:
        _callbacks.run_now(future, outcome, state, callback)


def remove(future: Completable[Any], follower: object) -> bool:
    """Removes a follower; returns False if it was not there.

    A callback is no longer there if it has run, or is about to.
    """
    return future._state.pop(follower, _GONE) is not _GONE


def followers(future: Completable[Any]) -> tuple[list[object], list[DoneCallback]]:
    """Returns the waiters and the callbacks of the future, as of now."""
    all_of_them = [f for f in [*future._state] if f is not OUTCOME and f is not IGNORED]
    callbacks = [f for f in all_of_them if isinstance(f, DoneCallback)]
    return [f for f in all_of_them if not isinstance(f, DoneCallback)], callbacks


def waiters_of(future: Completable[Any]) -> list[tuple[Any, Waker]]:
    """Returns the waiters of the future, as of now, each with what wakes it."""
    wakers = [(waiter, future._state.get(waiter)) for waiter in followers(future)[0]]
    return [(waiter, waker) for waiter, waker in wakers if waker is not None]


def ignore_error(future: Completable[Any]) -> None:
    """Has nothing logged if the future fails, or has, and nobody retrieves the error.

    For whoever has reported another error already, and expects more.
    """
    state = future._state
    state[IGNORED] = None
    outcome = state.get(OUTCOME)
    if outcome is not None:
        outcome.exception()


def has_failed(future: Completable[Any]) -> bool:
    """Tells whether the future has failed. Does not count as retrieving its error."""
    outcome = future._state.get(OUTCOME)
    return outcome is not None and outcome.error is not None


def is_cancelled(future: Completable[Any]) -> bool:
    """Tells whether the future has failed with a cancellation."""
    outcome = future._state.get(OUTCOME)
    return outcome is not None and issubclass(type(outcome.error), CANCELLATIONS)


def is_followed(future: Completable[Any]) -> bool:
    """Tells whether the future is pending and somebody follows it."""
    state = future._state
    # In this order: a completion stores the outcome before it deletes a follower.
    return any(each is not IGNORED for each in [*state]) and OUTCOME not in state


def _refuse_second(future: Completable[Any]) -> NoReturn:
    raise InvalidStateError(
        "Attempting to mark a completed Future as complete again. Note that a Future can "
        f"only be marked completed once: {future!r} keeps its outcome"
    ) from None

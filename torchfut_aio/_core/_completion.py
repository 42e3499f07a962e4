"""The state of a future: who follows it, and its outcome. Every change of state is here.

All of it is one dict, in which each step is one operation that no other thread can divide:

1. A *follower* is a waiter, stored with its waker, which the completion has wake it; or a
   `DoneCallback`, stored with ``CALLBACK``, which the completion runs. It follows from when it
   is stored until somebody deletes it. Whoever deletes a callback runs it, so none runs twice.
2. The future is done from when its outcome is stored under the key ``OUTCOME``. It is stored by
   ``dict.setdefault``: of any number that try, the one whose outcome is found there has won.
   That claims the future and publishes the outcome at once, and neither ever changes.
3. Who follows stores itself, then looks whether there is an outcome. Who completes stores the
   outcome, then lists the followers. So one of them sees the other, or both do: a follower may
   be served twice, never not at all. (To wake a waiter twice does nothing.)
4. A completion serves: it wakes all waiters, completes the C++ future, runs all callbacks. Each
   step can be repeated. If an exception strikes in between, such as KeyboardInterrupt or
   MemoryError, the completion serves once more, then raises it; if that fails too, as where the
   stack is full, a new thread serves.
5. No lock is taken, so nothing here can deadlock with a signal handler, a finaliser or a C++
   callback that uses the same future in the middle of a step: each is as good as one more
   thread.

Where there is no GIL, storing to a dict and listing it lock it; see also ``_cpython.py``.
"""

from __future__ import annotations

from _thread import start_new_thread
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Final, NoReturn, TypeVar

import torch

from .._devices import HOST_ONLY
from .._errors import InvalidStateError
from .._loops import Waker
from . import _callbacks
from ._callbacks import CALLBACK, DoneCallback
from ._outcome import Outcome, joined_outcome, outcome_of_error, outcome_of_value
from ._torch_future import complete_in_torch, set_value_in_torch

T = TypeVar("T")

OUTCOME: Final = "outcome"

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
    """Completes a pending future, and serves all who follow it.

    Raises:
        InvalidStateError: It is done already.
    """
    state = future._state
    try:
        if state.setdefault(OUTCOME, outcome) is outcome:
            # Whoever follows from here on sees the outcome: all stores to a dict are in one order.
            callbacks = _wake_waiters(state) if len(state) > 1 else ()
            if outcome.error is None:
                set_value_in_torch(future, outcome.value)
            else:
                complete_in_torch(future, outcome)
            if callbacks:
                _callbacks.run(future, outcome, state, callbacks)
            return
    except BaseException:
        # Statements, where a call might find no stack left.
        if OUTCOME in state and state[OUTCOME] is outcome:  # struck after it had won
            try:
                _serve_again(future, outcome, state)
            except BaseException:
                start_new_thread(_serve_in_thread, (future, outcome, state))
        raise
    outcome.exception()  # which the caller still has
    _refuse_second(future)


def complete_all(
    futures: Sequence[Completable[Any]], outcomes: Sequence[Outcome]
) -> list[Completable[Any]]:
    """Completes each future with its outcome; returns those that were done already."""
    waiters: dict[Waker, list[Any]] = {}
    try:
        return _complete_all(futures, outcomes, waiters)
    except BaseException:
        try:
            _complete_all(futures, outcomes, waiters, again=True)
        except BaseException:
            start_new_thread(_complete_all, (futures, outcomes, waiters, True))
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
            if again or outcome.error is not None:
                complete_in_torch(future, outcome)
            else:
                set_value_in_torch(future, outcome.value)
            callbacks = _take_waiters(state, waiters)
            if callbacks:
                due.append((future, outcome, state, callbacks))
        else:
            outcome.exception()  # which the caller still has
            refused.append(future)
    # C++ let go of the GIL for each of them: now that a loop wakes up, nobody fights for it.
    for waker, of_waker in waiters.items():
        waker.wake_all(of_waker)
    _callbacks.run_all(due)
    return refused


def complete_with_value(future: Completable[Any], value: object) -> None:
    """As `complete`, with the outcome that ``value`` has here and now."""
    if future._devices or type(value) not in HOST_ONLY:
        outcome = outcome_of_value(value, future._devices)
    else:  # as nearly always, so without a call
        outcome = Outcome()
        outcome.value = value
    complete(future, outcome)


def complete_with_parts(
    future: Completable[Any], value: object, parts: Iterable[Completable[Any]]
) -> None:
    """As `complete`, with a value made of those of other futures, which are done.

    It is ready when theirs are.
    """
    outcomes = [part._state[OUTCOME] for part in parts]
    complete(future, joined_outcome(value, outcomes))


def complete_with_error(future: Completable[Any], error: BaseException) -> None:
    """As `complete`, with an error."""
    complete(future, outcome_of_error(error, future._devices))


def _wake_waiters(state: dict[Any, Any]) -> list[DoneCallback]:
    """Wakes the waiters that follow a future, which is done; returns the callbacks."""
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
    """Moves the waiters that follow a future to ``waiters``; returns the callbacks."""
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
    with suppress(KeyboardInterrupt, SystemExit):  # nobody is above to take what a callback raises
        _serve_again(future, outcome, state)


def add_waiter(future: Completable[Any], waiter: object, waker: Waker) -> bool:
    """Has ``waker.wake(waiter)`` called when the future completes.

    Returns:
        False if the future is done. The waiter follows no more then, and may have been woken.
    """
    state = future._state
    state[waiter] = waker
    if OUTCOME not in state:
        return True
    state.pop(waiter, None)
    return False


def add_callback(future: Completable[Any], callback: DoneCallback) -> None:
    """Has ``callback`` run when the future completes; here and now, if it is done."""
    state = future._state
    state[callback] = CALLBACK
    outcome = state.get(OUTCOME)
    if outcome is not None:
        _callbacks.run_now(future, outcome, state, callback)


def remove(future: Completable[Any], follower: object) -> bool:
    """Removes a follower; returns False if it follows no more.

    That is: if a callback has been run, or is about to be.
    """
    return future._state.pop(follower, _GONE) is not _GONE


def followers(future: Completable[Any]) -> tuple[list[object], list[DoneCallback]]:
    """Returns the waiters and the callbacks that follow the future now."""
    all_of_them = [follower for follower in [*future._state] if follower is not OUTCOME]
    callbacks = [follower for follower in all_of_them if isinstance(follower, DoneCallback)]
    return [follower for follower in all_of_them if follower not in callbacks], callbacks


def _refuse_second(future: Completable[Any]) -> NoReturn:
    raise InvalidStateError(
        "Attempting to mark a completed Future as complete again. Note that a Future can "
        f"only be marked completed once: {future!r} keeps its outcome"
    ) from None

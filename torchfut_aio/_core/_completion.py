"""The state of a future: its waiters, its callbacks and its outcome. It is changed here.

Two changes are in ``_future.py``: `Future` makes the state, and a wait adds its waiter and removes
it, in statements without a call, as an interrupt can come when a call begins.

The state is one dict. Each access to it below is one operation that no other thread can divide.

1. A waiter is a key, stored with the waker that wakes it. A callback is a key, stored with
   ``CALLBACK``. A thread deletes a callback before it runs it, so no callback runs twice.
2. The outcome is stored under the key ``OUTCOME``, by ``dict.setdefault``. If several threads
   try, the dict keeps the first outcome, and the thread that finds its own there has won. So one
   step both claims the future and publishes the outcome. Neither changes again.
3. A waiter or callback is stored first; then its thread checks whether there is an outcome. A
   completion stores the outcome first, then lists the others. So at least one of the two sees the
   other. (Waking a waiter twice does nothing.)
4. A completion wakes the waiters, completes the C++ future, and runs the callbacks. Each of the
   three can be repeated. An exception that interrupts them is raised after the repetition.
5. There is no lock, so nothing here can deadlock. A signal handler, a finaliser or a C++ callback
   may use the same future in the middle of any step, as another thread may.

Without a GIL, storing to a dict and listing it lock the dict; see also ``_cpython.py``.
"""

from __future__ import annotations

from _thread import start_new_thread
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch

from .._devices import says_no_events
from .._errors import CANCELLATIONS, InvalidStateError
from .._extension import speedup
from .._loops import Waker
from .._threads import call_contained
from . import _callbacks
from ._callbacks import CALLBACK, DoneCallback
from ._outcome import Outcome, joined_outcome, outcome_of_error, outcome_of_value
from ._torch_future import complete_in_torch, set_value_in_torch

if TYPE_CHECKING:
    from .._future import Future

OUTCOME: Final = "outcome"
IGNORED: Final = "ignored"  # a key, with the value None: if the future fails, nothing is logged

_ABSENT: Any = object()


def devices_of(future: Future[Any]) -> tuple[torch.device, ...]:
    return future._devices


def outcome_of(future: Future[Any]) -> Outcome | None:
    """Return the outcome of a future that is done, or None."""
    return future._state.get(OUTCOME)


# ------------------------------------------------------------------------- completing


@speedup
def try_complete(future: Future[Any], outcome: Outcome) -> bool:
    """Complete a future; return False if it is done already."""
    state = future._state
    try:
        callbacks = _claim(state, outcome)
        if callbacks is None:
            outcome.mark_retrieved()  # the caller still has the error
            return False
        # *After* waking the waiters: C++ runs the callbacks of its own consumers within this call.
        if outcome.error is None:
            set_value_in_torch(future, outcome.value)
        else:
            if IGNORED in state:
                outcome.mark_retrieved()
            complete_in_torch(future, outcome)
        if callbacks:
            _callbacks.run(future, outcome, state, callbacks)
    except BaseException as error:
        # Had this thread claimed the future? (No call, as the stack may have no room for one.)
        if OUTCOME in state and state[OUTCOME] is outcome:
            args = (future,), (outcome,), None, True
            try:
                _complete_all(*args)
            except BaseException:
                # The stack is full, and other threads wait. This call has room, as `_claim`, which
                # is deeper, had room. (So it must not be in a function of its own.)
                start_new_thread(call_contained, (_complete_all, *args))
            # Without events, C++ raises after completing its future. That is no failure.
            if says_no_events(error):
                return True
        raise
    return True


def refuse_second(future: Future[Any]) -> NoReturn:
    raise InvalidStateError(
        "Attempting to mark a completed Future as complete again. Note that a Future can "
        f"only be marked completed once: {future!r} keeps its outcome"
    )


def _claim(
    state: dict[Any, Any], outcome: Outcome, waiters: dict[Waker, list[Any]] | None = None
) -> Sequence[DoneCallback] | None:
    """Claim a future for ``outcome``, and wake its waiters or move them to ``waiters``.

    May be repeated.

    Returns:
        The callbacks of the future, or None if it has another outcome.
    """
    if state.setdefault(OUTCOME, outcome) is not outcome:
        return None
    # A thread that stores a waiter from here on finds the outcome: stores are in one order.
    if len(state) == 1:
        return ()
    callbacks = []
    for key in [*state]:
        if key is OUTCOME:
            continue
        waker = state.get(key)  # None if another thread has removed it
        if waker is CALLBACK:
            callbacks.append(key)
        elif waker is not None:
            if waiters is None:
                waker.wake(key)
            else:
                waiters.setdefault(waker, []).append(key)
            # *After* that: an interrupt in between wakes it twice, and loses no waiter. A future
            # that is done keeps no waiter, nor its loop.
            state.pop(key, None)
    return callbacks


def complete_all(futures: Sequence[Future[Any]], outcomes: Sequence[Outcome]) -> list[Future[Any]]:
    """Complete many, with one wake-up for each loop; return those that were done already."""
    waiters: dict[Waker, list[Any]] = {}
    try:
        return _complete_all(futures, outcomes, waiters)
    except BaseException as error:
        try:
            refused = _complete_all(futures, outcomes, waiters, again=True)
        except BaseException:
            args = _complete_all, futures, outcomes, waiters, True
            start_new_thread(call_contained, args)
        else:
            if says_no_events(error):
                return refused
        raise


@speedup
def _complete_all(
    futures: Sequence[Future[Any]],
    outcomes: Sequence[Outcome],
    waiters: dict[Waker, list[Any]] | None,
    again: bool = False,
) -> list[Future[Any]]:
    refused, due = [], []
    for future, outcome in zip(futures, outcomes, strict=True):
        state = future._state
        callbacks = _claim(state, outcome, waiters)
        if callbacks is None:
            outcome.mark_retrieved()  # as in `try_complete`
            refused.append(future)
            continue
        if IGNORED in state:
            outcome.mark_retrieved()
        if again or outcome.error is not None:
            complete_in_torch(future, outcome)
        else:
            set_value_in_torch(future, outcome.value)
        if callbacks or again:  # again, for callbacks that this thread had deferred
            due.append((future, outcome, state, callbacks))
    # Loops are woken only now: one that is awake would take the GIL at each release by C++.
    for waker, of_waker in (waiters or {}).items():
        waker.wake_all(of_waker)
    if due:
        _callbacks.run_all(due)
    return refused


# ----------------------------------------- completing with a value, an error, an outcome
# Each returns False if the future is done already.


def try_complete_with_value(future: Future[Any], value: object) -> bool:
    """Complete a future with the outcome that ``value`` has here and now."""
    # First the check: making an outcome may record events.
    return OUTCOME not in future._state and try_complete(
        future, outcome_of_value(value, future._devices)
    )


def try_complete_with_error(future: Future[Any], error: BaseException) -> bool:
    return OUTCOME not in future._state and try_complete(
        future, outcome_of_error(error, future._devices)
    )


def try_complete_with_parts(
    future: Future[Any], value: object, parts: Iterable[Future[Any]]
) -> bool:
    """Complete a future with a value made of those of others; it is ready when theirs are."""
    outcomes = [part._state[OUTCOME] for part in parts]
    return try_complete(future, joined_outcome(value, outcomes))


def try_complete_as(future: Future[Any], source: Future[Any]) -> bool:
    """Complete a future with the very outcome of another, which is done.

    So an error that is retrieved from one of them is retrieved from both.
    """
    return try_complete(future, source._state[OUTCOME])


# ------------------------------------------------------------- waiters and callbacks


def add_waiter(future: Future[Any], waiter: object, waker: Waker) -> bool:
    """Call ``waker.wake(waiter)`` when the future completes.

    Returns:
        False if the future is done. The waiter is removed then, and may have been woken.
    """
    state = future._state
    state[waiter] = waker
    if OUTCOME not in state:
        return True
    state.pop(waiter, None)
    return False


def add_callback(future: Future[Any], callback: DoneCallback) -> None:
    """Run ``callback`` when the future completes, or at once if it is done."""
    state = future._state
    state[callback] = CALLBACK  # *before* reading the outcome: rule 3
    outcome = state.get(OUTCOME)
    if outcome is not None:
        _callbacks.run_now(future, outcome, state, callback)


def remove(future: Future[Any], key: object) -> bool:
    """Remove a waiter or a callback; return False if it was not there.

    A callback is no longer there if it has run, or is about to.
    """
    return future._state.pop(key, _ABSENT) is not _ABSENT


def waiters_of(future: Future[Any]) -> list[tuple[Any, Waker]]:
    """Return the waiters of the future, as of now, each with its waker."""
    found = [(key, future._state.get(key)) for key in [*future._state] if key is not OUTCOME]
    return [(key, waker) for key, waker in found if waker is not None and waker is not CALLBACK]


def callbacks_of(future: Future[Any]) -> list[DoneCallback]:
    return [key for key in [*future._state] if isinstance(key, DoneCallback)]


def has_waiters(future: Future[Any]) -> bool:
    """Return True if the future is pending and has a waiter or a callback."""
    state = future._state
    # In this order: a completion stores the outcome before it removes a waiter.
    return any(key is not IGNORED for key in [*state]) and OUTCOME not in state


# ---------------------------------------------------------------------------- errors


def ignore_error(future: Future[Any]) -> None:
    """Log nothing if the future fails, or has failed, and its error is never retrieved.

    For callers that have reported another error already.
    """
    state = future._state
    state[IGNORED] = None  # *before* reading the outcome, as a completion reads them in turn
    outcome = state.get(OUTCOME)
    if outcome is not None:
        outcome.mark_retrieved()


def has_failed(future: Future[Any]) -> bool:
    """Return True if the future has failed. This does not retrieve its error."""
    outcome = future._state.get(OUTCOME)
    return outcome is not None and outcome.error is not None


def is_cancelled(future: Future[Any]) -> bool:
    outcome = future._state.get(OUTCOME)
    return outcome is not None and issubclass(type(outcome.error), CANCELLATIONS)

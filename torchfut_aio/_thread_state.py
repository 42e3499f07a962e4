"""What torch keeps for each thread: modes, autocast, the current device and streams.

CPython looks for signals between instructions of Python, never within a call into C. So whatever
strikes, a state is restored as a whole, by two means:

- Grad mode, inference mode, and which kinds of autocast are enabled, are restored by guards of
  torch's own. A ``with`` statement leaves a guard that is written in C without a look at signals.
- What else there is has C functions that set it. One call makes all their calls: ``extend`` of a
  deque that keeps nothing, prepared before anything is changed.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch

from ._cpython import is_within
from ._devices import CurrentStreams
from ._pytorch import thread_state_functions

T = TypeVar("T")

_C: Any = thread_state_functions()

_call: Any = operator.methodcaller("__call__")

# Autocast's nesting can only be changed by one. Both return what it is then.
_DEEPER, _LESS_DEEP = _C.autocast_increment_nesting, _C.autocast_decrement_nesting
_DEEP = 100  # no nesting that is supported is deeper


class ThreadState:
    """The state of the thread that makes it."""

    __slots__ = ("_current", "_nesting", "inference", "keys", "values")

    _nesting: int

    def __init__(self) -> None:
        self.inference = torch.is_inference_mode_enabled()
        # Of dispatch keys: those of autocast are among them.
        self.keys = _C._dispatch_tls_local_include_set(), _C._dispatch_tls_local_exclude_set()
        accelerator = torch.accelerator.current_accelerator()
        settings = _settings(accelerator and accelerator.type)
        self.values = [(name, setter, getter()) for name, (getter, setter) in settings.items()]
        # Both calls in one instruction: no interrupt can come between them.
        _, self._nesting = map(_call, (_DEEPER, _LESS_DEEP))
        self._current = CurrentStreams()

    def restoring(self, seen: ThreadState | None = None) -> Callable[[], object]:
        """Returns what makes this the thread's state again, apart from the guards.

        It may be called where the state is ``seen``; anywhere, if that is None. If it raises, call
        it again, to do what it has not done.
        """
        calls: list[Callable[[], Any]] = [
            partial(setter, value) for _, setter, value in self.values
        ]
        if seen is None:
            # The nesting is unknown: raise it above any depth, then lower it until it is ours.
            calls += [_DEEPER] * (self._nesting + _DEEP)
            down = itertools.islice(iter(_LESS_DEEP, self._nesting), 10 * _DEEP)
            calls.append(_one_call(down))
        else:
            calls += [_DEEPER] * (self._nesting - seen._nesting)
            calls += [_LESS_DEEP] * (seen._nesting - self._nesting)
        if seen is None or self._nesting or seen._nesting:
            # What was cast in one state, perhaps without gradients, is not for the other.
            calls.append(_C.clear_autocast_cache)
        calls += self._current.restoring(None if seen is None else seen._current)
        return _one_call(map(_call, calls))

    def differences(self, other: ThreadState) -> list[str]:
        """Returns the names of what is not the same here as in ``other``."""
        if self.inference != other.inference:
            names = ["inference mode"]  # which sets most of the others
        else:
            pairs = zip(self.values, other.values, strict=False)
            names = [name for (name, _, mine), (_, _, theirs) in pairs if mine != theirs]
        return names + self._current.differences(other._current)


def _one_call(results: Iterator[object]) -> Callable[[], object]:
    """Returns what goes through ``results``, and keeps none, without running any Python code."""
    return partial(deque[object](maxlen=0).extend, results)


@functools.cache
def _settings(kind: str | None) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Returns how to get and to set each setting, by name; ``kind`` is the accelerator's."""
    settings: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "grad mode": (torch.is_grad_enabled, _C._set_grad_enabled),
        "forward-mode AD": (_C._is_fwd_grad_enabled, _C._set_fwd_grad_enabled),
        "multithreaded backward": (_C._is_multithreading_enabled, _C._set_multithreading_enabled),
        "cache of autocast": (
            _C.is_autocast_cache_enabled,
            _C.set_autocast_cache_enabled,
        ),
    }
    for each in ("cpu", kind):
        if each is not None:
            settings |= {
                f"autocast on {each}": (
                    partial(_C.is_autocast_enabled, each),
                    partial(_C.set_autocast_enabled, each),
                ),
                f"dtype of autocast on {each}": (
                    partial(_C.get_autocast_dtype, each),
                    partial(_C.set_autocast_dtype, each),
                ),
            }
    return settings


class OwnState:
    """A state for calls that are made bit by bit; it begins as that of the thread."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state: ThreadState | None = None

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Returns ``function(*args)``, called in this state; that of the thread stays as it is."""
        outside = ThreadState()
        own = self._state or outside
        enter, leave = own.restoring(outside), outside.restoring()
        with _C._InferenceMode(own.inference), _C._ForceDispatchKeyGuard(*own.keys):
            try:
                try:
                    enter()
                    return function(*args)
                finally:
                    self._state = own = ThreadState()
                    leave = outside.restoring(own)
            finally:
                try:
                    leave()
                except BaseException:
                    leave()
                    raise


def in_own_state() -> bool:
    """Tells whether an `OwnState` calls the caller."""
    return is_within(OwnState.call)

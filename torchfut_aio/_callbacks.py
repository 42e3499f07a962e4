"""Running the callbacks of a future that has completed.

A callback may complete further futures, whose callbacks complete others: a chain.
Run naively, each link is a few stack frames deeper, and a chain of ten thousand ends
the process. So completions nest up to `MAX_DEPTH` in a thread, as ``torch.futures``
nests them; callbacks that become due any deeper are put off, and the outermost
completion of that thread runs them before it returns.

A thread that is about to block may itself owe the callbacks that would wake it:
`run_deferred` lets it pay first.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._errors import callback_error

if TYPE_CHECKING:
    from ._future import Future

__all__ = ["Callback", "Continuation", "run", "run_deferred"]

MAX_DEPTH = 32

_logger = logging.getLogger("torchfut_aio")


class Callback:
    """What ``add_done_callback`` leaves with a pending future."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[Any], object]) -> None:
        self.function = function

    def run(self, future: Future[Any]) -> None:
        self.function(future)

    def interrupted(self, interrupt: BaseException) -> None:
        """Is told when Ctrl-C cut `run` short, perhaps before its first line."""


class Continuation(Callback):
    """What ``then`` leaves with a pending future: a callback whose result fills a child."""

    __slots__ = ("child",)

    def __init__(self, function: Callable[[Any], object], child: Future[Any]) -> None:
        self.function = function
        self.child = child

    def run(self, future: Future[Any]) -> None:
        try:
            result = self.function(future)
        except BaseException as error:
            # Less this frame, which would tie the error to the child that holds it.
            traceback = error.__traceback__
            error.__traceback__ = traceback and traceback.tb_next
            self.child.set_exception(callback_error(error))
        else:
            self.child.set_result(result)

    def interrupted(self, interrupt: BaseException) -> None:
        if not self.child.done():
            self.child.set_exception(interrupt)


class _Here(threading.local):
    """How deep completions nest in this thread, and what they put off."""

    def __init__(self) -> None:
        self.depth = 0
        self.deferred: deque[tuple[Future[Any], Callback]] = deque()


_here = _Here()


def run(future: Future[Any], due: deque[Callback], *, inline: bool = False) -> None:
    """Runs the callbacks that are ``due`` in this thread; puts off those nested too deep.

    Args:
        future: The future, which is done.
        due: What to run, in order; each is taken out once it was attempted, so that
            a caller whom Ctrl-C cut off may call again.
        inline: Run now, however deep: what the documentation promises for a callback
            that is added to a future that is already done.

    Raises:
        KeyboardInterrupt, SystemExit: A callback raised it; the others were run first.
    """
    here = _here
    if here.depth >= MAX_DEPTH and not inline:
        while due:
            here.deferred.append((future, due.popleft()))
        return
    interrupt: BaseException | None = None
    here.depth += 1
    try:
        while due:
            interrupt = _attempt(future, due[0]) or interrupt
            due.popleft()
        if here.depth == 1:
            interrupt = _run_deferred(here) or interrupt
    finally:
        here.depth -= 1
    if interrupt is not None:
        raise interrupt


def run_deferred() -> None:
    """Runs what the completions under way in this thread have put off."""
    interrupt = _run_deferred(_here)
    if interrupt is not None:
        raise interrupt


def _run_deferred(here: _Here) -> BaseException | None:
    interrupt: BaseException | None = None
    while here.deferred:
        interrupt = _attempt(*here.deferred.popleft()) or interrupt
    return interrupt


def _attempt(future: Future[Any], callback: Callback) -> BaseException | None:
    """Runs one callback; returns what must still reach the caller of ``set_result``."""
    try:
        return _call(future, callback)
    except BaseException as interrupt:  # it struck just before or after the callback
        callback.interrupted(interrupt)
        return interrupt


def _call(future: Future[Any], callback: Callback) -> BaseException | None:
    if not future._devices:
        return _guarded(future, callback)
    # The C++ future runs it on dedicated streams, ordered after the value's kernels.
    # An exception cannot cross C++ as itself, so it is carried around.
    outcome: list[BaseException | None] = []
    future._run_on_streams(lambda: outcome.append(_guarded(future, callback)))
    return outcome.pop()


def _guarded(future: Future[Any], callback: Callback) -> BaseException | None:
    try:
        callback.run(future)
    except (KeyboardInterrupt, SystemExit) as interrupt:
        callback.interrupted(interrupt)
        return interrupt
    except BaseException:
        _logger.exception(
            "Got the following error when running the callback %r of %r:",
            callback.function,
            future,
        )
    return None

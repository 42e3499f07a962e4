"""Running the callbacks of a future that has completed.

A callback may complete further futures, whose callbacks complete others: a chain.
Run naively, each link is a few stack frames deeper, and a chain of ten thousand ends
the process. So completions nest up to `MAX_DEPTH` in a thread, as ``torch.futures``
nests them; callbacks that become due any deeper are put off, and the outermost
completion of that thread runs them before it returns.

A thread that is about to block may itself owe the callbacks that would wake it:
`run_deferred` lets it pay first.

Ctrl-C may strike anywhere. What is due stays in its queue until the very instruction
before it is called, so that who is cut off before that can simply start again.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ._errors import callback_error, less_innermost_frame

if TYPE_CHECKING:
    from ._future import Future

__all__ = ["Callback", "Continuation", "Entry", "run", "run_deferred"]

MAX_DEPTH = 32

_logger = logging.getLogger("torchfut_aio")


class Entry(ABC):
    """What is left with a pending future, to be run when it completes."""

    __slots__ = ()

    wake: Final = None
    """Tells it from those who wait."""

    @abstractmethod
    def run(self, future: Any, /) -> object:
        """Does what is to be done now that ``future`` has completed."""

    @abstractmethod
    def interrupted(self, future: Future[Any], interrupt: BaseException) -> None:
        """Is told when Ctrl-C cut `run` short, perhaps before its first line."""


class Callback(Entry):
    """What ``add_done_callback`` leaves: the callback itself."""

    __slots__ = ("run",)

    run: Callable[[Any], object]

    def __init__(self, function: Callable[[Any], object]) -> None:
        self.run = function

    def interrupted(self, future: Future[Any], interrupt: BaseException) -> None:
        """Does nothing: what a callback began is the business of who wrote it."""


class Continuation(Entry):
    """What ``then`` leaves: a callback whose result fills a child."""

    __slots__ = ("child", "function")

    def __init__(self, function: Callable[[Any], object], child: Future[Any]) -> None:
        self.function = function
        self.child = child

    def run(self, future: Future[Any]) -> None:
        """Fills the child with what the callback returns or raises."""
        try:
            result = self.function(future)
        except BaseException as error:
            if error is future._error:
                # Passed on: every link of a chain would add its frames, and keep them.
                error.with_traceback(future._traceback)
            else:
                less_innermost_frame(error)
            self.child.set_exception(callback_error(error))
        else:
            self.child.set_result(result)

    def interrupted(self, _future: Future[Any], interrupt: BaseException) -> None:
        """Fails the child, on which somebody may wait."""
        if not self.child.done():
            self.child.set_exception(interrupt)


class _Nesting:
    """How deep completions nest in one thread, and what they put off."""

    __slots__ = ("deferred", "depth")

    def __init__(self) -> None:
        self.depth = 0
        self.deferred: deque[tuple[Future[Any], Any, dict[Any, None]]] = deque()


class _ThisThread(threading.local):
    def __init__(self) -> None:
        self.nesting = _Nesting()


_this_thread = _ThisThread()


def run(future: Future[Any], first: Any, others: dict[Any, None], *, inline: bool = False) -> None:
    """Runs the callbacks among those who entered; puts off what is nested too deep.

    Args:
        future: The future, which is done.
        first: Who entered first, if anybody did; taken out of there as it is run.
        others: Who entered then, in order; each is taken out as it is run.
        inline: Run now, however deep: what the documentation promises for a callback
            that is added to a future that is already done.

    Raises:
        KeyboardInterrupt, SystemExit: A callback raised it, after the others were run;
            or it struck in between, and this is to be called again for those still there.
    """
    here = _this_thread.nesting
    depth = here.depth
    if depth >= MAX_DEPTH and not inline:
        here.deferred.append((future, first, others))
        return
    interrupt: BaseException | None = None
    here.depth = depth + 1
    try:
        interrupt = _run_each(future, first, others)
        if depth == 0 and here.deferred:
            interrupt = _run_deferred(here) or interrupt
    finally:
        here.depth = depth
    if interrupt is not None:
        raise interrupt


# A function of its own: from Python 3.12 on, an interrupt at the jump that closes a loop may
# miss the ``finally`` around it.
def _run_each(future: Future[Any], first: Any, others: dict[Any, None]) -> BaseException | None:
    interrupt: BaseException | None = None
    tell = _guarded if future._readiness is None else _ordered
    if first is not None and first.wake is None:
        interrupt = tell(future, first, None)
    for entry in [*others]:
        if entry.wake is None:
            interrupt = tell(future, entry, others) or interrupt
    return interrupt


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
            run(*due, inline=True)
        except BaseException as struck:  # perhaps somewhere in between
            interrupt = struck
            here.deferred.appendleft(due)
    return interrupt


def _ordered(
    future: Future[Any], entry: Entry, others: dict[Any, None] | None
) -> BaseException | None:
    # C++ runs it, at once, on dedicated streams that are ordered after the kernels. An
    # exception cannot cross C++ as itself, so it is carried around.
    outcome: list[BaseException | None] = []
    readiness: Any = future._readiness
    readiness.run(lambda: outcome.append(_guarded(future, entry, others)))
    return outcome.pop() if outcome else None


def _guarded(
    future: Future[Any], entry: Entry, others: dict[Any, None] | None
) -> BaseException | None:
    """Runs one of ``others``, or without these the first, unless it has been taken out."""
    try:
        # Whoever takes it out runs it. Between the two, Ctrl-C cannot strike.
        if others is None:
            del future._first
        else:
            del others[entry]
    except (AttributeError, KeyError):
        return None
    try:
        entry.run(future)
    except (KeyboardInterrupt, SystemExit) as interrupt:
        entry.interrupted(future, interrupt)
        return interrupt
    except BaseException:
        _logger.exception(
            "Got the following error when running the callback %r of %r:", entry.run, future
        )
    return None

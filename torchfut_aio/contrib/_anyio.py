"""anyio's TaskHandle and Future. Only a task on their loop can wait for them."""

from __future__ import annotations

from functools import partial
from typing import Any

from .. import _loops
from .._adopt import AdoptedFuture, once
from .._core import Promise
from .._errors import drop_catching_frame
from .._repr import described
from .._threads import call_contained


# anyio.Future has no weak references. While the task that waits keeps the source, its id is unique.
@partial(once, identity=id)
def adopt(source: Any, future: AdoptedFuture[Any]) -> None:
    if not _loops.loop_in_this_thread():
        raise RuntimeError(
            f"as_future() of a {type(source).__qualname__} of anyio has to be called in the thread "
            "of its event loop"
        )
    promise = Promise(future, described(source))
    if _has_ended(source):
        _keep(promise, source)
        return

    def ended() -> None:
        # The task may have ended with the loop, before it could keep the promise. Contained, as a
        # callback that raises would end trio's run.
        if _has_ended(source):
            call_contained(_keep, promise, source)
        call_contained(promise.end)

    _loops.current().spawn(ended, _watch, promise, source)


async def _watch(promise: Promise, source: Any) -> None:
    try:
        await source.wait()
    except Exception as error:  # the source belongs to another loop
        call_contained(promise.fail, drop_catching_frame(error))
    else:
        call_contained(_keep, promise, source)


def _has_ended(source: Any) -> bool:
    return source.status.name not in ("PENDING", "CANCELLING")


def _keep(promise: Promise, source: Any) -> None:
    try:
        error = source.exception
    except Exception:  # anyio's TaskCancelled or FutureCancelled
        promise.cancel()
        return
    if error is None:
        promise.keep(source.return_value)
    else:
        promise.fail(error)

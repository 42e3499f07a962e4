"""What ``torch.distributed`` works on, and RPC. Builds of torch may have neither."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .._devices import finish_current_streams
from .._errors import NotAFutureError
from .._future import Future
from .._rpc_errors import parse_fetched_error
from ._registry import adopts, copy_outcome, once
from ._threads import complete_in_thread
from ._torch import follow

if TYPE_CHECKING:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor


@adopts("torch.distributed.Work")
@once
def _from_work(source: torch.distributed.Work, future: Future[Any]) -> None:
    try:
        native = source.get_future()
    except RecursionError:
        raise
    except RuntimeError:  # some works of gloo have none
        complete_in_thread(future, lambda future: copy_outcome(lambda: _wait_for(source), future))
    else:
        follow(native, future)


def _wait_for(work: torch.distributed.Work) -> None:
    work.wait()
    finish_current_streams()


# By identity: to compare two of these waits for both.
@adopts("torch.distributed._functional_collectives.AsyncCollectiveTensor")
@functools.partial(once, made_of=WeakIdKeyDictionary())
def _from_tensor(source: AsyncCollectiveTensor, future: Future[Any]) -> None:
    # torch has the work in a registry of C++'s, and takes it out to wait for it.
    if source.completed:
        future.set_result(source.elem)
    elif torch.__version__ < "2.13":  # that of 2.7 is for each thread; those between were not run
        raise NotAFutureError(
            "an AsyncCollectiveTensor cannot be awaited with this PyTorch, which waits for it only "
            "in the thread that began it: pass the Work that dist.all_reduce(tensor, "
            "async_op=True) and the like return, or use PyTorch 2.13 or newer"
        )
    else:
        complete_in_thread(future, lambda future: copy_outcome(source.trigger_wait, future))


@adopts("torch.distributed.rpc.RRef", "torch.distributed.rpc.PyRRef")
@once
def _from_rref(source: Any, future: Future[Any]) -> None:
    complete_in_thread(
        future, lambda future: copy_outcome(source.to_here, future, parse_fetched_error)
    )

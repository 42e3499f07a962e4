"""Works, collective tensors and RRefs of ``torch.distributed``, which a build of torch may lack."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .._core import Promise
from .._devices import finish_current_streams
from .._errors import NotAFutureError
from .._pytorch import COLLECTIVE_TENSOR
from ._adopted import AdoptedFuture, once
from ._registry import adopts
from ._threads import settle_in_thread
from ._torch import OfTorch, follow


@adopts("torch.distributed.Work")
@partial(once, kind=OfTorch)
def _from_work(source: torch.distributed.Work, future: AdoptedFuture[Any]) -> None:
    try:
        native = source.get_future()
    except RecursionError:
        raise
    except RuntimeError:  # some works of gloo have none
        settle_in_thread(Promise(future, "the adopted work"), partial(_wait_for, source))
    else:
        follow(native, future)


def _wait_for(work: torch.distributed.Work) -> None:
    work.wait()
    finish_current_streams()


@adopts(COLLECTIVE_TENSOR)
@once
def _from_tensor(source: Any, future: AdoptedFuture[Any]) -> None:
    # torch keeps the work in a registry in C++, and removes it there to wait for it.
    is_known = all(hasattr(source, name) for name in ("completed", "elem", "trigger_wait"))
    if is_known and source.completed:
        future.set_result(source.elem)
    # Before torch 2.13, each thread may have a separate registry.
    elif not is_known or torch.__version__ < "2.13":
        raise NotAFutureError(
            "an AsyncCollectiveTensor cannot be awaited with this PyTorch, which waits for it only "
            "in the thread that began it: pass the Work that dist.all_reduce(tensor, "
            "async_op=True) and the like return, or use PyTorch 2.13 or newer"
        )
    else:
        settle_in_thread(Promise(future, "the adopted tensor"), source.trigger_wait)


@adopts("torch.distributed.rpc.RRef", "torch.distributed.rpc.PyRRef")
@once
def _from_rref(source: Any, future: AdoptedFuture[Any]) -> None:
    from .._rpc_errors import parse_fetched_error

    settle_in_thread(Promise(future, "the adopted RRef"), source.to_here, parse_fetched_error)

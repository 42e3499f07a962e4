"""Bridges to torch.distributed: RPC handlers and DDP hooks that are async functions.

``_rpc.py`` and ``_ddp.py`` have these; what they run on is in ``_background_loop.py``. Collectives
and RPCs are awaited without them: ``await as_future(dist.all_reduce(tensor, async_op=True))``,
``await as_future(rpc.rpc_async(...))``, which raises `torchfut_aio.RpcError`.

RPC pickles a function by its name, so `async_rpc` is a decorator, used where that is defined.
"""

from .._public import publish
from ._ddp import async_comm_hook
from ._rpc import async_rpc, serve_on, shutdown

__all__ = ["async_comm_hook", "async_rpc", "serve_on", "shutdown"]

publish(__name__)

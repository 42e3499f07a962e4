"""Bridges to torch.distributed: RPC handlers and DDP hooks that are async functions.

They are in ``_rpc.py`` and ``_ddp.py``, and run on the loop of ``_background_loop.py``. Collectives
and RPCs are awaited without them: ``await as_future(dist.all_reduce(tensor, async_op=True))``,
``await as_future(rpc.rpc_async(...))``, which raises `torchfut_aio.RpcError`.

`async_rpc` is a decorator because RPC pickles a function by its name.
"""

from .._public import publish
from ._ddp import async_comm_hook
from ._rpc import async_rpc, serve_on, shutdown

__all__ = ["async_comm_hook", "async_rpc", "serve_on", "shutdown"]

publish(__name__)

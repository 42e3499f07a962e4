"""Futures of other kinds, made into ours: `as_future`, and a file for each family of sources.

``_registry.py`` has `as_future` itself, ``_adopted.py`` the future that it returns, ``_threads.py``
the threads that wait for sources without callbacks, and ``_refusals.py`` the errors. Sources of
other libraries are in ``contrib/``, imported when one is adopted.

An adopted future completes as its source does, in the thread that completes the source. To cancel
or complete the future does not affect the source.
"""

from . import _asyncio, _concurrent, _devices, _distributed, _torch  # they register
from ._adopted import AdoptedFuture, once
from ._registry import Source, adopts_in_contrib, as_future
from ._threads import settle_in_thread

adopts_in_contrib("_anyio", "anyio.TaskHandle", "anyio.Future")
adopts_in_contrib("_pool", "multiprocessing.pool.AsyncResult")
adopts_in_contrib("_ray", "ray.ObjectRef")
adopts_in_contrib("_dask", "distributed.client.Future")
adopts_in_contrib("_grpc", "grpc.Future")  # of a call; those of grpc.aio are awaitables

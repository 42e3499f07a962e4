"""Futures of other kinds, made into ours: `as_future`, and a file for each family of sources.

``_registry.py`` has `as_future` itself and what the files share, ``_threads.py`` what serves
sources that tell only a thread that blocks, and ``_refusals.py`` what is said of all others. A
further source is one more file, with an adapter under ``@adopts``, and its name in the import
below.

An adopted future completes as its source does, in the thread where the source does. It does not
control the source: through it, nobody can cancel or complete that.
"""

from . import (  # noqa: F401  they register what they adopt
    _anyio,
    _asyncio,
    _concurrent,
    _dask,
    _devices,
    _distributed,
    _pool,
    _ray,
    _torch,
)
from ._registry import Source, as_future

__all__ = ["Source", "as_future"]

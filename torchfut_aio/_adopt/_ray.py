"""Ray's ObjectRefs: names of values that other processes compute."""

from __future__ import annotations

import weakref
from typing import Any

from .._arguments import Devices, devices_checked
from .._dependent import DependentFuture
from .._future import Future
from ._registry import Adoption, adopts

# The futures of pending refs, by the ids of the objects: a ref has no weak references.
_made: weakref.WeakValueDictionary[tuple[bytes, object], DependentFuture[Any]] = (
    weakref.WeakValueDictionary()
)


@adopts("ray.ObjectRef")
def _from_ray(source: Any, *, devices: Devices = None) -> Future[Any]:
    key = source.binary(), () if devices is None else devices_checked(devices)
    future = _made.get(key)
    if future is None or future.done():
        future = DependentFuture(devices=key[1])
        concurrent = source.future()
        concurrent.add_done_callback(Adoption(concurrent, future).callback())
        _made[key] = future
    return future

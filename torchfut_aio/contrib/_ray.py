"""Ray's ObjectRefs: names of values that other processes compute."""

from __future__ import annotations

from functools import partial
from operator import methodcaller
from typing import Any

from .._adopt import AdoptedFuture, once


@partial(once, identity=methodcaller("binary"))
def adopt(source: Any, future: AdoptedFuture[Any]) -> None:
    source.future().add_done_callback(future.callback())

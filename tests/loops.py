"""One test body for every loop."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

AsyncTest = Callable[..., Coroutine[Any, Any, None]]


def on_every_loop(test: AsyncTest) -> AsyncTest:
    """Run an async test on asyncio and uvloop (pytest-asyncio) and on trio (anyio).

    The body may use anyio, but no particular loop.
    """

    @functools.wraps(test)
    async def on_trio(*args: Any, **kwargs: Any) -> None:
        await test(*args, **kwargs)

    on_trio.__name__ = on_trio.__qualname__ = f"{test.__name__}_on_trio"
    on_trio = pytest.mark.anyio(on_trio)
    on_trio = pytest.mark.parametrize("anyio_backend", ["trio"])(on_trio)
    setattr(sys.modules[test.__module__], on_trio.__name__, on_trio)
    return pytest.mark.asyncio(test)


on_asyncio = pytest.mark.asyncio

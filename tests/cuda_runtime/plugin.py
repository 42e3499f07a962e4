"""A pytest plugin: a test fails if it launches a kernel that the stand-in does not know.

The launch raises too, but the program under test may catch that error, or raise it elsewhere.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

from . import IS_INSTALLED, unknown_kernels

_seen = 0


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown() -> Generator[None, None, None]:
    global _seen
    yield
    names = unknown_kernels(_seen)
    _seen += len(names)
    if names:
        pytest.fail("kernels that the stand-in for CUDA does not know:\n" + "\n".join(names))


def pytest_configure() -> None:
    if not IS_INSTALLED:
        raise pytest.UsageError("PyTorch does not run on the stand-in for CUDA here")

"""What every test shares: the loops that async tests run on, and guards around each."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop
from blockbuster import BlockBuster

from .accelerator import accelerator, accelerator_module, consumer, producer

__all__ = ["accelerator", "accelerator_module", "consumer", "producer"]


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def nothing_blocks_a_loop() -> Iterator[BlockBuster]:
    """Raises in whatever makes a blocking call while an asyncio or uvloop loop runs."""
    buster = BlockBuster()
    # pytest itself looks for source files while it rewrites assertions.
    buster.functions["os.stat"].can_block_in("_pytest/assertion/rewrite.py", {"exec_module"})
    buster.activate()
    yield buster
    buster.deactivate()


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fails a test that leaves a thread behind."""
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and not t.daemon]
    for thread in left:
        thread.join(5)
    assert not [t for t in left if t.is_alive()]


@pytest.fixture
def collected() -> Callable[[], None]:
    """Runs the garbage collector until nothing more turns up."""

    def collect() -> None:
        while gc.collect():
            pass

    return collect

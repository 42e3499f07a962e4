"""Fixtures for every test: the loops of async tests, and checks around each test."""

from __future__ import annotations

import asyncio
import gc
import glob
import os
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing import active_children

import pytest
import torch
import torch.distributed as dist
import uvloop
from blockbuster import BlockBuster
from hypothesis import HealthCheck, find, settings, strategies
from torch.distributed import rpc

import torchfut_aio._loops._trio  # noqa: F401  or the first wait imports it, and takes a lock
from torchfut_aio._extension import use_extension

from . import explorer
from .accelerator import accelerator, accelerator_module, consumer, producer
from .batchers import Gated
from .threads import PATIENCE, until

__all__ = ["accelerator", "accelerator_module", "consumer", "producer"]

# The duration of an example depends on the load of the machine only.
settings.register_profile(
    "at any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("at any speed")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    seed = config.getoption("randomly_seed", None)
    if seed is not None:  # without -q, the header shows it too
        terminalreporter.write_line(f"to repeat this order: --randomly-seed={seed}")


@pytest.fixture(scope="session", autouse=True)
def nothing_turns_the_gil_on() -> Iterator[None]:
    """Fail a run that was meant to be without the GIL, if an import has enabled the GIL."""
    yield
    has_none = sysconfig.get_config_var("Py_GIL_DISABLED") and os.environ.get("PYTHON_GIL") == "0"
    if has_none and sys._is_gil_enabled():
        pytest.fail("the GIL is on, so these tests have not run without it")


@pytest.fixture(scope="session")
def hypothesis_is_used_first() -> None:
    """Let hypothesis register its random generator before objects are frozen.

    It warns if the garbage collector finds no reference to the generator. The collector searches no
    frozen object, so the first test of hypothesis would fail, and pass when repeated.
    """
    find(strategies.none(), lambda _: True)


@pytest.fixture(scope="module", autouse=True)
def collections_are_quick(hypothesis_is_used_first: None) -> None:
    """Exempt objects that earlier tests imported or cached from garbage collection."""
    explorer.freeze()


@pytest.fixture(scope="session")
def block_buster() -> Iterator[BlockBuster]:
    """Patch blocking calls once for all tests, which takes longer than many a test."""
    buster = BlockBuster()
    # pytest itself looks for source files while it rewrites assertions.
    buster.functions["os.stat"].can_block_in("_pytest/assertion/rewrite.py", {"exec_module"})
    # A pool that is garbage-collected unregisters from its tracker, in any thread.
    tracker = "multiprocessing/resource_tracker.py"
    buster.functions["os.write"].can_block_in(tracker, {"_send", "_write"})
    yield buster
    buster.deactivate()


@pytest.fixture(autouse=True)
def nothing_blocks_a_loop(block_buster: BlockBuster) -> BlockBuster:
    """Raise an error in code that blocks while an asyncio or uvloop loop runs."""
    block_buster.activate()  # a no-op if it is active, as most tests leave it
    return block_buster


@pytest.fixture(autouse=True)
def extension_is_used() -> None:
    """Use the C extension, if it was built: an abandoned generator of `interrupts` left it off."""
    use_extension(True)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fail a test that leaves a thread, a process or a socket behind."""
    threads, processes, before = set(threading.enumerate()), set(active_children()), sockets()
    yield
    for thread in set(threading.enumerate()) - threads:
        if not thread.daemon or thread.name.startswith("torchfut_aio"):
            thread.join(PATIENCE)
            assert not thread.is_alive(), thread
    # Workers shared by several tests start during the first of these.
    assert all(process.name.startswith("worker") for process in set(active_children()) - processes)
    if sockets() > before:
        gc.collect()
        until(lambda: sockets() <= before)


def sockets() -> int:
    """Return how many sockets this process has open; 0 where /proc is missing."""
    number = 0
    for descriptor in glob.glob("/proc/self/fd/*"):
        with suppress(OSError):
            number += os.readlink(descriptor).startswith("socket:")
    return number


@pytest.fixture(scope="session")
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one process, for DDP, which opens a socket on first use."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def tensorpipe() -> None:
    """Skip the test if RPC lacks TensorPipe, as in Debian's build of PyTorch."""
    if getattr(rpc, "_is_tensorpipe_available", None) is False:
        pytest.skip("this build of PyTorch has no TensorPipe, so RPC cannot be started")


@pytest.fixture(scope="session")
def gloo_of_half(group_of_one: None) -> None:
    """Skip the test if gloo cannot reduce float16, as in Debian's build of PyTorch."""
    try:
        dist.all_reduce(torch.ones(1, dtype=torch.float16))
    except RuntimeError as error:
        if "Invalid scalar type" not in str(error):
            raise
        pytest.skip("this build of PyTorch has a gloo that reduces no float16")


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """A function that raises KeyboardInterrupt in the main thread, from any thread."""
    main, interrupted = threading.get_ident(), []

    def handle(*_: object) -> None:
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    def interrupt() -> None:
        interrupted.clear()
        # A signal that comes just before the thread blocks has no effect until it wakes: repeat it.
        while not interrupted:
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.01)

    # A background job of a shell ignores SIGINT.
    before = signal.signal(signal.SIGINT, handle)
    yield interrupt
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def caplog(
    caplog: pytest.LogCaptureFixture, collected: Callable[[], None]
) -> pytest.LogCaptureFixture:
    """pytest's fixture, without logs of garbage that earlier tests left."""
    collected()
    caplog.clear()
    return caplog


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Disable the garbage collector for the test."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()  # so that errors logged for this garbage count for this test


@pytest.fixture
def collected() -> Callable[[], None]:
    """A function that runs the garbage collector until it finds no more garbage."""

    def collect() -> None:
        while gc.collect():
            pass

    return collect


@pytest.fixture
def gated() -> Iterator[Gated]:
    """A function of a batcher that blocks until the test lets it return, or ends."""
    gated = Gated()
    yield gated
    gated.may_return.set()

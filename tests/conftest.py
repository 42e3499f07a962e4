"""What every test shares: the loops that async tests run on, and guards around each."""

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
from hypothesis import HealthCheck, settings
from torch.distributed import rpc

import torchfut_aio._loops._trio  # noqa: F401  the first wait would import it, and take a lock

from . import explorer
from .accelerator import accelerator, accelerator_module, consumer, producer
from .threads import PATIENCE, until

__all__ = ["accelerator", "accelerator_module", "consumer", "producer"]

# How long an example takes says how busy the machine is.
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
    if seed is not None:  # without -q, it is in the header, too
        terminalreporter.write_line(f"to repeat this order: --randomly-seed={seed}")


@pytest.fixture(scope="session", autouse=True)
def nothing_turns_the_gil_on() -> Iterator[None]:
    """Fail a run that was to be without the GIL, if anything has turned it on."""
    yield
    has_none = sysconfig.get_config_var("Py_GIL_DISABLED") and os.environ.get("PYTHON_GIL") == "0"
    if has_none and sys._is_gil_enabled():
        pytest.fail("the GIL is on, so these tests have not run without it")


@pytest.fixture(scope="module", autouse=True)
def collections_are_quick() -> None:
    """Spare the garbage collector what earlier tests have imported and cached."""
    explorer.freeze()


@pytest.fixture(scope="session")
def block_buster() -> Iterator[BlockBuster]:
    """Patch blocking calls for all tests, as that takes longer than many a test."""
    buster = BlockBuster()
    # pytest itself looks for source files while it rewrites assertions.
    buster.functions["os.stat"].can_block_in("_pytest/assertion/rewrite.py", {"exec_module"})
    # A pool that has become garbage takes leave of its tracker in whatever thread collects it.
    tracker = "multiprocessing/resource_tracker.py"
    buster.functions["os.write"].can_block_in(tracker, {"_send", "_write"})
    yield buster
    buster.deactivate()


@pytest.fixture(autouse=True)
def nothing_blocks_a_loop(block_buster: BlockBuster) -> BlockBuster:
    """Raise an error in code that blocks while an asyncio or uvloop loop runs."""
    block_buster.activate()  # unless it is active, as most tests leave it
    return block_buster


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fails a test that leaves a thread behind, a process or a socket."""
    threads, processes, before = set(threading.enumerate()), set(active_children()), sockets()
    yield
    for thread in set(threading.enumerate()) - threads:
        if not thread.daemon or thread.name.startswith("torchfut_aio"):
            thread.join(PATIENCE)
            assert not thread.is_alive(), thread
    # Those of workers that several tests share come with their first test.
    assert all(process.name.startswith("worker") for process in set(active_children()) - processes)
    if sockets() > before:
        gc.collect()
        until(lambda: sockets() <= before)


def sockets() -> int:
    """How many sockets this process has open; 0 where nobody can tell."""
    number = 0
    for descriptor in glob.glob("/proc/self/fd/*"):
        with suppress(OSError):
            number += os.readlink(descriptor).startswith("socket:")
    return number


@pytest.fixture(scope="session")
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone, for DDP, which leaves a socket when first used."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def tensorpipe() -> None:
    """What RPC needs; some builds of PyTorch, such as Debian's, have RPC without it."""
    if getattr(rpc, "_is_tensorpipe_available", None) is False:
        pytest.skip("this build of PyTorch has no TensorPipe, so RPC cannot be started")


@pytest.fixture(scope="session")
def gloo_of_half(group_of_one: None) -> None:
    """Collectives of float16, which some builds of gloo, such as Debian's, do not know."""
    try:
        dist.all_reduce(torch.ones(1, dtype=torch.float16))
    except RuntimeError as error:
        if "Invalid scalar type" not in str(error):
            raise
        pytest.skip("this build of PyTorch has a gloo that reduces no float16")


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Strikes the main thread with KeyboardInterrupt, from any thread."""
    main, struck = threading.get_ident(), []

    def handle(*_: object) -> None:
        if not struck:
            struck.append(True)
            raise KeyboardInterrupt

    def strike() -> None:
        struck.clear()
        while not struck:  # a signal just before a thread blocks goes unseen for as long
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.01)

    # What a shell runs in the background ignores the signal.
    before = signal.signal(signal.SIGINT, handle)
    yield strike
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def caplog(
    caplog: pytest.LogCaptureFixture, collected: Callable[[], None]
) -> pytest.LogCaptureFixture:
    """As pytest's, without what is logged of garbage that earlier tests have left."""
    collected()
    caplog.clear()
    return caplog


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Keeps the garbage collector from running, for what has to happen without it."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()  # what is complained of then belongs to this test


@pytest.fixture
def collected() -> Callable[[], None]:
    """Runs the garbage collector until nothing more turns up."""

    def collect() -> None:
        while gc.collect():
            pass

    return collect

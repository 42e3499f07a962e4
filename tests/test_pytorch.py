"""Each use of a private name of PyTorch has a public fallback, or raises an error that says so."""

from __future__ import annotations

import ast
import pathlib

import pytest
import torch

import torchfut_aio
from torchfut_aio._pytorch import thread_state_functions

from . import forks

PACKAGE = pathlib.Path(torchfut_aio.__file__).parent

# The package is imported after the fork, when a name has been removed.
BEFORE = """
import asyncio, sys, threading
import anyio.from_thread, torch
import torch.distributed.rpc as rpc
from torch.distributed.rpc import backend_registry

rpc._is_tensorpipe_available = True  # some builds, such as Debian's, have none

def use():
    from torchfut_aio import _devices, debug, distributed
    asyncio.run(wait())
    value = {"a": [torch.ones(2)]}
    readiness, error = _devices.declared_readiness((), value, _devices.Moment())
    assert error is None, error
    assert readiness.tensors == value["a"]
    said("task_local_state", lambda: asyncio.run(keep_state()))
    said("set_task_state_checks", debug.set_task_state_checks)
    use_distributed()

async def wait():
    pending = [Future() for _ in range(3)]
    asyncio.get_running_loop().call_later(0.001, torchfut_aio.set_results, pending, range(3))
    assert await torchfut_aio.gather(pending) == [0, 1, 2]
    theirs = torch.futures.Future()
    ours = torchfut_aio.as_future(theirs)
    assert ours is torchfut_aio.as_future(theirs)
    theirs.set_result(torch.ones(2))
    assert "tensor (2,)" in repr(ours)
    assert (await ours).tolist() == [1, 1]
    async with torchfut_aio.Batcher(list, max_batch_size=2, max_queue_size=9) as batcher:
        assert await batcher.submit(5) == 5
    failed = Future()
    failed.set_exception(KeyError("why"))
    try:
        await failed.then(Future.wait)
    except KeyError:
        said("wait_all", lambda: torch.futures.wait_all([failed]))

async def keep_state():
    @torchfut_aio.task_local_state
    async def function():
        await asyncio.sleep(0)
    await function()

def use_distributed():
    from torchfut_aio import distributed
    @distributed.async_rpc
    async def double(x):
        return 2 * x
    assert double(2).wait(60) == 4
    with anyio.from_thread.start_blocking_portal() as portal:
        said("serve_on", lambda: distributed.serve_on(portal).__exit__(None, None, None))
    distributed.shutdown()

def train_with_a_hook():
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torchfut_aio import distributed
    @distributed.async_comm_hook
    async def hook(state, bucket):
        return bucket.buffer().mul_(3)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = DistributedDataParallel(torch.nn.Linear(2, 1))
    model.register_comm_hook(None, hook)
    model(torch.ones(1, 2)).sum().backward()
    dist.destroy_process_group()
    print("gradient", model.module.weight.grad.tolist())

def said(what, function):
    try:
        function()
        print(what, "works")
    except Exception as error:
        print(f"{what} raises {type(error).__name__}: {error}")
"""
USE = """
import torchfut_aio
from torchfut_aio import Future
assert "torchfut_aio._rpc_errors" not in sys.modules
use()
"""

# torch itself calls this by name.
RENAME_UNWRAP = """
theirs = torch._C.Future._set_unwrap_func
del torch._C.Future._set_unwrap_func
def raise_value(value):
    raise value
def set_exception(self, error):
    theirs(self, raise_value)
    self.set_result(error)
torch.futures.Future.set_exception = set_exception
"""

# torch.accelerator calls these by name.
RENAME_OF_ACCELERATOR = """
theirs = torch._C.{name}
del torch._C.{name}
torch.accelerator.{public} = lambda *args, theirs=theirs: theirs(*args)
"""

THREAD_STATE = [
    name if hasattr(torch._C, name) else f"_{name}" for name in vars(thread_state_functions())
]
OF_THREADS = {name: f"del torch._C.{name}" for name in THREAD_STATE}
WITH_A_FALLBACK = {
    "DisableTorchFunctionSubclass": "del torch._C.DisableTorchFunctionSubclass",
    "RemoteException": "del sys.modules['torch.distributed.rpc.internal'].RemoteException",
    "SUPPORTED_NODES": "import torch.utils._pytree; del torch.utils._pytree.SUPPORTED_NODES",
    "_accelerator_maybeExchangeDevice": "vars(torch._C).pop('_accelerator_maybeExchangeDevice', 0)",
    "_accelerator_setDeviceIndex": "del torch._C._accelerator_setDeviceIndex",
    "_accelerator_setStream": "del torch._C._accelerator_setStream",
    "_cuda_hasPrimaryContext": "vars(torch._C).pop('_cuda_hasPrimaryContext', 0)",
    "_cuda_maybeExchangeDevice": "vars(torch._C).pop('_cuda_maybeExchangeDevice', 0)",
    "_dispatch_has_kernel": "del torch._C._dispatch_has_kernel_for_dispatch_key",
    "_dispatch_key_for_device": "del torch._C._dispatch_key_for_device",
    "_distributed_c10d": "sys.modules['torch._C._distributed_c10d'] = None",
    "_extract_tensors": "del torch._jit_internal._extract_tensors",
    "_functional_collectives": "sys.modules['torch.distributed._functional_collectives'] = None",
    "_is_tensorpipe_available": "vars(rpc).pop('_is_tensorpipe_available', 0)",
    "_jit_internal": "del torch._jit_internal",
    "get_worker_info": "del rpc.get_worker_info",
    "rpc._is_current_rpc_agent_set": "del rpc._is_current_rpc_agent_set",
    "rpc._get_current_rpc_agent": "del rpc._get_current_rpc_agent",
    "torch.utils.weak": "sys.modules['torch.utils.weak'] = None",
} | {
    name: RENAME_OF_ACCELERATOR.format(name=name, public=public)
    for name, public in (
        ("_accelerator_getAccelerator", "current_accelerator"),
        ("_accelerator_getDeviceIndex", "current_device_index"),
        ("_accelerator_getStream", "current_stream"),
    )
}
WITH_A_FALLBACK |= {"all of these": "\n".join(WITH_A_FALLBACK.values()), "nothing": ""}
WITHOUT_RPC = {
    "TensorPipe": "rpc._is_tensorpipe_available = False",
    "RPC": "rpc.is_available = lambda: False; rpc.__dict__.pop('get_worker_info')",
    "torch.distributed": (
        "del torch.distributed\n"
        "for name in list(sys.modules):\n"
        "    if name.startswith('torch.distributed'):\n"
        "        sys.modules[name] = None"
    ),
}
OTHERS = {
    "Future": "del torch._C.Future",
    "_set_unwrap_func": RENAME_UNWRAP,
    "another agent": (
        "rpc._is_tensorpipe_available = False\n"
        "backend_registry.register_backend('OTHER', None, None)"
    ),
}
CASES = OF_THREADS | WITH_A_FALLBACK | WITHOUT_RPC | OTHERS

ALL_WORK = {
    "wait_all": "wait_all raises KeyError: 'why'",
    "task_local_state": "task_local_state works",
    "set_task_state_checks": "set_task_state_checks works",
    "serve_on": "serve_on works",
}


def printed(name):
    """Return what the use of the package prints without a name, as lines."""
    return run(f"{CASES[name]}\n{USE}").splitlines()


def run(program):
    imported = ("torch", "torch.distributed.rpc", "anyio.from_thread")
    done = forks.run(BEFORE + program, imported=imported, filters="ignore", finalizes=False)
    assert done.returncode == 0, done.stderr  # to which the gloo of some builds writes
    return done.stdout


def lines(expected):
    return [*expected.values()]


@pytest.mark.parametrize("name", WITH_A_FALLBACK)
def test_missing_private_name_has_a_fallback(name):
    assert printed(name) == lines(ALL_WORK)


@pytest.mark.parametrize("name", OF_THREADS)
def test_task_local_state_raises_where_torch_lacks_support(name):
    why = (
        "RuntimeError: task_local_state() and set_task_state_checks() do not work with torch "
        f"{torch.__version__}, whose torch._C has no {name}"
    )
    refused = {
        each: f"{each} raises {why}" for each in ("task_local_state", "set_task_state_checks")
    }
    assert printed(name) == lines(ALL_WORK | refused)


@pytest.mark.parametrize("name", WITHOUT_RPC)
def test_only_serve_on_raises_without_rpc(name):
    missing = "TensorPipe, the agent of torch.distributed.rpc"
    why = (
        f"RuntimeError: serve_on() is for RPC, and torch {torch.__version__} lacks "
        f"{missing if name == 'TensorPipe' else 'torch.distributed.rpc'}"
    )
    assert printed(name) == lines(ALL_WORK | {"serve_on": f"serve_on raises {why}"})


def test_hooks_work_without_rpc():
    for_hooks = "import torchfut_aio\ntrain_with_a_hook()"
    for name in ("TensorPipe", "RPC"):
        assert run(f"{WITHOUT_RPC[name]}\n{for_hooks}") == "gradient [[3.0, 3.0]]\n"


def test_serve_on_accepts_agents_other_than_tensorpipe():
    assert printed("another agent") == lines(ALL_WORK)


def test_cpp_future_class_is_found_without_its_name():
    # In the first line, torch itself refers to the class by name.
    assert printed("Future")[1:] == lines(ALL_WORK)[1:]


def test_failed_future_has_no_value_for_torch_wait_all():
    error = "wait_all raises TypeError: exceptions must derive from BaseException"
    assert printed("_set_unwrap_func") == lines(ALL_WORK | {"wait_all": error})


def test_private_names_of_pytorch_are_used_in_one_module():
    private = {*THREAD_STATE, "DisableTorchFunctionSubclass", "RemoteException"}
    for path in PACKAGE.rglob("*.py"):
        if path.name == "_pytorch.py":
            continue
        tree = ast.parse(path.read_text())
        for block in ast.walk(tree):
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
                block.body.clear()
        for node in ast.walk(tree):
            line = f"{path.name}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert not is_private(f"{node.module}.{node.names[0].name}"), line
            elif isinstance(node, ast.Attribute):
                assert not is_private(ast.unparse(node)), line
            elif isinstance(node, ast.Constant) and type(node.value) is str:
                assert node.value not in private, line
                assert not is_private(node.value), line


def is_private(name):
    parts = name.split(".")
    return parts[0] == "torch" and any(
        part.startswith("_") and not part.startswith("__") for part in parts
    )

"""Everything private to PyTorch that the package relies on.

Each name was checked on torch 2.7.1, 2.13.0, 2.14.1 and 2.15.0. If one is missing, a public
function takes its place, or the call that needs it raises RuntimeError. Importing the package never
raises: ``tests/test_pytorch.py`` removes each name in turn.

The texts of PyTorch's errors are not here: see `says_no_events`, and ``_rpc_errors.py``.
"""

from __future__ import annotations

import functools
import sys
from collections import namedtuple
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

# The C++ class of torch.futures.Future, and of every future that C++ makes. Its methods run no
# Python, so no interrupt can come within them.
if TYPE_CHECKING:
    CppFuture = torch._C.Future
else:
    CppFuture = torch.futures.Future.__base__


def _set_unwrap_func(future: Any, _unwrap: Callable[[Any], Any]) -> None:
    """Make C++ raise a TypeError for a failed future, where it takes no function that raises.

    Otherwise functions such as ``torch.futures.wait_all`` would return the placeholder that the
    package stores instead of a value.
    """
    # set_exception() makes C++ raise the value, which is no exception, hence the TypeError. It also
    # calls set_result(), which the caller does later.
    future.set_result = lambda _: None
    try:
        torch.futures.Future.set_exception(future, Exception())
    finally:
        del future.set_result


# Makes a future return ``unwrap(value)`` instead of its value.
set_unwrap_func: Callable[[Any, Callable[[Any], Any]], None]
set_unwrap_func = getattr(CppFuture, "_set_unwrap_func", _set_unwrap_func)

# Within it, no code of a subclass of Tensor runs. If torch lacks it, that code runs, and callers
# expect that it may raise.
no_torch_function: Callable[[], AbstractContextManager[Any]]
no_torch_function = getattr(torch._C, "DisableTorchFunctionSubclass", nullcontext)

# Returns the tensors that C++ finds in a value. It is part of TorchScript, so it may be None:
# search the value then.
extract_tensors: Callable[[object], list[torch.Tensor]] | None
extract_tensors = getattr(getattr(torch, "_jit_internal", None), "_extract_tensors", None)
# The module of that function, which pickles the value.
EXTRACTS_TENSORS = "torch._jit_internal"


def pytree_node(kind: type) -> Any:
    """Return how torch's pytree takes apart instances of a class; None if it does not know it."""
    nodes = getattr(sys.modules.get("torch.utils._pytree"), "SUPPORTED_NODES", {})
    return nodes.get(kind)


# The class of results of functional collectives, for `as_future`.
COLLECTIVE_TENSOR = "torch.distributed._functional_collectives.AsyncCollectiveTensor"


# ---------------------------------------------------------------------------------- devices


def has_primary_context(kind: str) -> Callable[[int], bool]:
    """Return a function that knows whether a device has a context, or that always returns True."""
    found: Callable[[int], bool] = getattr(torch._C, f"_{kind}_hasPrimaryContext", lambda _: True)
    return found


def can_exchange(device: torch.device) -> bool:
    """Return True if the thread's device can be made current again without giving it a context."""
    return hasattr(torch.get_device_module(device), "_maybe_exchange_device")


@functools.cache
def device_exchange(kind: str) -> Callable[[int], object]:
    """Return a function that makes a device current, if possible without giving it a context."""
    # CUDA and XPU remember the device even if it has no context. On other backends another device
    # stays current then, as with torch's own ``device_index()``.
    exchange: Callable[[int], object] | None = (
        getattr(torch._C, f"_{kind}_maybeExchangeDevice", None)
        or getattr(torch.get_device_module(kind), "_maybe_exchange_device", None)
        or getattr(torch._C, "_accelerator_maybeExchangeDevice", None)
        or getattr(torch._C, "_accelerator_setDeviceIndex", None)
    )
    return exchange or torch.accelerator.set_device_index


@functools.cache
def has_record_stream(kind: str) -> bool:
    """Return True if ``Tensor.record_stream`` is known to work on devices of this kind."""
    try:
        key = torch._C._dispatch_key_for_device(kind)
        return torch._C._dispatch_has_kernel_for_dispatch_key("aten::record_stream", key)
    except RecursionError:
        raise
    except (AttributeError, RuntimeError):
        return False


# torch.accelerator.current_accelerator, without its arguments.
current_accelerator: Callable[[], torch.device | None]
current_accelerator = getattr(
    torch._C, "_accelerator_getAccelerator", torch.accelerator.current_accelerator
)
# torch.accelerator.set_stream, but written in C++, so that no interrupt can come within it.
set_stream: Callable[[torch.Stream], None]
set_stream = getattr(torch._C, "_accelerator_setStream", torch.accelerator.set_stream)
# torch.accelerator.current_stream and current_device_index, but five times as fast.
stream_of_index: Callable[[int], torch.Stream]
stream_of_index = getattr(torch._C, "_accelerator_getStream", torch.accelerator.current_stream)
device_index: Callable[[], int]
device_index = getattr(
    torch._C, "_accelerator_getDeviceIndex", torch.accelerator.current_device_index
)


# ------------------------------------------------------------------- the state of a thread

_OF_THREADS = (
    "_ForceDispatchKeyGuard",
    "_InferenceMode",
    "_dispatch_tls_local_exclude_set",
    "_dispatch_tls_local_include_set",
    "_is_fwd_grad_enabled",
    "_is_multithreading_enabled",
    "_set_fwd_grad_enabled",
    "_set_grad_enabled",
    "_set_multithreading_enabled",
    "autocast_decrement_nesting",
    "autocast_increment_nesting",
    "clear_autocast_cache",
    "get_autocast_dtype",
    "is_autocast_cache_enabled",
    "is_autocast_enabled",
    "set_autocast_cache_enabled",
    "set_autocast_dtype",
    "set_autocast_enabled",
)


def thread_state_functions() -> Any:
    """Return what gets and sets the modes of a thread, by its name in ``torch._C`` without ``_``.

    Raises:
        RuntimeError: One is missing. Public functions are in Python, where an interrupt can come
            before a mode is restored.
    """
    found = {name: getattr(torch._C, name, None) for name in _OF_THREADS}
    missing = ", ".join(name for name, function in found.items() if function is None)
    if missing:
        raise RuntimeError(
            "task_local_state() and set_task_state_checks() do not work with torch "
            f"{torch.__version__}, whose torch._C has no {missing}"
        )
    return SimpleNamespace(**{name.lstrip("_"): function for name, function in found.items()})


# -------------------------------------------------------------------------------------- RPC

# The module that calls functions for RPC, and the one through which it calls async functions.
CALLS_FOR_RPC = "torch.distributed.rpc.internal"
CALLS_ASYNC_FOR_RPC = "torch.distributed.rpc.functions"


def remote_exception() -> Any:
    """Return the class of the object that RPC sends if a function raises, or one like it."""
    kind = getattr(sys.modules.get(CALLS_FOR_RPC), "RemoteException", None)
    return kind or namedtuple("_RemoteException", ("msg", "exception_type"))


def this_worker() -> object:
    """Return RPC's WorkerInfo of this process, or None if RPC is not initialised."""
    get_worker_info = getattr(sys.modules.get("torch.distributed.rpc"), "get_worker_info", None)
    try:
        return None if get_worker_info is None else get_worker_info()
    except RecursionError:
        raise
    except RuntimeError:  # it is not initialised
        return None


def rpc_checked(function: str) -> None:
    """Raise RuntimeError if RPC cannot be started in this build of PyTorch."""
    rpc: Any = getattr(getattr(torch, "distributed", None), "rpc", None)
    if rpc is None or not rpc.is_available():
        missing = "torch.distributed.rpc"
    else:
        agents = rpc.backend_registry.BackendType  # TensorPipe, and those that the program added
        if getattr(rpc, "_is_tensorpipe_available", True) or len(agents) > 1:
            return
        missing = "TensorPipe, the agent of torch.distributed.rpc"
    raise RuntimeError(f"{function}() is for RPC, and torch {torch.__version__} lacks {missing}")

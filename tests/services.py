"""Functions that run in the processes of a `Cluster`: those called by RPC, and their callers."""

from __future__ import annotations

import asyncio
import builtins
import gc
import logging
import sys
import threading
import types
from contextlib import ExitStack
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
import sniffio
import torch
import torch.distributed as dist
from torch.distributed import rpc

from torchfut_aio import RpcError, as_completed, as_future, gather
from torchfut_aio.distributed import async_comm_hook, async_rpc, serve_on, shutdown

from .cluster import run_on
from .threads import PATIENCE, PATIENCE_WITH_PROCESSES

# ------------------------------------------------------------------ collectives


def collectives(loop: str) -> dict[str, Any]:
    """Await every kind of collective; return their results."""
    rank, size = dist.get_rank(), dist.get_world_size()

    async def main() -> dict[str, Any]:
        found: dict[str, Any] = {}
        mine = torch.full((size,), float(rank + 1))
        await as_future(dist.all_reduce(mine, async_op=True))
        found["all_reduce"] = mine
        broadcast = torch.tensor([float(rank)])
        await as_future(dist.broadcast(broadcast, src=size - 1, async_op=True))
        found["broadcast"] = broadcast
        everyone = [torch.empty(1) for _ in range(size)]
        await as_future(dist.all_gather(everyone, torch.tensor([float(rank)]), async_op=True))
        found["all_gather"] = torch.cat(everyone)
        part = torch.empty(1)
        parts = torch.tensor([float(rank * size + n) for n in range(size)])
        # Not reduce_scatter, which gloo of torch 2.7 does not have.
        await as_future(dist.reduce_scatter_tensor(part, parts, async_op=True))
        found["reduce_scatter"] = part
        mixed = torch.empty(size)
        await as_future(
            dist.all_to_all_single(mixed, torch.full((size,), float(rank)), async_op=True)
        )
        found["all_to_all"] = mixed
        after, before = (rank + 1) % size, (rank - 1) % size
        received = torch.empty(1)
        sending = dist.isend(torch.tensor([float(rank)]), after)
        await gather([dist.irecv(received, before), sending])
        found["irecv"] = received
        await as_future(dist.barrier(async_op=True))
        return found

    return run_on(loop, main)


def all_reduce_that_waits_for_others(loop: str, functional: bool) -> tuple[bool, float]:
    """Rank 0 lets the others begin only after it has tried to await the result."""
    store = dist.distributed_c10d._get_default_store()
    begin = f"begin on {loop}, {functional}"

    async def first() -> tuple[bool, float]:
        source = all_reduce(functional)
        fut = as_future(source)
        assert as_future(source) is fut
        with anyio.move_on_after(0.1):
            await fut
        early = fut.done()
        store.set(begin, "")
        [reduced] = await fut
        return early, reduced.item()

    async def other() -> tuple[bool, float]:
        store.wait([begin])
        [reduced] = await as_future(all_reduce(functional))
        return False, reduced.item()

    return run_on(loop, first if dist.get_rank() == 0 else other)


def all_reduce(functional: bool) -> Any:
    """Start to reduce one number; return the work, or a tensor that waits on first use."""
    if functional:
        from torch.distributed import _functional_collectives

        return _functional_collectives.all_reduce(torch.ones(1), "sum", dist.group.WORLD)
    return dist.all_reduce(torch.ones(1), async_op=True)


def all_reduce_without_the_last(loop: str) -> str:
    """Return the error of an await when a peer dies; the loop must keep running."""

    async def main() -> str:
        try:
            await as_future(dist.all_reduce(torch.ones(1), async_op=True))
        except Exception as error:
            await anyio.sleep(0.001)
            return type(error).__name__
        return "reduced"

    return run_on(loop, main)


# ------------------------------------------------------------- called by RPC


class Odd(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(first, second)


class Terse(Exception):
    def __str__(self) -> str:
        return "too little"


def of_no_other_process(kind: str) -> Exception:
    """Return an error whose type a caller cannot import, or cannot construct."""

    class Local(Exception):
        pass

    if kind == "local":
        return Local("wrong")
    if kind == "group":
        group = builtins.ExceptionGroup  # new in Python 3.11
        return group("wrong", [Local("wrong"), group("in it", [KeyError("k")])])
    missing = type("Missing", (Exception,), {})
    if kind == "main":
        missing.__module__ = "__main__"
        sys.modules["__main__"].Missing = missing  # type: ignore[attr-defined]
    if kind == "module":
        missing.__module__ = "of_the_callee"
        sys.modules["of_the_callee"] = types.ModuleType("of_the_callee")
        sys.modules["of_the_callee"].Missing = missing  # type: ignore[attr-defined]
    return missing("wrong")


def fails(kind: str) -> None:
    if kind == "odd":
        raise Odd(1, 2)
    if kind == "terse":
        raise Terse("wrong")
    if kind == "noted":
        error = KeyError("wrong")
        error.add_note("a note")
        raise error
    if kind in ("local", "group", "main", "module", "none"):
        raise of_no_other_process(kind)
    kinds = {"value": ValueError, "key": KeyError, "type": TypeError, "stop": StopIteration}
    raise kinds[kind]("wrong: 'ü' \n x")


@async_rpc
async def fails_later(kind: str) -> None:
    await asyncio.sleep(0.001)
    fails(kind)


@async_rpc
async def fails_at_once(kind: str) -> None:
    fails(kind)


@async_rpc
async def exits() -> None:
    sys.exit("not really")


_released = threading.Semaphore(0)


def blocks() -> None:
    """Return when `release` is called in the same process."""
    assert _released.acquire(timeout=PATIENCE_WITH_PROCESSES)


def seven() -> int:
    blocks()
    return 7


def release() -> None:
    _released.release()


@async_rpc
async def where(answer: Any) -> tuple[Any, str, str, str]:
    await anyio.sleep(0.001)
    library = sniffio.current_async_library()
    loop = type(asyncio.get_running_loop()).__module__ if library == "asyncio" else ""
    return answer, library, loop, threading.current_thread().name


_arrived = 0
_all_there: asyncio.Event | None = None


@async_rpc
async def meet(number: int, expected: int) -> tuple[int, int]:
    """Return when ``number`` calls are in flight at once."""
    global _arrived, _all_there
    if _all_there is None:
        _all_there, _arrived = asyncio.Event(), 0
    there = _all_there
    _arrived += 1
    if _arrived == expected:
        _all_there = None
        there.set()
    await there.wait()
    return number, threading.get_ident()


@async_rpc
async def scaled(tensor: torch.Tensor, *, by: float) -> torch.Tensor:
    await asyncio.sleep(0)
    return tensor * by


class Service:
    def __init__(self, base: int) -> None:
        self.base = base

    @async_rpc
    async def add(self, number: int) -> int:
        await asyncio.sleep(0.001)
        return self.base + number

    @staticmethod
    @async_rpc
    async def double(number: int) -> int:
        return 2 * number

    @classmethod
    @async_rpc
    async def name(cls) -> str:
        return cls.__name__


_started = threading.Event()


@async_rpc
async def never() -> None:
    _started.set()
    await asyncio.Event().wait()


@async_rpc
async def sleeps(seconds: float) -> float:
    _started.set()
    await asyncio.sleep(seconds)
    return seconds


def wait_until_started() -> None:
    assert _started.wait(PATIENCE)


# ------------------------------------------------------------------ the callers


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return run_on("asyncio", _call, function, args, kwargs)


async def _call(function: Any, args: Any, kwargs: Any) -> Any:
    return await as_future(rpc.rpc_async("worker1", function, args=args, kwargs=kwargs))


def failure(
    loop: str, function: Any, *args: Any, timeout: float = PATIENCE_WITH_PROCESSES / 2
) -> tuple[str, str]:
    """Return the type and the text of the error of an awaited call."""

    async def main() -> tuple[str, str]:
        with pytest.raises(RpcError) as caught:
            await as_future(rpc.rpc_async("worker1", function, args=args, timeout=timeout))
        kind = type(caught.value).__bases__[-1]
        return f"{kind.__module__}.{kind.__qualname__}", str(caught.value)

    return run_on(loop, main)


def failure_of_a_reference(loop: str, function: Any, *args: Any) -> tuple[str, str]:
    """Return the type and the text of the error of an awaited remote value."""

    async def main() -> tuple[str, str]:
        with pytest.raises(RpcError) as caught:
            await as_future(rpc.remote("worker1", function, args=args))
        kind = type(caught.value).__bases__[-1]
        return f"{kind.__module__}.{kind.__qualname__}", str(caught.value)

    return run_on(loop, main)


def value_of_a_reference(loop: str) -> tuple[bool, int]:
    """Await a remote value that becomes ready only when the same loop makes a second call."""

    async def main() -> tuple[bool, int]:
        reference = rpc.remote("worker1", seven)
        fut = as_future(reference)
        assert as_future(reference) is fut
        with anyio.move_on_after(0.1):
            await fut
        early = fut.done()
        await as_future(rpc.rpc_async("worker1", release))
        return early, await fut

    return run_on(loop, main)


def failures(function: Any, number: int) -> list[str]:
    """Return the texts of the errors of ``number`` calls."""

    async def main() -> list[str]:
        calls = [
            as_future(rpc.rpc_async("worker1", function, args=("key",))) for _ in range(number)
        ]
        return [str(fut.exception().args[0]) async for fut in as_completed(calls)]

    return run_on("asyncio", main)


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert record.exc_info is not None
        self.errors.append(repr(record.exc_info[1]))


_notes = _Notes()
_unretrieved = logging.getLogger("torchfut_aio.unretrieved")


def collect_unretrieved_errors() -> None:
    gc.collect()
    _notes.errors.clear()
    _unretrieved.addHandler(_notes)


def drop_the_error_of_a_direct_call() -> None:
    fails_at_once("odd").then(lambda _: None).wait(PATIENCE)


def unretrieved_errors() -> list[str]:
    gc.collect()
    _unretrieved.removeHandler(_notes)
    return _notes.errors


def many_calls(loop: str, number: int) -> int:
    """Make ``number`` calls at once; return how many threads of the callee ran them."""

    async def main() -> int:
        calls = [as_future(rpc.rpc_async("worker1", meet, args=(n, number))) for n in range(number)]
        answers = await gather(calls)
        assert [n for n, _ in answers] == list(range(number))
        return len({thread for _, thread in answers})

    return run_on(loop, main)


def through_a_reference() -> list[Any]:
    async def main() -> list[Any]:
        service = rpc.remote("worker1", Service, args=(40,))
        answers = await gather([service.rpc_async().add(n) for n in range(3)])
        answers.append(service.rpc_sync().double(4))
        answers.append(service.remote().name().to_here())
        answers.append(await as_future(rpc.rpc_async("worker1", Service.double, args=(5,))))
        answers.append(await as_future(rpc.rpc_async("worker1", Service.name)))
        return answers

    return run_on("asyncio", main)


def serve_on_portal(loop: str) -> None:
    """Serve RPC on a portal in another thread, until `stop_portal`."""
    options = {"asyncio": {}, "uvloop": {"use_uvloop": True}, "trio": {}}[loop]
    backend = "trio" if loop == "trio" else "asyncio"
    stack = ExitStack()
    portal = stack.enter_context(anyio.from_thread.start_blocking_portal(backend, options))
    stack.enter_context(serve_on(portal))
    _portals.append(stack)


_portals: list[ExitStack] = []


def stop_portal() -> None:
    _portals.pop().close()


def call_and_keep(function: Any, *args: Any) -> None:
    """Make a call, and keep its future for `kept`."""
    _kept.append(as_future(rpc.rpc_async("worker1", function, args=args)))


_kept: list[Any] = []


def kept() -> tuple[str, str]:
    """Return the outcome of that call: a type and a text."""
    fut = _kept.pop()

    async def main() -> tuple[str, str]:
        try:
            value = await fut
        except Exception as error:
            await anyio.sleep(0.001)
            return type(error).__bases__[-1].__name__, str(error)
        return type(value).__name__, str(value)

    return run_on("asyncio", main)


def shut_down(graceful: bool, ours: bool) -> list[str]:
    """Shut RPC down, and return the names of the remaining threads."""
    if ours:
        shutdown(graceful)
    else:
        rpc.shutdown(graceful)
    return [t.name for t in threading.enumerate() if t is not threading.main_thread()]


# --------------------------------------------------------------------- DDP hooks


@async_comm_hook
async def mean(state: Any, bucket: dist.GradBucket) -> torch.Tensor:
    tensor = bucket.buffer().div_(dist.get_world_size())
    await as_future(dist.all_reduce(tensor, async_op=True))
    return tensor


@async_comm_hook
async def halved(state: Any, bucket: dist.GradBucket) -> torch.Tensor:
    small = bucket.buffer().to(torch.float16).div_(dist.get_world_size())
    await as_future(dist.all_reduce(small, async_op=True))
    return bucket.buffer().copy_(small)


@async_comm_hook(overlap=True)
async def overlapping_mean(state: Any, bucket: dist.GradBucket) -> torch.Tensor:
    tensor = bucket.buffer().div_(dist.get_world_size())
    await as_future(dist.all_reduce(tensor, async_op=True))
    return tensor


@async_comm_hook
async def in_two_steps(pauses: dict[int, float], bucket: dist.GradBucket) -> torch.Tensor:
    """Two collectives on their own group, after pauses that differ from rank to rank."""
    index = bucket.index()
    await asyncio.sleep(pauses[index % len(pauses)])
    tensor = bucket.buffer().div_(dist.get_world_size())
    largest = tensor.abs().max()
    group = group_of_hooks()
    await as_future(dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group, async_op=True))
    await asyncio.sleep(pauses[(index + 1) % len(pauses)])
    assert tensor.abs().max() <= largest
    await as_future(dist.all_reduce(tensor, group=group, async_op=True))
    assert sum(p.numel() for p in bucket.parameters()) == tensor.numel()
    assert bucket.gradients()[0].shape == bucket.parameters()[0].shape
    return tensor


@async_comm_hook
async def in_two_groups(pauses: dict[int, float], bucket: dist.GradBucket) -> torch.Tensor:
    """Two collectives: one immediately, on the default group; one later, on another group."""
    tensor = bucket.buffer().div_(dist.get_world_size())
    largest = tensor.abs().max()
    await as_future(dist.all_reduce(largest, op=dist.ReduceOp.MAX, async_op=True))
    await asyncio.sleep(pauses[bucket.index() % len(pauses)])
    assert tensor.abs().max() <= largest
    await as_future(dist.all_reduce(tensor, group=group_of_hooks(), async_op=True))
    return tensor


@async_comm_hook
async def of_neighbours(state: Any, bucket: dist.GradBucket) -> torch.Tensor:
    """The mean with the previous rank's gradients: send to one neighbour, receive from another."""
    rank, size = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(bucket.buffer())
    sending = dist.isend(bucket.buffer(), (rank + 1) % size)
    await gather([dist.irecv(received, (rank - 1) % size), sending])
    return received.add_(bucket.buffer()).div_(2)


_group: Any = None


def group_of_hooks() -> Any:
    """Return the group for collectives that hooks start after they have suspended."""
    return _group


def make_group_of_hooks() -> None:
    """Create that group once, on all ranks."""
    global _group
    _group = _group or dist.new_group()


_running = 0
_most = 0


@async_comm_hook(overlap=True)
async def overlapping(state: Any, bucket: dist.GradBucket) -> torch.Tensor:
    global _running, _most
    _running += 1
    _most = max(_most, _running)
    tensor = bucket.buffer().div_(dist.get_world_size())
    await as_future(dist.all_reduce(tensor, async_op=True))
    with anyio.move_on_after(PATIENCE):
        # In the first step there is only one bucket.
        while _most == 1 and not bucket.is_last():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    _running -= 1
    return tensor


@async_comm_hook
async def breaks(state: dict[str, Any], bucket: dist.GradBucket) -> Any:
    if state["how"] == "raises at once" and bucket.index() == state["at"]:
        raise Odd(3, 4)
    tensor = bucket.buffer().div_(dist.get_world_size())
    await as_future(dist.all_reduce(tensor, async_op=True))
    if bucket.index() != state["at"]:
        return tensor
    if state["how"] == "raises":
        raise Odd(3, 4)
    return [tensor] if state["how"] == "list" else tensor[1:]


def trained(
    hook: Any, state: Any, steps: int, backend_hook: Any = None, extra: Any = torch.nn.Identity
) -> Any:
    """Train with DDP; return the losses and the weights, and those of plain DDP."""
    return [_train(hook, state, steps, extra), _train(backend_hook, None, steps, extra)]


def trained_with_collectives(hook: Any, steps: int) -> Any:
    """Run `trained` with a model whose backward pass uses collectives as well."""
    make_group_of_hooks()
    return trained(hook, _pauses(), steps, extra=_SumsGradients)


def trained_with_unused_parameters(hook: Any, steps: int) -> Any:
    """Run `trained` with a model for which DDP also reduces the set of used parameters."""
    return trained(hook, None, steps, extra=_Unused)


def neighbours_hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP checks annotations
    """Do the same as `of_neighbours`, but block."""
    rank, size = dist.get_rank(), dist.get_world_size()
    everyone = [torch.empty_like(bucket.buffer()) for _ in range(size)]
    dist.all_gather(everyone, bucket.buffer())
    fut: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    fut.set_result(everyone[(rank - 1) % size].add_(bucket.buffer()).div_(2))
    return fut


class _Sums(torch.autograd.Function):
    """All-reduces in the backward pass, as many numbers as a bucket of `_model` has."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        total = grad.sum().expand(_BUCKET).clone()
        dist.all_reduce(total)
        return grad * (1 + total.mean().tanh())


class _SumsGradients(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Sums.apply(x)  # type: ignore[no-untyped-call]


class _Unused(torch.nn.Module):
    """A layer in which not all parameters are used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


_BUCKET = 64 * 64 + 64


def _model(hook: Any, state: Any, extra: Any = torch.nn.Identity) -> Any:
    torch.manual_seed(0)
    layers = [module for _ in range(4) for module in (torch.nn.Linear(64, 64), extra())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(64, 1))
    # Small enough that each layer has its own bucket.
    ddp = torch.nn.parallel.DistributedDataParallel(
        model, bucket_cap_mb=0.01, find_unused_parameters=extra is _Unused
    )
    if hook is not None:
        ddp.register_comm_hook(state, hook)
    return ddp


def _train(hook: Any, state: Any, steps: int, extra: Any) -> tuple[list[float], list[torch.Tensor]]:
    ddp = _model(hook, state, extra)
    optimiser = torch.optim.Adam(ddp.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(steps):
        data = torch.randn(16, 64, generator=generator)
        loss = torch.nn.functional.mse_loss(ddp(data), data.sum(1, keepdim=True))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in ddp.parameters()]


def trained_with_pauses(steps: int) -> Any:
    make_group_of_hooks()
    return trained(in_two_steps, _pauses(), steps)


def _pauses() -> dict[int, float]:
    return {n: 0.002 * ((n + dist.get_rank()) % 3) for n in range(5)}


def most_at_once(steps: int) -> Any:
    return trained(overlapping, None, steps), _most


def broken(how: str, at: int) -> list[tuple[str, str]]:
    """Return what each call of ``backward()`` raises."""
    state = {"how": how, "at": at}
    ddp = _model(breaks, state)
    raised = []
    for _ in range(4):
        try:
            ddp(torch.ones(2, 64)).sum().backward()
        except Exception as error:
            raised.append((type(error).__name__, str(error)))
    state["at"] = None  # training must still work
    ddp.zero_grad()
    ddp(torch.full((2, 64), float(dist.get_rank()))).sum().backward()
    bias = ddp.module[-1].bias
    assert bias.grad.item() == 2.0
    return raised

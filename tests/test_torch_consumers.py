"""PyTorch's own consumers of futures accept ours, and see the completion at once."""

from __future__ import annotations

import pathlib
import threading
import weakref

import pytest
import torch

from torchfut_aio import Future

from . import forks
from .threads import PATIENCE, running, until

ROOT = pathlib.Path(__file__).parents[1]


def test_the_cpp_future_is_complete_when_the_setter_returns():
    fut, failed = Future(), Future()
    assert not torch._C.Future.done(fut)
    fut.set_result([1, 2])
    failed.set_exception(ValueError("foo"))
    assert torch._C.Future.done(fut)
    assert torch._C.Future.wait(fut) == torch._C.Future.value(fut) == [1, 2]
    with pytest.raises(ValueError, match="foo") as caught:
        torch._C.Future.wait(failed)
    assert caught.value is failed.exception()


def test_torch_collect_all_accepts_our_futures():
    ours, plain = Future(), torch.futures.Future()
    combined = torch.futures.collect_all([ours, plain])
    seen = []
    combined.add_done_callback(lambda fut: seen.append([f.wait() for f in fut.value()]))
    ours.set_result(1)
    plain.set_result(2)
    assert seen == [[1, 2]]
    assert torch.futures.wait_all([ours, plain]) == [1, 2]


def test_torch_wait_all_raises_the_error_of_our_future():
    ours = Future()
    ours.set_exception(KeyError("foo"))
    with pytest.raises(KeyError, match="foo"):
        torch.futures.wait_all([ours])


def test_error_held_only_by_torch_keeps_its_type_and_text():
    ours = Future()
    combined = torch.futures.collect_all([ours])
    ours.set_exception(KeyError("foo"))
    ref = weakref.ref(ours)
    del ours
    assert ref() is None
    with pytest.raises(KeyError, match="KeyError: 'foo'"):
        combined.wait()


def test_torch_consumer_callback_can_read_the_future():
    ours = Future()
    woken = threading.Event()
    seen = []

    def consumer(fut):
        seen.append(ours.wait())
        seen.append(ours.then(lambda f: "inline").value())
        seen.append(woken.wait(PATIENCE))

    torch.futures.collect_all([ours]).add_done_callback(consumer)

    def wait():
        ours.wait()
        woken.set()

    with running(wait):
        until(lambda: "waiters=1" in repr(ours))
        ours.set_result(5)
    assert seen == [5, "inline", True]


def test_ddp_communication_hook_can_return_our_future(group_of_one):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    threads = []

    def hook(state, bucket):
        fut = Future()
        buffer = bucket.buffer()
        thread = threading.Thread(target=lambda: fut.set_result(buffer.mul_(2)))
        threads.append(thread)
        thread.start()
        return fut.then(lambda f: f.value() / 2)

    ddp.register_comm_hook(None, hook)
    data = torch.ones(3, 4)
    ddp(data).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(data).sum().backward()
    for mine, plain in zip(got, model.parameters(), strict=True):
        assert torch.equal(mine, plain.grad)
    for thread in threads:
        thread.join(PATIENCE)
    assert threads


@pytest.mark.usefixtures("tensorpipe")
def test_error_of_our_future_returned_by_rpc_reaches_the_caller(tmp_path):
    program = f"""
import torch.distributed.rpc as rpc
from torchfut_aio import Future

@rpc.functions.async_execution
def fails():
    fut = Future()
    fut.set_exception(ValueError("the callee"))
    return fut

@rpc.functions.async_execution
def fails_in_then():
    fut = Future()
    child = fut.then(lambda fut: int("the callback"))
    fut.set_result(None)
    return child

@rpc.functions.async_execution
def works():
    fut = Future()
    child = fut.then(lambda fut: fut.value() + 1)
    fut.set_result(4)
    return child

options = rpc.TensorPipeRpcBackendOptions(init_method="file://{tmp_path}/rpc")
rpc.init_rpc("worker", rank=0, world_size=1, rpc_backend_options=options)
try:
    assert rpc.rpc_sync("worker", works) == 5
    for function, text in (fails, "the callee"), (fails_in_then, "the callback"):
        try:
            print("returned", rpc.rpc_sync("worker", function))
        except ValueError as error:
            print("raised", text in str(error))
finally:
    rpc.shutdown()
"""
    path = tmp_path / "program.py"
    path.write_text(program)
    done = forks.run(path, filters="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["raised True", "raised True", ""]

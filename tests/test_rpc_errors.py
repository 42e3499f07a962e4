"""Errors on their way through C++: which are restored, and which are left unchanged."""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import operator
import pickle
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.rpc.internal import RemoteException, _handle_exception, serialize

from torchfut_aio import CallbackError, Future, RpcError, _errors, _rpc_errors, as_future

from .accelerator import FIRST


class Odd(Exception):
    def __init__(self, first, second):
        super().__init__(first, second)


class Unprintable(Exception):
    def __init__(self, first, second):
        self.first = first

    def __str__(self):
        return f"{self.first}"


def adopted(text, kind=RuntimeError):
    """Return what `as_future` makes of the error of a torch future that failed with that text."""
    fut = torch.futures.Future()
    fut.set_exception(kind(text))
    return as_future(fut).exception()


def remote(message, *, name="ValueError", worker="On WorkerInfo(id=1, name=w):\n"):
    """Return the text that a caller gets when a remote function raised."""
    trace = f'Traceback (most recent call last):\n  File "f.py", line 1, in f\n    f()\n{message}\n'
    return f"{name}: {worker}repr\n{trace}\n\nAt:\n  internal.py(236): _handle_exception\n"


def not_made(shown, message):
    """Return the text that a caller gets when the error cannot be constructed from a text."""
    return remote(message, name="RuntimeError").replace(
        "On WorkerInfo(id=1, name=w):\nrepr",
        "Failed to create original exception type. Error msg was no. Original exception on "
        f"remote side was On WorkerInfo(id=1, name=w):\n{shown}",
    )


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (remote("ValueError: x"), ValueError),
        (remote("OSError: [Errno 2] No such file", name="OSError"), OSError),
        (remote("asyncio.exceptions.TimeoutError", name="TimeoutError"), TimeoutError),
        (remote(f"{__name__}.Odd: (1, 2)", name="Odd"), Odd),
        (remote("InMain: x", name="InMain"), "InMain"),
        (remote("Outer.InMain: x", name="InMain"), "Outer.InMain"),
        (remote("Nowhere: x", name="Nowhere"), RpcError),
        (remote("no.such.module.Error: x", name="Error"), RpcError),
        (remote("SystemExit: 3", name="SystemExit"), RpcError),
        (remote("KeyboardInterrupt", name="KeyboardInterrupt"), RpcError),
        (remote("StopIteration: x", name="StopIteration"), RpcError),
        (remote("os.path.join: x", name="join"), RpcError),
        (remote("UnicodeDecodeError: x", name="UnicodeDecodeError"), UnicodeDecodeError),
        (remote(f"{__name__}.Unprintable: x", name="Unprintable"), Unprintable),
        (not_made("Odd(1, 2)", f"{__name__}.Odd: (1, 2)"), Odd),
        (not_made("ExceptionGroup('g', [KeyError()])", "ValueError: the context"), RpcError),
        (remote("ValueError: x", worker="500: On WorkerInfo(id=1, name=w):\n"), ValueError),
        (remote("ValueError: x", worker="elsewhere\n"), RuntimeError),
        ("eof (this error originated at tensorpipe/transport/shm.cc:259)", ConnectionError),
        ("ValueError: x", RuntimeError),
        ("RPCErr:1:too slow", TimeoutError),
        ("RPCErr:0:unknown", RuntimeError),
        ("a text of RPCErr:1:", RuntimeError),
    ],
)
def test_remote_text_becomes_the_error_it_names_if_any(text, kind, monkeypatch):
    main = sys.modules["__main__"]
    for name in "InMain", "Outer":
        monkeypatch.setattr(main, name, type(name, (Exception,), {}), raising=False)
    main.Outer.InMain = type("InMain", (Exception,), {"__qualname__": "Outer.InMain"})
    error = adopted(text)
    if isinstance(kind, str):
        kind = operator.attrgetter(kind)(main)
    if kind is RuntimeError:
        assert type(error) is kind
    else:
        assert isinstance(error, RpcError)
        assert type(error) is kind or type(error).__bases__ == (RpcError, kind)
        assert str(error) in text
        assert repr(str(error)) in repr(error)
        again = pickle.loads(pickle.dumps(adopted(remote("KeyError: x", name="KeyError"))))
        assert isinstance(again, KeyError)


def test_error_text_is_exactly_the_remote_text():
    error = adopted(remote("ValueError: x"))
    assert str(error).startswith("On WorkerInfo(id=1, name=w):\nrepr\nTraceback")
    assert str(error).endswith("ValueError: x\n")


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, TypeError])
def test_error_types_delivered_by_torch_are_all_parsed(kind):
    error = adopted(remote("KeyError: x", name="KeyError"), kind)
    assert isinstance(error, RpcError)
    assert isinstance(error, KeyError)
    assert type(adopted("x", kind)) is kind


def test_error_types_not_delivered_by_torch_are_unchanged():
    error = KeyError(remote("ValueError: x"))
    fut = torch.futures.Future()
    fut.set_exception(error)
    assert as_future(fut).exception() is error


@contextmanager
def worker():
    """Emulate a process that takes part in RPC."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rpc_errors, "this_worker", lambda: "WorkerInfo(id=1, name=w)")
        yield


@given(st.text(), st.sampled_from([ValueError, KeyError, Odd]))
def test_error_with_any_text_survives_rpc(text, kind):
    error = kind(text, 1) if kind is Odd else kind(text)
    fut = Future()
    with worker():
        fut.set_exception(error)
    sent, tensors = serialize(_value_in_cpp(fut))
    assert tensors == []
    try:
        _handle_exception(pickle.loads(sent))
    except Exception as raised:
        message = (
            f"{type(raised).__name__}: {raised}\n\nAt:\n  internal.py(236): _handle_exception\n"
        )
    arrived = adopted(message)
    assert isinstance(arrived, RpcError)
    assert isinstance(arrived, kind)
    assert repr(error) in str(arrived)


def test_long_error_texts_are_parsed_quickly():
    for text in ("  \n" * 100_000, "a." * 100_000, "\n\nAt:\n  x" * 50_000, "'" * 100_000):
        start = time.thread_time()
        adopted(remote(text))
        assert time.thread_time() - start < 5


def _value_in_cpp(fut):
    """Return the value of a failed future in C++."""
    seen = []
    torch._C.Future.add_done_callback(fut, lambda done: None)
    torch._C.Future._set_unwrap_func(fut, seen.append)
    torch._C.Future.wait(fut)
    return seen[0]


def test_sent_error_includes_the_traceback():
    fut = Future()
    with worker():
        try:
            raise ValueError("foo")
        except ValueError as error:
            fut.set_exception(error)
    value = _value_in_cpp(fut)
    del fut
    sent = pickle.loads(pickle.dumps(value))
    assert type(sent) is RemoteException
    assert sent.exception_type is ValueError
    assert "in test_sent_error_includes_the_traceback" in sent.msg


def sent_for(error):
    """Return the error that RPC raises in the caller, which may be another program."""
    fut = Future()
    with worker():
        fut.set_exception(error)
    sent, _ = serialize(_value_in_cpp(fut))
    with pytest.raises(RpcError) as caught:
        _handle_exception(pickle.loads(sent))
    return caught.value


def test_error_class_is_imported_by_name_at_the_caller(monkeypatch, tmp_path):
    (tmp_path / "of_a_library.py").write_text("class Wrong(Exception):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    error = importlib.import_module("of_a_library").Wrong("x")
    del sys.modules["of_a_library"]  # the caller may not have imported it
    bases = type(sent_for(error)).__bases__
    assert bases == (RpcError, sys.modules.pop("of_a_library").Wrong)


def test_exit_of_a_callee_does_not_exit_the_caller():
    for error in SystemExit(3), KeyboardInterrupt():
        assert type(sent_for(error)) is RpcError


def test_group_without_its_errors_becomes_a_plain_rpc_error():
    class Group(Exception):  # as in the backport to older Pythons
        def subgroup(self):
            pass

    assert type(_errors.rpc_error(Group, "text")) is RpcError


def test_sent_callback_error_is_the_original_error():
    fut = Future()
    child = fut.then(lambda fut: {}["missing"])
    with worker():
        fut.set_result(None)
    assert isinstance(child.exception(), CallbackError)
    sent = pickle.loads(pickle.dumps(_value_in_cpp(child)))
    assert sent.exception_type is KeyError
    assert "missing" in sent.msg


def test_isinstance_check_raises_the_error_only_in_autograd():
    fut = Future()
    fut.set_exception(Odd(1, 2))
    value = _value_in_cpp(fut)
    assert not isinstance(value, torch.Tensor)
    assert isinstance(value, RemoteException)
    inside = {"__name__": "torch.autograd.graph", "value": value, "torch": torch}
    with pytest.raises(Odd) as caught:
        exec("isinstance(value, torch.Tensor)", inside)
    assert caught.value is fut.exception()


@pytest.mark.device
def test_an_error_of_a_future_with_devices_keeps_its_type(accelerator):
    class Local(Exception):  # cannot be pickled
        pass

    for error in KeyError("k"), Odd(1, 2), Local("l"):
        fut = Future(devices=[FIRST])
        combined = torch.futures.collect_all([fut])
        fut.set_exception(error)
        with pytest.raises(type(error)) as caught:
            combined.wait()
        assert caught.value is error


class Strange(RuntimeError):
    def __str__(self):
        raise ValueError("__str__")

    def __repr__(self):
        raise ValueError("__repr__")


@pytest.mark.parametrize(
    "made",
    [
        lambda: Strange("x"),
        lambda: RuntimeError(Strange("x")),
        lambda: RuntimeError("KeyError: 'On WorkerInfo(' , 1"),
    ],
    ids=["itself", "argument", "tuple"],
)
def test_misbehaving_error_still_reaches_its_future(made):
    error = made()
    source = concurrent.futures.Future()
    adopted = as_future(source)
    source.set_exception(error)
    assert adopted.exception() is error
    fut = torch.futures.Future()
    fut.set_result(None)
    raised = as_future(fut).then(lambda fut: _raise(error))
    assert raised.exception().__cause__ is error


def _raise(error):
    raise error


def test_error_of_a_concurrent_future_is_not_parsed():
    source = concurrent.futures.Future()
    adopted = as_future(source)
    source.set_exception(RuntimeError("RPCErr:1:too slow"))
    assert adopted.exception() is source.exception()


def test_rpc_timeout_is_raised_as_timeout_error():
    fut = torch.futures.Future()
    fut.set_exception(RuntimeError("RPCErr:1:RPC ran for more than set timeout (300 ms)"))

    async def main():
        with pytest.raises(TimeoutError, match="300 ms") as caught:
            await as_future(fut)
        assert isinstance(caught.value, RpcError)

    asyncio.run(main())

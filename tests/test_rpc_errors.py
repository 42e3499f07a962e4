"""Errors on their way through C++: what becomes of them, and what is left as it is."""

from __future__ import annotations

import asyncio
import pickle
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.rpc.internal import RemoteException, _handle_exception, serialize

from torchfut_aio import CallbackError, Future, as_future


class Odd(Exception):
    def __init__(self, first, second):
        super().__init__(first, second)


class Unprintable(Exception):
    def __init__(self, first, second):
        self.first = first

    def __str__(self):
        return f"{self.first}"


def adopted(text, kind=RuntimeError):
    """What `as_future` makes of a future of torch that failed with that text."""
    fut = torch.futures.Future()
    fut.set_exception(kind(text))
    return as_future(fut).exception()


def remote(told, *, name="ValueError", worker="On WorkerInfo(id=1, name=w):\n"):
    """What a caller is told of a function that raised."""
    trace = f'Traceback (most recent call last):\n  File "f.py", line 1, in f\n    f()\n{told}\n'
    return f"{name}: {worker}repr\n{trace}\n\nAt:\n  internal.py(236): _handle_exception\n"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (remote("ValueError: x"), ValueError),
        (remote("OSError: [Errno 2] No such file", name="OSError"), OSError),
        (remote("asyncio.exceptions.TimeoutError", name="TimeoutError"), TimeoutError),
        (remote(f"{__name__}.Odd: (1, 2)", name="Odd"), Odd),
        (remote("__main__.Nowhere: x", name="Nowhere"), RuntimeError),
        (remote("no.such.module.Error: x", name="Error"), RuntimeError),
        (remote("SystemExit: 3", name="SystemExit"), RuntimeError),
        (remote("KeyboardInterrupt", name="KeyboardInterrupt"), RuntimeError),
        (remote("os.path.join: x", name="join"), RuntimeError),
        (remote("ValueError: x", worker="elsewhere\n"), RuntimeError),
        (remote(f"{__name__}.Unprintable: x", name="Unprintable"), RuntimeError),
        ("ValueError: x", RuntimeError),
        ("RPCErr:1:too slow", TimeoutError),
        ("RPCErr:0:unknown", RuntimeError),
        ("a text of RPCErr:1:", RuntimeError),
    ],
)
def test_a_text_becomes_the_error_that_it_tells_of_or_stays(text, kind):
    assert type(adopted(text)) is kind


def test_the_text_is_that_of_the_remote_side_and_no_more():
    error = adopted(remote("ValueError: x"))
    assert str(error).startswith("On WorkerInfo(id=1, name=w):\nrepr\nTraceback")
    assert str(error).endswith("ValueError: x\n")


def test_other_types_are_as_they_are():
    error = KeyError(remote("ValueError: x"))
    fut = torch.futures.Future()
    fut.set_exception(error)
    assert as_future(fut).exception() is error


@given(st.text(), st.sampled_from([ValueError, KeyError, Odd]))
def test_an_error_survives_the_way_through_rpc_whatever_its_text(text, kind):
    error = kind(text, 1) if kind is Odd else kind(text)
    fut = Future()
    fut.set_exception(error)
    sent, tensors = serialize(_value_in_cpp(fut))
    assert tensors == []
    received = pickle.loads(sent)
    try:
        _handle_exception(received._replace(msg="On WorkerInfo(id=1, name=w):\n" + received.msg))
    except Exception as raised:
        told = f"{type(raised).__name__}: {raised}\n\nAt:\n  internal.py(236): _handle_exception\n"
    arrived = adopted(told)
    assert type(arrived) is kind
    assert repr(error) in arrived.args[0]


def test_long_texts_take_no_time():
    for text in ("  \n" * 100_000, "a." * 100_000, "\n\nAt:\n  x" * 50_000, "'" * 100_000):
        start = time.perf_counter()
        adopted(remote(text))
        assert time.perf_counter() - start < 5


def _value_in_cpp(fut):
    """What C++ has of a failed future for a value."""
    seen = []
    torch._C.Future.add_done_callback(fut, lambda done: None)
    torch._C.Future._set_unwrap_func(fut, seen.append)
    torch._C.Future.wait(fut)
    return seen[0]


def test_what_is_sent_has_the_traceback():
    fut = Future()
    try:
        raise ValueError("foo")
    except ValueError as error:
        fut.set_exception(error)
    sent = pickle.loads(pickle.dumps(_value_in_cpp(fut)))
    assert type(sent) is RemoteException
    assert sent.exception_type is ValueError
    assert "in test_what_is_sent_has_the_traceback" in sent.msg


def test_what_is_sent_of_a_callback_error_is_the_callbacks_own():
    fut = Future()
    child = fut.then(lambda fut: {}["missing"])
    fut.set_result(None)
    assert isinstance(child.exception(), CallbackError)
    sent = pickle.loads(pickle.dumps(_value_in_cpp(child)))
    assert sent.exception_type is KeyError
    assert "missing" in sent.msg


def test_who_asks_a_stand_in_for_its_class_gets_the_error():
    fut = Future()
    fut.set_exception(Odd(1, 2))
    value = _value_in_cpp(fut)
    with pytest.raises(Odd) as caught:
        isinstance(value, torch.Tensor)
    assert caught.value is fut.exception()


def test_a_timeout_of_an_rpc_is_awaited_as_one():
    fut = torch.futures.Future()
    fut.set_exception(RuntimeError("RPCErr:1:RPC ran for more than set timeout (300 ms)"))

    async def main():
        with pytest.raises(TimeoutError, match="300 ms"):
            await as_future(fut)

    asyncio.run(main())

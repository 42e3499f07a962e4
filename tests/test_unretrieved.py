"""An error that was never retrieved is logged when its future is garbage-collected."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import logging

import anyio
import pytest

from torchfut_aio import (
    Future,
    InvalidStateError,
    as_completed,
    as_future,
    collect_all,
    gather,
    start_soon,
    wait_all,
    with_timeout,
)

from . import forks
from .loops import on_every_loop
from .threads import PATIENCE

LOGGER = "torchfut_aio.unretrieved"


def failed(error=None):
    fut = Future()
    fut.set_exception(error or ValueError("foo"))
    return fut


@pytest.fixture
def logged(caplog):
    """Return the unretrieved errors that were logged since the last call."""

    def logged():
        gc.collect()
        errors = [r.exc_info[1] for r in caplog.records if r.name == LOGGER]
        caplog.clear()
        return errors

    yield logged
    assert logged() == []


@pytest.fixture
def left_by_an_earlier_test():
    cycle = [failed()]
    cycle.append(cycle)


def test_error_log_is_empty_at_the_start_of_a_test(left_by_an_earlier_test, caplog):
    gc.collect()
    assert not caplog.records


def test_unretrieved_error_is_logged_with_its_traceback(logged):
    fut = Future()
    try:
        raise ValueError("foo")
    except ValueError as error:
        fut.set_exception(error)
    del fut
    [error] = logged()
    assert str(error) == "foo"
    assert error.__traceback__ is not None


def test_unretrieved_error_posing_as_a_cancellation_is_logged(logged):
    class Odd(Exception):
        __class__ = asyncio.CancelledError

    fut = Future()
    fut.set_exception(Odd())
    del fut
    assert [type(error) for error in logged()] == [Odd]


def test_unretrieved_error_of_a_raising_callback_is_logged(logged):
    fut = Future()
    fut.then(lambda _: 1 / 0)
    fut.set_result(1)
    [error] = logged()
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_unretrieved_error_of_an_adopted_future_is_logged(logged):
    source = concurrent.futures.Future()
    adopted = as_future(source)
    source.set_exception(ValueError("foo"))
    del adopted, source
    [error] = logged()
    assert str(error) == "foo"


def test_unretrieved_error_of_a_task_is_logged_once(logged):
    async def bad():
        raise ValueError("foo")

    async def main():
        async with anyio.create_task_group() as group:
            start_soon(group, bad)

    asyncio.run(main())
    [error] = logged()
    assert str(error) == "foo"


def test_chain_logs_only_the_error_of_its_last_future(logged):
    fut = Future()
    fut.then(lambda f: f.value()).then(lambda f: f.value())
    fut.set_exception(ValueError("foo"))
    del fut
    assert len(logged()) == 1


def wait(fut):
    with contextlib.suppress(ValueError):
        fut.wait()


def value(fut):
    with contextlib.suppress(ValueError):
        fut.value()


def await_(fut):
    async def main():
        with pytest.raises(ValueError, match="foo"):
            await fut

    asyncio.run(main())


def as_asyncio(fut):
    async def main():
        with pytest.raises(ValueError, match="foo"):
            await fut.as_asyncio()

    asyncio.run(main())


def wait_in_cpp(fut):
    with pytest.raises(ValueError, match="foo"):
        super(Future, fut).wait()


def wait_for_all(fut):
    with pytest.raises(ValueError, match="foo"):
        wait_all([fut])


RETRIEVALS = [
    wait,
    value,
    Future.exception,
    await_,
    as_asyncio,
    wait_in_cpp,
    lambda fut: fut.then(lambda fut: fut.exception()).wait(),
    lambda fut: gather([fut]).exception(),
    lambda fut: collect_all([fut]).exception(),
    lambda fut: with_timeout(fut, PATIENCE).exception(),
    wait_for_all,
    lambda fut: [done.exception() for done in as_completed([fut])],
]


@pytest.mark.parametrize("retrieve", RETRIEVALS)
def test_retrieved_error_is_not_logged(retrieve, logged):
    retrieve(failed())
    assert logged() == []


@on_every_loop
async def test_error_raised_in_a_task_is_not_logged(logged):
    with pytest.raises(ValueError, match="foo"):
        await failed()
    assert logged() == []


@pytest.mark.parametrize("combine", [collect_all, gather])
@pytest.mark.parametrize("retrieved", [True, False])
def test_combined_failures_log_or_retrieve_a_single_error(combine, retrieved, logged):
    futures = [Future() for _ in range(9)]
    combined = combine(futures)
    for fut in futures:
        fut.set_exception(ValueError("foo"))
    if retrieved:
        assert combined.exception() is not None
    del futures, fut, combined
    assert len(logged()) == (not retrieved)


def test_error_retrieved_from_a_part_is_not_logged_for_the_whole(logged):
    futures = [failed(), failed()]
    combined = [collect_all(futures), gather(futures), with_timeout(futures[0], PATIENCE)]
    assert [str(fut.exception()) for fut in futures] == ["foo"] * 2
    del futures, combined
    assert logged() == []


def test_error_refused_by_a_done_future_is_not_logged(logged):
    fut = Future()
    fut.set_result(5)
    with pytest.raises(InvalidStateError):
        fut.set_exception(ValueError("foo"))
    assert logged() == []


@pytest.mark.parametrize("kind", [asyncio.CancelledError, concurrent.futures.CancelledError])
def test_a_cancellation_is_not_logged(kind, logged):
    failed(kind())
    assert logged() == []


def test_repr_does_not_retrieve_the_error(logged):
    assert "foo" in repr(failed())
    assert len(logged()) == 1


def test_unretrieved_error_log_can_be_disabled_by_its_logger(logged, caplog):
    caplog.set_level(logging.CRITICAL, LOGGER)
    failed()
    assert logged() == []


def test_unretrieved_error_is_not_logged_at_interpreter_exit():
    program = "import torchfut_aio; f = torchfut_aio.Future(); f.set_exception(ValueError())"
    assert forks.output(program) == ""

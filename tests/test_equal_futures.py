"""A future is compared by identity, whatever its ``==`` and ``hash`` return."""

from __future__ import annotations

import asyncio
import concurrent.futures
from dataclasses import dataclass, field

import pytest
import torch

from torchfut_aio import (
    Future,
    as_completed,
    as_future,
    collect_all,
    gather,
    set_results,
    wait_all,
    with_timeout,
)

from .loops import on_asyncio, on_every_loop
from .threads import PATIENCE, running


def equal(base):
    """Classes whose instances are all equal: two with a constant hash, one without a hash."""

    class Equal(base):
        def __eq__(self, other):
            return True

        def __hash__(self):
            return 5

    class Raises(base):
        def __eq__(self, other):
            raise TypeError("these cannot be compared")

        def __hash__(self):
            return 5

    @dataclass
    class Record(base):
        name: str = field(default="", init=False)

        __init__ = base.__init__

    return [Equal, Raises, Record]


OURS = [pytest.param(kind, id=kind.__name__) for kind in equal(Future)]
SOURCES = [
    pytest.param(kind, id=f"{base.__module__}-{kind.__name__}")
    for base in (torch.futures.Future, concurrent.futures.Future)
    for kind in equal(base)
]
kinds = pytest.mark.parametrize("kind", [*OURS, *SOURCES])


def completed(kind):
    futures = [kind() for _ in range(3)]
    for n, fut in enumerate(futures):
        fut.set_result(n)
    return futures


@kinds
@pytest.mark.parametrize("when", ["before", "after"])
def test_equal_futures_are_gathered_separately(kind, when):
    futures = [kind() for _ in range(3)]
    gathered, collected = (gather(futures), collect_all(futures)) if when == "before" else (0, 0)
    for n, fut in enumerate(futures):
        assert when == "after" or not gathered.done()
        fut.set_result(n)
    if when == "after":
        gathered, collected = gather(futures), collect_all(futures)
    assert gathered.wait(PATIENCE) == [0, 1, 2]
    assert [id(fut) for fut in collected.wait(PATIENCE)] == [id(fut) for fut in futures]


@kinds
def test_equal_futures_are_waited_for_separately(kind):
    futures = [kind() for _ in range(3)]
    with running(*(lambda n=n: futures[n].set_result(n) for n in range(3))):
        assert wait_all(futures, timeout=PATIENCE) == [0, 1, 2]


@kinds
def test_one_failure_among_equal_futures_fails_their_gather(kind):
    futures = [kind() for _ in range(3)]
    gathered = gather(futures)
    futures[1].set_exception(ValueError("foo"))
    assert isinstance(gathered.exception(), ValueError)


@on_every_loop
@kinds
async def test_equal_futures_complete_one_by_one(kind):
    assert [fut.value() async for fut in as_completed(completed(kind))] == [0, 1, 2]
    assert [fut.value() for fut in as_completed(completed(kind))] == [0, 1, 2]
    futures = [kind() for _ in range(3)]
    pending = as_completed(futures)
    for n in (2, 0, 1):
        futures[n].set_result(n)
        assert (await anext(pending)).value() == n


@pytest.mark.parametrize("kind", OURS)
def test_equal_futures_get_separate_results(kind):
    futures = [kind() for _ in range(3)]
    assert set_results(futures, ["abc"] + [1, 2]) == []
    assert [fut.value() for fut in futures] == ["abc", 1, 2]


@kinds
def test_equal_sources_are_adopted_separately(kind):
    futures = [kind() for _ in range(3)]
    adopted = [as_future(fut, devices=[]) for fut in futures]
    assert len({id(fut) for fut in adopted}) == 3
    assert as_future(futures[0], devices=[]) is adopted[0]
    timed = [with_timeout(fut, PATIENCE) for fut in futures]
    for n, fut in enumerate(futures):
        fut.set_result(n)
    assert wait_all(adopted, timeout=PATIENCE) == wait_all(timed, timeout=PATIENCE) == [0, 1, 2]


@pytest.mark.parametrize("kind", equal(asyncio.Future))
@on_asyncio
async def test_equal_asyncio_futures_are_adopted_separately(kind):
    futures = [kind() for _ in range(3)]
    gathered = gather(futures)
    for n, fut in enumerate(futures):
        fut.set_result(n)
    assert await gathered == [0, 1, 2]

"""Callbacks and tasks run in the context of the code that added or started them."""

from __future__ import annotations

import contextvars
import threading

import anyio
import anyio.lowlevel
import pytest
from anyio.from_thread import start_blocking_portal

from torchfut_aio import Future, start_soon

from .loops import on_every_loop
from .threads import PATIENCE, alongside

variable = contextvars.ContextVar("variable", default="none")


def adds_callback(fut, callback):
    fut.add_done_callback(callback)


def adds_child(fut, callback):
    fut.then(callback)


adders = pytest.mark.parametrize("add", [adds_callback, adds_child])


@pytest.fixture
def value_of_this_test():
    token = variable.set("this test's")
    yield
    variable.reset(token)


@adders
@pytest.mark.parametrize("when", ["pending", "done"])
def test_a_callback_runs_in_the_context_that_added_it(add, when, value_of_this_test):
    fut, seen = Future(), []

    def callback(fut):
        seen.append(variable.get())
        variable.set("the callback's")

    if when == "done":
        fut.set_result(5)
    add(fut, callback)
    variable.set("later")
    if when == "pending":
        thread = threading.Thread(target=fut.set_result, args=(5,))
        thread.start()
        thread.join(PATIENCE)
    add(fut, callback)
    assert seen == ["this test's", "later"]
    assert variable.get() == "later"


@adders
def test_callbacks_do_not_share_a_context(add, value_of_this_test):
    fut, seen = Future(), []

    def callback(fut):
        seen.append(variable.get())
        variable.set("another's")

    for _ in range(3):
        add(fut, callback)
    fut.set_result(5)
    assert seen == ["this test's"] * 3


def test_deferred_chain_keeps_its_contexts(value_of_this_test):
    fut, seen = Future(), []
    last = fut
    for n in range(100):
        variable.set(n)
        last = last.then(lambda fut: seen.append(variable.get()))
    variable.set("later")
    fut.set_result(5)
    assert seen == [*range(100)]


@on_every_loop
async def test_tasks_run_in_the_context_of_their_caller(nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()  # the portal blocks on start and stop

    async def query():
        await anyio.lowlevel.checkpoint()
        return variable.get()

    async def request(portal, number):
        variable.set(number)
        async with anyio.create_task_group() as tg:
            mine = start_soon(tg, query)
            theirs = start_soon(portal, query)
            variable.set("later")
            assert (await mine, await theirs) == (number, number)

    with start_blocking_portal() as portal:
        async with anyio.create_task_group() as tg:
            for number in range(5):
                tg.start_soon(request, portal, number)

        def in_thread():
            variable.set("a thread's")
            assert start_soon(portal, query).wait(PATIENCE) == "a thread's"

        async with alongside(in_thread):
            pass

"""Each use of a private name of CPython or asyncio has a fallback that is public."""

from __future__ import annotations

import ast
import asyncio
import gc
import pathlib
import runpy
import selectors
import signal
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import uvloop

import torchfut_aio
from torchfut_aio import Future, _cpython

from . import forks
from .threads import PATIENCE, PATIENCE_WITH_PROCESSES, needs_gil

PACKAGE = pathlib.Path(torchfut_aio.__file__).parent


class FuturesInPython(asyncio.SelectorEventLoop):
    """A loop with its own future class."""

    def create_future(self):
        return asyncio.futures._PyFuture(loop=self)


class TurnsOfItsOwn(asyncio.SelectorEventLoop):
    """A loop with its own `_run_once`, like those of GUI toolkits."""

    def _run_once(self):
        timers = [timer for timer in self._scheduled if not timer.cancelled()]
        soonest = min((timer.when() for timer in timers), default=None)
        timeout = 0 if self._ready else soonest and max(soonest - self.time(), 0)
        self._process_events(self._selector.select(timeout))
        due = [timer for timer in timers if timer.when() <= self.time()]
        self._scheduled = [timer for timer in timers if timer not in due]
        self._ready.extend(due)
        for _ in range(len(self._ready)):
            handle = self._ready.popleft()
            if not handle.cancelled():
                handle._run()


class NoReaders(asyncio.SelectorEventLoop):
    """A loop that cannot watch files, and raises NotImplementedError like asyncio's on Windows."""

    def add_reader(self, *args):
        if threading.get_ident() == getattr(self, "_thread_id", None):
            raise NotImplementedError
        super().add_reader(*args)  # its own pipe


class NoReadersAnyMore(NoReaders):
    """A loop that cannot watch files, and raises another error."""

    def add_reader(self, *args):
        try:
            super().add_reader(*args)
        except NotImplementedError:
            raise RuntimeError("no readers here") from None


class OwnTask(asyncio.tasks._PyTask):
    """A task of the Python implementation."""


class Subclass(asyncio.Task):
    """A task of a subclass of asyncio.Task."""


LOOPS = [FuturesInPython, TurnsOfItsOwn, NoReaders, NoReadersAnyMore]


def new_loop(kind):
    if issubclass(kind, asyncio.AbstractEventLoop):
        return kind()
    loop = asyncio.new_event_loop()
    loop.set_task_factory(lambda loop, coroutine, **options: kind(coroutine, loop=loop, **options))
    return loop


@pytest.mark.parametrize("waits", [1, 10, 200])
@pytest.mark.parametrize("kind", [*LOOPS, OwnTask, Subclass])
def test_await_resumes_on_foreign_loops_and_in_foreign_tasks(kind, waits):
    async def value_of(fut):
        return await fut

    def complete(futures):
        for n, fut in enumerate(futures):
            fut.set_result(n)

    async def main():
        for _ in range(3):
            futures = [Future() for _ in range(waits)]
            tasks = [asyncio.ensure_future(value_of(fut)) for fut in futures]
            await asyncio.sleep(0)  # they wait
            completing = asyncio.get_running_loop().run_in_executor(None, complete, futures)
            _, pending = await asyncio.wait(tasks, timeout=PATIENCE)
            await completing
            assert not pending
            assert [task.result() for task in tasks] == list(range(waits))

    loop = new_loop(kind)
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


@pytest.mark.parametrize("kind", [*LOOPS, asyncio.SelectorEventLoop])
def test_signal_handler_wakes_a_sleeping_foreign_loop(kind):
    fut = Future()
    loop = new_loop(kind)
    before = signal.signal(signal.SIGALRM, lambda *_: fut.set_result("signal"))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert loop.run_until_complete(asyncio.wait_for(fut, PATIENCE)) == "signal"
    finally:
        signal.signal(signal.SIGALRM, before)
        loop.close()


def test_resume_callback_is_read_only_from_asyncio_futures():
    async def found_for(future, callback):
        future.add_done_callback(callback)
        return _cpython.resume_callback(future)

    class Strange(asyncio.Future):
        _callbacks = "not a list"

    async def main():
        loop = asyncio.get_running_loop()
        assert _cpython.resume_callback(loop.create_future()) is None  # without a waiter
        for future in (loop.create_future(), Strange(), asyncio.futures._PyFuture()):
            assert await found_for(future, nothing) is None
        for kind in (asyncio.Task, Subclass):
            future = loop.create_future()
            task = kind(wait_for(future))
            await asyncio.sleep(0)
            callback, _ = _cpython.resume_callback(future)
            assert callback.__self__ is task
            future.set_result("resumed")
            assert _cpython.resume_callback(future) is None  # done
            assert await task == "resumed"
        future = loop.create_future()
        task = OwnTask(wait_for(future), loop=loop)
        await asyncio.sleep(0)
        assert _cpython.resume_callback(future) is None
        future.set_result("resumed")
        assert await task == "resumed"

    asyncio.run(main())


async def wait_for(future):
    return await future


def nothing(_):
    """A callback that a program has added."""


def without(module, name):
    """Return `_cpython` as it is without a private name of another module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(module, name)
        return SimpleNamespace(**runpy.run_path(_cpython.__file__))


def test_running_loop_is_also_found_by_the_public_api():
    async def main(running_loop):
        return running_loop() is asyncio.get_running_loop()

    for module in (_cpython, without(asyncio, "_get_running_loop")):
        assert asyncio.run(main(module.running_loop))
        assert module.running_loop() is None


def test_callback_of_a_loop_is_detected_from_frames():
    async def main(in_callback_of=_cpython.in_callback_of):
        loop = asyncio.get_running_loop()
        asked = loop.create_future()
        loop.call_soon(lambda: asked.set_result(in_callback_of(loop)))
        return await asked

    class ASleepingSelector(selectors.DefaultSelector):
        def select(self, timeout=None):
            asleep.append(_cpython.in_callback_of(loop))
            return super().select(timeout)

    for kind in (asyncio.SelectorEventLoop, TurnsOfItsOwn):
        loop, asleep = kind(ASleepingSelector()), []
        assert loop.run_until_complete(main())
        assert set(asleep) == {False}
        assert not loop.run_until_complete(main(without(sys, "_getframe").in_callback_of))
        loop.close()
    loop = uvloop.new_event_loop()
    assert loop.run_until_complete(main())
    loop.close()


USE = """
import torchfut_aio.debug
from torchfut_aio import Future
{after}
async def main():
    alone, futures = Future(), [Future() for _ in range(20)]
    tasks = [asyncio.ensure_future(torchfut_aio.gather(futures)) for _ in range(20)]
    threading.Timer(0.01, torchfut_aio.set_results, (futures, range(20))).start()
    assert await asyncio.gather(*tasks) == [[*range(20)]] * 20
    asyncio.get_running_loop().call_later(0.01, alone.as_asyncio().cancel)
    asyncio.get_running_loop().call_later(0.02, alone.set_result, 5)
    return await torchfut_aio.as_future(asyncio.ensure_future(asyncio.wait_for(alone, 60)))
@torchfut_aio.task_local_state
async def keeps_state():
    await asyncio.sleep(0)
    return await main()
print(asyncio.run(main()), asyncio.run(keeps_state()), torchfut_aio.debug.pending_futures())
"""
# Code that removes a name before the package is imported, and code that restores it for asyncio.
REMOVED = {
    "asyncio._get_running_loop": ("del asyncio._get_running_loop", ""),
    "asyncio.Handle._run": (
        "run = asyncio.Handle._run; del asyncio.Handle._run",
        "asyncio.Handle._run = run",
    ),
    "sys._current_frames": ("del sys._current_frames", ""),
    "sys._getframe": ("del sys._getframe", ""),
    "nothing": ("", ""),
}


def test_package_works_without_private_names_of_cpython():
    before = "import asyncio, sys, threading, torch"
    for removal, after in REMOVED.values():
        program = f"{before}\n{removal}{USE.format(after=after)}"
        assert forks.output(program, filters="ignore") == "5 5 []\n", removal
    # In this case futures and tasks are those in Python. torch imports asyncio.
    program = f"import sys; sys.modules['_asyncio'] = None; {before}{USE.format(after='')}"
    command = [sys.executable, "-W", "ignore", "-c", program]
    assert subprocess.check_output(command, timeout=PATIENCE_WITH_PROCESSES) == b"5 5 []\n"


def test_interpreter_that_loses_callbacks_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    monkeypatch.setattr(sys, "version_info", (3, 14, 4))
    with pytest.raises(ImportError, match="PYTHON_GIL=1"):
        runpy.run_path(_cpython.__file__)  # like the first import
    monkeypatch.setattr(sys, "version_info", (3, 14, 5))
    runpy.run_path(_cpython.__file__)
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True)
    runpy.run_path(_cpython.__file__)


def test_ordered_dict_is_not_used_without_a_gil(monkeypatch):
    for has_gil, kind in ((True, OrderedDict), (False, dict)):
        monkeypatch.setattr(sys, "_is_gil_enabled", lambda has_gil=has_gil: has_gil, raising=False)
        monkeypatch.setattr(sys, "version_info", (3, 14, 9))
        assert runpy.run_path(_cpython.__file__)["Queue"] is kind
    for path in PACKAGE.rglob("*.py"):
        assert path.name == "_cpython.py" or "OrderedDict" not in path.read_text(), path


@pytest.mark.parametrize("kind", [OrderedDict, dict])
def test_move_to_front_keeps_the_order_of_the_other_keys(kind):
    class Shared(kind):
        def __delitem__(self, key):
            super().__delitem__(key)
            if key == 2:  # another thread deletes one key and inserts another
                super().__delitem__(3)
                self["later"] = None

    queue = Shared.fromkeys([1, 2, 3, 4, "first"])
    _cpython.move_to_front(queue, "first")
    expected = ["first", 1, 2, 3, 4] if kind is OrderedDict else ["first", 1, 2, 4, "later"]
    assert [*queue] == expected


def test_private_names_of_cpython_are_used_in_one_module():
    private = {"_callbacks", "_run_once", "_run", "_getframe", "__code__", "__flags__", "data"}
    private |= {"_get_running_loop", "_is_gil_enabled", "_ready", "_scheduled", "_PyTask"}
    private |= {"cr_await", "cr_frame", "gi_yieldfrom", "ag_await", "f_lineno", "f_code"}
    for path in PACKAGE.rglob("*.py"):
        if path.name == "_cpython.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in private:
                owner = node.value
                ours = isinstance(owner, ast.Name) and owner.id in ("self", "cls", "_loops")
                assert ours, f"{path.name}, line {node.lineno}: {node.attr}"


def test_no_module_reads_the_local_variables_of_frames():
    # Reading f_locals writes to the frame, and crashes the thread that runs it.
    for path in PACKAGE.rglob("*.py"):
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        assert not any(isinstance(n, ast.Attribute) and n.attr == "f_locals" for n in nodes), path
        assert not any(isinstance(n, ast.Constant) and n.value == "f_locals" for n in nodes), path


@needs_gil("other threads cannot inspect where a task waits")
def test_place_of_a_non_coroutine_is_none(monkeypatch):
    class Strange:
        cr_await = cr_frame = "not a frame"

    async def wait():
        await future

    assert _cpython.place_of(None) is None
    assert _cpython.place_of(Strange()) is None
    future, coroutine = asyncio.Future(loop=asyncio.new_event_loop()), wait()
    coroutine.send(None)
    assert _cpython.place_of(coroutine).startswith("wait, test_cpython.py:")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
        patch.setattr(sys, "version_info", (3, 14, 9))
        assert runpy.run_path(_cpython.__file__)["place_of"](coroutine) is None
    coroutine.close()
    assert _cpython.place_of(coroutine) is None
    future.get_loop().close()


def test_calling_module_keeps_no_locals():
    class Local:
        pass

    def call():
        local = Local()
        assert _cpython.calling_module() is not None
        return weakref.ref(local)

    gc.disable()
    try:
        assert call()() is None
    finally:
        gc.enable()

"""Count what the hot paths cost, independent of the machine's noise, and compare it with limits.

    python -m tests.costs [--write]

For each path in Python: the bytecode instructions, per future, that are executed in the package and
in what it calls; and the bytes that a pending await holds, as Python's allocator counts them. A
version of Python without counts is compared with the nearest, and may have half as much again.

For each path in C: the machine instructions that callgrind counts, relative to those in Python, as
the counts depend on the compiler and the processor. They need valgrind and the C extension.

CI compares them with costs.json, where a tenth more is a failure. ``--write`` saves the counts.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import trio
import trio.testing

import torchfut_aio
from torchfut_aio import Future, ValueStream, as_completed, collect_all, debug, gather, set_results
from torchfut_aio._extension import use_extension

COMMITTED = Path(__file__).with_suffix(".json")
PACKAGE = str(Path(torchfut_aio.__file__).parent)
COUNT = 10  # futures: fewer than a burst, in which the clock decides how often a loop looks
MANY = 1_000
IN_C = "machine instructions in C, relative to Python"
VALGRIND = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no"]
ROOM, ROOM_FOR_OTHER_VERSIONS, FEW = 1.1, 1.5, 2

Futures = list[Future[int]]
Complete = Callable[[Futures], None]


def complete_here(futures: Futures) -> None:
    for fut in futures:
        fut.set_result(1)


async def value_of(awaitable: Any) -> Any:
    return await awaitable


async def waiting(awaitables: list[Any]) -> list[asyncio.Task[Any]]:
    """Return tasks that wait for each."""
    tasks = [asyncio.ensure_future(value_of(each)) for each in awaitables]
    await asyncio.sleep(0)
    return tasks


async def awaited(awaitables: list[Any], futures: Futures, complete: Complete) -> None:
    tasks = await waiting(awaitables)
    complete(futures)
    for task in tasks:
        await task


async def awaited_one_by_one(futures: Futures) -> None:
    for fut in futures:
        await fut


async def awaited_on_trio(futures: Futures, complete: Complete) -> None:
    async with trio.open_nursery() as nursery:
        for fut in futures:
            nursery.start_soon(value_of, fut)
        await trio.testing.wait_all_tasks_blocked()
        complete(futures)


async def cancelled(futures: Futures) -> None:
    tasks = await waiting(futures)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def take_all(futures: Futures) -> None:
    async for fut in as_completed(futures):
        fut.value()


def nothing(_: object) -> None:
    pass


# Each is called with futures, pending or done, and with what completes them in another thread.
PATHS: dict[str, Callable[[Futures, Complete], Any]] = {
    "create": lambda _, __: [Future() for _ in range(COUNT)],
    "set": lambda fs, _: complete_here(fs),
    "read, when done": lambda fs, _: [fut.value() for fut in fs],
    "add a callback, set": lambda fs, _: (
        [fut.add_done_callback(nothing) for fut in fs],
        complete_here(fs),
    ),
    "then, set": lambda fs, _: ([fut.then(nothing) for fut in fs], complete_here(fs)),
    "wait, when done": lambda fs, _: [fut.wait() for fut in fs],
    "collect_all, set": lambda fs, _: (collect_all(fs), complete_here(fs)),
    "await, when done": lambda fs, _: awaited_one_by_one(fs),
    "await, set by the loop's thread": lambda fs, _: awaited(fs, fs, complete_here),
    "await, set by another thread": lambda fs, complete: awaited(fs, fs, complete),
    "await, cancelled": lambda fs, _: cancelled(fs),
    "gather, set by another thread": lambda fs, complete: awaited([gather(fs)], fs, complete),
    "as_completed, set by another thread": lambda fs, complete: awaited(
        [take_all(fs)], fs, complete
    ),
    "await, set by another thread, on trio": awaited_on_trio,
}


async def bytecode(name: str) -> float:
    """Count in this thread, and in the other one while this one stands still: no races."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal count
        if event == "opcode":
            count += 1
        elif event == "call":
            caller = frame.f_back
            ours = frame.f_code.co_filename.startswith(PACKAGE)
            if not ours and (caller is None or not caller.f_trace_opcodes):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return trace

    def complete_in_thread(futures: Futures) -> None:
        thread = threading.Thread(target=lambda: (sys.settrace(trace), complete_here(futures)))
        thread.start()
        thread.join()

    for _ in range(2):  # the first time, imports count
        count, futures = 0, [Future[int]() for _ in range(COUNT)]
        if name.endswith("when done"):
            complete_here(futures)
        sys.settrace(trace)
        try:
            result = PATHS[name](futures, complete_in_thread)
            if isawaitable(result):
                await result
        finally:
            sys.settrace(None)
    return count / COUNT


async def bytes_of_pending() -> float:
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    tasks = await waiting(futures := [Future[int]() for _ in range(MANY)])
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    complete_here(futures)
    await asyncio.wait(tasks)
    return (after - before) / MANY


async def put_and_read(futures: Futures) -> None:
    stream = ValueStream[int]()

    def put() -> None:
        with stream:
            for _ in futures:
                stream.put(1)

    with stream.listen() as values:
        async with asyncio.TaskGroup() as tg:
            tg.create_task(asyncio.to_thread(put))
            async for _ in values:
                pass


# Each is called with pending futures. With the last two, a task waits for each.
PATHS_IN_C: dict[str, Callable[[Futures], Awaitable[Any]]] = {
    "nothing": lambda _: asyncio.sleep(0, None),  # subtracted from the others
    "set": lambda futures: asyncio.sleep(0, complete_here(futures)),
    "begin to wait": waiting,
    "put into a stream, read": put_and_read,
    "set by another thread, resume": lambda futures: asyncio.to_thread(complete_here, futures),
    "set_results, resume": lambda futures: asyncio.to_thread(set_results, futures, [1] * MANY),
}


def control(argument: str) -> None:
    command = ["callgrind_control", argument, str(os.getpid())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


async def dump(in_c: bool, name: str) -> None:
    futures: Futures = [Future() for _ in range(MANY)]
    tasks = await waiting(futures) if name.endswith("resume") else []
    control("--zero")
    await PATHS_IN_C[name](futures)
    control(f"--dump={in_c} {name}")
    complete_here([fut for fut in futures if not fut.done()])
    await asyncio.gather(*tasks)


def count_within_callgrind() -> None:
    """Run each path on each implementation, and write a dump after it."""
    gc.disable()
    control("--instr=on")
    for in_c in (False, True):
        use_extension(in_c)
        # The second dump replaces the first, which had imports.
        for name in [*PATHS_IN_C, *PATHS_IN_C]:
            asyncio.run(dump(in_c, name))


def instructions() -> dict[tuple[bool, str], float]:
    """Return the instructions per future of each path, in Python and in C, less that of nothing."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        within = [sys.executable, "-m", "tests.costs", "--within"]
        command = [*VALGRIND, f"--callgrind-out-file={folder}/out", *within]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        for dump in sorted(Path(folder).iterdir(), key=lambda path: path.stat().st_mtime_ns):
            text = dump.read_text()
            trigger = re.search(r"^desc: Trigger: dump (\w+) (.*)$", text, flags=re.M)
            total = re.search(r"^totals: (\d+)$", text, flags=re.M)
            if trigger and total:
                found[trigger[1] == "True", trigger[2]] = int(total[1]) / MANY
    return {(in_c, name): n - found[in_c, "nothing"] for (in_c, name), n in found.items()}


def check(key: str, costs: dict[str, float], digits: int, few: float = 0) -> int:
    """Compare costs with those in costs.json; return 1 if one has grown."""
    committed = json.loads(COMMITTED.read_text())
    if "--write" in sys.argv[1:]:
        committed[key] = {name: round(cost, digits) for name, cost in costs.items()}
        COMMITTED.write_text(json.dumps(committed, indent=2) + "\n")
    versions = [other for other in committed if other.startswith("3.")]
    nearest = min(versions, key=lambda other: abs(int(other[2:]) - sys.version_info.minor))
    limits, room = (
        (committed[key], ROOM)
        if key in committed
        else (committed[nearest], ROOM_FOR_OTHER_VERSIONS)
    )
    grown = []
    for name, cost in costs.items():
        allowed = max(limits[name] * room, limits[name] + few)
        print(f"  {name:38}{cost:>10.{digits}f}, allowed{allowed:>10.{digits}f}")
        grown += [name] * (cost > allowed)
    if grown:
        print(
            f"\nGrown: {'; '.join(grown)}. If a change needs that, say why in its commit, and save "
            "the new costs: --write",
            file=sys.stderr,
        )
    return 1 if grown else 0


def main() -> int:
    if "--within" in sys.argv[1:]:
        count_within_callgrind()
        return 0
    is_counted = bool(shutil.which("callgrind_control")) and debug.uses_extension()
    if os.environ.get("CI") and not is_counted:
        sys.exit("no machine instructions can be counted: valgrind or the C extension is missing")
    found = instructions() if is_counted else {}
    use_extension(False)
    gc.disable()  # or finalisers would count where they happen to run
    costs: dict[str, float] = {
        name: anyio.run(bytecode, name, backend="trio" if "trio" in name else "asyncio")
        for name in PATHS
    }
    costs["bytes of a pending await"] = anyio.run(bytes_of_pending)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    print(f"bytecode instructions per future, Python {version}")
    status = check(version, costs, digits=1, few=FEW)
    if not found:
        print("no machine instructions are counted: valgrind or the C extension is missing")
        return status
    names = [name for name in PATHS_IN_C if name != "nothing"]
    ratios = {name: found[True, name] / found[False, name] for name in names}
    print(IN_C)
    return check(IN_C, ratios, digits=3) or status


if __name__ == "__main__":
    sys.exit(main())

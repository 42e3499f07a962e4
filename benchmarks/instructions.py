"""Count the machine instructions of the hot paths in C, relative to those in Python.

    python -m benchmarks.instructions [--write]

Callgrind counts them, as bytecode does not show what C costs. Counts depend on the compiler and the
processor, so the limits in costs.json are for the ratio of C to Python, where a tenth more is a
failure. ``--write`` saves the ratios. Without valgrind or the C extension, nothing is counted.
"""

from __future__ import annotations

import asyncio
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from torchfut_aio import Future, ValueStream, debug, set_results
from torchfut_aio._extension import use_extension

from .costs import Futures, check, complete_here, waiting

COUNT = 1_000
KEY = "machine instructions in C, relative to Python"
VALGRIND = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no"]


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
PATHS: dict[str, Callable[[Futures], Awaitable[Any]]] = {
    "nothing": lambda _: asyncio.sleep(0, None),  # subtracted from the others
    "set": lambda futures: asyncio.sleep(0, complete_here(futures)),
    "begin to wait": waiting,
    "put into a stream, read": put_and_read,
    "set by another thread, resume": lambda futures: asyncio.to_thread(complete_here, futures),
    "set_results, resume": lambda futures: asyncio.to_thread(set_results, futures, [1] * COUNT),
}


def control(argument: str) -> None:
    command = ["callgrind_control", argument, str(os.getpid())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


async def count(in_c: bool, name: str) -> None:
    futures: Futures = [Future() for _ in range(COUNT)]
    tasks = await waiting(futures) if name.endswith("resume") else []
    control("--zero")
    await PATHS[name](futures)
    control(f"--dump={in_c} {name}")
    complete_here([fut for fut in futures if not fut.done()])
    await asyncio.gather(*tasks)


def count_within_callgrind() -> None:
    """Run each path on each implementation, and write a dump after it."""
    gc.disable()
    control("--instr=on")
    for in_c in (False, True):
        use_extension(in_c)
        for name in [*PATHS, *PATHS]:  # the second dump replaces the first, which had imports
            asyncio.run(count(in_c, name))


def counts() -> dict[tuple[bool, str], float]:
    """Return the instructions per future of each path, in Python and in C, less that of nothing."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        within = [sys.executable, "-m", "benchmarks.instructions", "--within"]
        command = [*VALGRIND, f"--callgrind-out-file={folder}/out", *within]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        for dump in sorted(Path(folder).iterdir(), key=lambda path: path.stat().st_mtime_ns):
            text = dump.read_text()
            trigger = re.search(r"^desc: Trigger: dump (\w+) (.*)$", text, flags=re.M)
            total = re.search(r"^totals: (\d+)$", text, flags=re.M)
            if trigger and total:
                found[trigger[1] == "True", trigger[2]] = int(total[1]) / COUNT
    return {(in_c, name): n - found[in_c, "nothing"] for (in_c, name), n in found.items()}


def main() -> int:
    if "--within" in sys.argv[1:]:
        count_within_callgrind()
        return 0
    if not shutil.which("callgrind_control") or not debug.uses_extension():
        print("no machine instructions are counted: valgrind or the C extension is missing")
        return 0
    found = counts()
    print("machine instructions per future, of the whole process")
    for name in PATHS:
        print(f"  {name:38}Python{found[False, name]:>8.0f}, C{found[True, name]:>8.0f}")
    print(KEY)
    names = [name for name in PATHS if name != "nothing"]
    return check(KEY, {name: found[True, name] / found[False, name] for name in names}, digits=3)


if __name__ == "__main__":
    sys.exit(main())

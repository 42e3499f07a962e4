"""Counts the machine instructions of the hot paths in C, relative to those in Python.

    python -m benchmarks.instructions [--write]

Callgrind counts them, as bytecode does not show what C costs. Counts depend on the compiler and the
processor, so the limits in costs.json are for the ratio of C to Python, where a tenth more is a
failure. ``--write`` puts the ratios there. It does nothing without valgrind or the C extension.
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
from collections.abc import Callable
from pathlib import Path

from torchfut_aio import Future, ValueStream, debug, set_results
from torchfut_aio._extension import use_extension

from .costs import COMMITTED, ROOM, Futures, complete_here, waiting

COUNT = 1_000
KEY = "machine instructions in C, relative to Python"


async def nothing(futures: Futures) -> None:
    pass


async def set_each(futures: Futures) -> None:
    complete_here(futures)


async def set_each_and_resume(futures: Futures) -> None:
    await asyncio.to_thread(complete_here, futures)


async def set_all_and_resume(futures: Futures) -> None:
    await asyncio.to_thread(set_results, futures, [1] * COUNT)


async def begin_to_wait(futures: Futures) -> None:
    await waiting(futures)


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
PATHS = {
    "nothing": nothing,  # which is subtracted from the others
    "set": set_each,
    "begin to wait": begin_to_wait,
    "put into a stream, read": put_and_read,
    "set by another thread, resume": set_each_and_resume,
    "set_results, resume": set_all_and_resume,
}


async def count(in_c: bool, name: str, control: Callable[[str], None]) -> None:
    futures: Futures = [Future() for _ in range(COUNT)]
    tasks = await waiting(futures) if name.endswith("resume") else []
    control("--zero")
    await PATHS[name](futures)
    control(f"--dump={in_c} {name}")
    complete_here([fut for fut in futures if not fut.done()])
    await asyncio.gather(*tasks)


def count_within_callgrind() -> None:
    """Run each path on each implementation, and write a dump after it."""

    def control(argument: str) -> None:
        command = ["callgrind_control", argument, str(os.getpid())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    gc.disable()
    control("--instr=on")
    for in_c in (False, True):
        use_extension(in_c)
        for name in [*PATHS, *PATHS]:  # the second dump replaces the first, which had imports
            asyncio.run(count(in_c, name, control))


def counts() -> dict[tuple[bool, str], float]:
    """Return the instructions per future of each path, on Python and in C, less that of nothing."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                *("valgrind", "-q", "--tool=callgrind", "--instr-atstart=no"),
                f"--callgrind-out-file={folder}/out",
                *(sys.executable, "-m", "benchmarks.instructions", "--within"),
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )
        found = {}
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
    names = [name for name in PATHS if name != "nothing"]
    ratios = {name: found[True, name] / found[False, name] for name in names}
    committed = json.loads(COMMITTED.read_text())
    if "--write" in sys.argv[1:]:
        committed[KEY] = {name: round(ratio, 3) for name, ratio in ratios.items()}
        COMMITTED.write_text(json.dumps(committed, indent=2) + "\n")
    print("machine instructions per future, of all that the process runs")
    for name, ratio in ratios.items():
        print(
            f"  {name:34}Python{found[False, name]:>8.0f}, C{found[True, name]:>8.0f}, "
            f"ratio {ratio:.3f}, allowed {committed[KEY][name] * ROOM:.3f}"
        )
    if grown := [name for name in names if ratios[name] > committed[KEY][name] * ROOM]:
        print(f"\nGrown: {'; '.join(grown)}", file=sys.stderr)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())

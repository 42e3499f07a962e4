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
import threading
from inspect import isawaitable
from pathlib import Path
from typing import Any

from torchfut_aio import Future, ValueStream, debug, set_results
from torchfut_aio._extension import use_extension

from .costs import COMMITTED, PATHS, ROOM, Complete, Futures, complete_here, waiting

COUNT = 300
KEY = "machine instructions in C, relative to Python"


async def all_at_once(futures: Futures, _: Complete) -> None:
    tasks = await waiting(futures)
    set_results(futures, [1] * len(futures))
    await asyncio.wait(tasks)


async def through_a_stream(futures: Futures, _: Complete) -> None:
    stream = ValueStream[int]()
    values = stream.listen()
    for n in range(len(futures)):
        [task] = await waiting([anext(values)])
        stream.put(n)
        await task


CHOSEN = {
    "set": PATHS["set"],
    "await, when done": PATHS["await, when done"],
    "await, set by another thread": PATHS["await, set by another thread"],
    "await, set_results": all_at_once,
    "await, cancelled": PATHS["await, cancelled"],
    "put into a stream, read": through_a_stream,
}


async def run(name: str) -> None:
    futures: Futures = [Future() for _ in range(COUNT)]
    if name.endswith("when done"):
        complete_here(futures)

    def complete_in_thread(futures: Futures) -> None:
        thread = threading.Thread(target=complete_here, args=(futures,))
        thread.start()
        thread.join()

    result: Any = CHOSEN[name](futures, complete_in_thread)
    if isawaitable(result):
        await result


def count_within_callgrind() -> None:
    """Run each path on each implementation, and write a dump after it."""

    def control(argument: str) -> None:
        command = ["callgrind_control", argument, str(os.getpid())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    gc.disable()
    control("--instr=on")
    for in_c in (False, True):
        use_extension(in_c)
        for name in CHOSEN:
            asyncio.run(run(name))
            control("--zero")
            asyncio.run(run(name))
            control(f"--dump={in_c} {name}")


def counts() -> dict[tuple[bool, str], float]:
    """Return the instructions per future of each path, on Python and in C."""
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
        for dump in Path(folder).iterdir():
            text = dump.read_text()
            trigger = re.search(r"^desc: Trigger: dump (\w+) (.*)$", text, flags=re.M)
            total = re.search(r"^totals: (\d+)$", text, flags=re.M)
            if trigger and total:
                found[trigger[1] == "True", trigger[2]] = int(total[1]) / COUNT
        return found


def main() -> int:
    if "--within" in sys.argv[1:]:
        count_within_callgrind()
        return 0
    if not shutil.which("callgrind_control") or not debug.uses_extension():
        print("no machine instructions are counted: valgrind or the C extension is missing")
        return 0
    found = counts()
    ratios = {name: found[True, name] / found[False, name] for name in CHOSEN}
    committed = json.loads(COMMITTED.read_text())
    if "--write" in sys.argv[1:]:
        committed[KEY] = {name: round(ratio, 3) for name, ratio in ratios.items()}
        COMMITTED.write_text(json.dumps(committed, indent=2) + "\n")
    print("machine instructions per future, all that the process runs")
    for name, ratio in ratios.items():
        print(
            f"  {name:34}Python{found[False, name]:>8.0f}, C{found[True, name]:>8.0f}, "
            f"ratio {ratio:.3f}, allowed {committed[KEY][name] * ROOM:.3f}"
        )
    if grown := [name for name in CHOSEN if ratios[name] > committed[KEY][name] * ROOM]:
        print(f"\nGrown: {'; '.join(grown)}", file=sys.stderr)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())

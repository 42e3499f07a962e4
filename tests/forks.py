"""Cases that each need a fresh interpreter: one imports what is slow, and is forked for each."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TypeVar

from .threads import PATIENCE_WITH_PROCESSES

K = TypeVar("K")

FORKS = """
import os, sys
for case in {cases!r}:
    sys.stdout.flush()
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print("end", status, flush=True)
    else:
        exec(case)
        break
"""


def outputs(before: str, cases: dict[K, str]) -> dict[K, str]:
    """Run each case in a fork of an interpreter that ran ``before``; return what each printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", before + FORKS.format(cases=[*cases.values()])],
        capture_output=True,
        text=True,
        timeout=PATIENCE_WITH_PROCESSES,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == 0, done.stderr
    texts, lines = [], []
    for line in done.stdout.splitlines():
        if line.startswith("end "):
            assert line == "end 0", ([*cases][len(texts)], done.stderr)
            texts.append("\n".join(lines))
            lines.clear()
        else:
            lines.append(line)
    return dict(zip(cases, texts, strict=True))

"""Where figures are kept, and of which machine and which commit they are."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Describes where this runs."""
    release = platform.release().partition("-")[0]
    return f"{_cpu()}, {os.cpu_count()} cores, {platform.system()} {release}"


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()


def commit() -> str:
    """Returns the commit of this checkout, marked if something but results has been changed."""
    output = partial(subprocess.check_output, text=True, stderr=subprocess.DEVNULL)
    git = ["git", "-C", str(RESULTS.parent)]
    try:
        head = output([*git, "rev-parse", "--short=12", "HEAD"])
        changed = output([*git, "status", "--porcelain", "--", ":/", f":(exclude){RESULTS}"])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("-dirty" if changed else "")

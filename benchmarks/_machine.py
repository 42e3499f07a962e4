"""Where figures are saved, and which machine and commit they are of."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "docs" / "_results"


def machine() -> str:
    """Describe the processor and the system."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    release = platform.release().partition("-")[0]
    cpu = models[0] if models else platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()} {release}"


def commit() -> str:
    """Return the commit of this checkout, marked if anything but results has changed."""
    git = ["git", "-C", str(RESULTS.parent)]
    status = ["status", "--porcelain", "--", ":/", f":(exclude){RESULTS}"]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True)
        return head.strip() + "-dirty" * bool(subprocess.check_output([*git, *status]))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

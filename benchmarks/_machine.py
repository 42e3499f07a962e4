"""Where figures are kept, and of which machine and which commit they are."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "docs" / "_results"


def machine() -> str:
    """Describe where this runs."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    release = platform.release().partition("-")[0]
    cpu = models[0] if models else platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()} {release}"


def commit() -> str:
    """Return the commit of this checkout, marked if something but results has been changed."""
    status = ["status", "--porcelain", "--", ":/", f":(exclude){RESULTS}"]
    try:
        head, changed = (
            subprocess.check_output(
                ["git", "-C", str(RESULTS.parent), *arguments], text=True, stderr=subprocess.DEVNULL
            ).strip()
            for arguments in (["rev-parse", "--short=12", "HEAD"], status)
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")

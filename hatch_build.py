"""Build the C extension where that is possible; else the package is pure Python."""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "torchfut_aio/_speedups.c"


def refusal() -> str | None:
    """Return why this Python gets no extension, or None."""
    if os.environ.get("TORCHFUT_AIO_NO_EXTENSIONS"):
        return "TORCHFUT_AIO_NO_EXTENSIONS is set"
    if platform.python_implementation() != "CPython" or os.name == "nt":
        return "it is for CPython on POSIX"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "it needs a GIL"
    if not (3, 11) <= sys.version_info < (3, 15):
        return f"Python {platform.python_version()} is not known to it"
    return None


class ExtensionHook(BuildHookInterface[Any]):
    """Compile ``_speedups.c`` beside its source, so that a checkout and a wheel have it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the source and add the result to the wheel; warn if that fails."""
        built = SOURCE.removesuffix(".c") + sysconfig.get_config_var("EXT_SUFFIX")
        why_not = refusal()
        if why_not is None:
            try:
                self._compile()
            except Exception as error:  # no compiler, or no headers of Python
                why_not = f"{type(error).__name__}: {error}"
        if why_not is None:
            build_data["pure_python"], build_data["infer_tag"] = False, True
            if version != "editable":  # which uses the checkout
                build_data["force_include"][built] = built
        else:
            Path(self.root, built).unlink(missing_ok=True)  # of an earlier build
            self.app.display_warning(f"torchfut-aio is built without its C extension: {why_not}")

    def _compile(self) -> None:
        from setuptools import Distribution, Extension
        from setuptools.command.build_ext import build_ext

        extension = Extension("torchfut_aio._speedups", [SOURCE])
        command = build_ext(Distribution({"ext_modules": [extension]}))
        command.build_lib, command.build_temp = self.root, str(Path(self.root, "build"))
        command.ensure_finalized()
        command.run()

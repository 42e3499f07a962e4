"""What importing costs, and what the package says of itself."""

from __future__ import annotations

import importlib.metadata
import pathlib
import subprocess
import sys

import torchfut_aio

ROOT = pathlib.Path(__file__).parents[1]


def python(program, *options):
    done = subprocess.run(
        [sys.executable, "-W", "error", *options, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_imports_neither_trio_nor_uvloop_nor_rpc():
    program = """
import torch, sys
before = set(sys.modules)
import torchfut_aio
print([m for m in sys.modules if m not in before and not m.startswith("torchfut_aio")])
import asyncio
fut = torchfut_aio.Future()
fut.set_result(5)
async def main():
    asyncio.get_running_loop().call_later(0.001, later.set_result, 5)
    return await fut + await later
later = torchfut_aio.Future()
assert asyncio.run(main()) == 10
print([m for m in sys.modules if m.split(".")[0] in ("trio", "uvloop", "anyio", "sniffio")])
"""
    # Not one module beyond torch's own, whatever torch's version imports by itself.
    assert python(program).split() == ["[]", "[]"]


def test_importing_and_using_it_never_initialises_an_accelerator():
    told = python(
        "import torch, torchfut_aio; fut = torchfut_aio.Future(); fut.set_result(torch.ones(2));"
        "fut.then(lambda f: f.wait()).wait(); print(torch.cuda.is_initialized())"
    )
    assert told == "False\n"


def test_it_works_without_trio_uvloop_and_anyio():
    told = python(
        "import sys; sys.modules.update(trio=None, uvloop=None, anyio=None);"
        "import asyncio, torchfut_aio; fut = torchfut_aio.Future(); fut.set_result(5);"
        "print(asyncio.run(asyncio.wait_for(fut, 9)))"
    )
    assert told == "5\n"


def test_public_names_are_what_is_documented():
    assert sorted(torchfut_aio.__all__) == torchfut_aio.__all__
    for name in torchfut_aio.__all__:
        assert getattr(torchfut_aio, name).__doc__, name


def test_imports_run_one_way():
    def imported(path):
        return {
            line.split()[1]
            for line in path.read_text().splitlines()
            if line.lstrip().startswith("from .")
        }

    package = ROOT / "torchfut_aio"
    below = {
        "_arguments.py": set(),
        "_cpython.py": set(),
        "_worker.py": set(),
        "_errors.py": {"._cpython"},
        "_repr.py": set(),
        "_callbacks.py": {"._errors", "._future"},  # the latter for type checkers only
        "_rpc_errors.py": {"._cpython", "._errors"},
        "_future.py": {
            ".",
            "._arguments",
            "._callbacks",
            "._devices",
            "._errors",
            "._repr",
            "._rpc_errors",
        },
        "_adopt.py": {
            "._arguments",
            "._cpython",
            "._devices",
            "._devices._background",
            "._errors",
            "._future",
            "._rpc_errors",
            "._worker",
        },
        "_collect.py": {".", "._adopt", "._callbacks", "._errors", "._future"},
        "_timeouts.py": {
            "._adopt",
            "._arguments",
            "._callbacks",
            "._errors",
            "._future",
            "._worker",
        },
        "_tasks.py": {".", "._adopt", "._arguments", "._errors", "._future"},
        "_background_loop.py": {"._future", "._tasks", "._worker"},
    }
    for name, allowed in below.items():
        assert imported(package / name) <= allowed, name
    for folder, allowed in (
        ("_loops", {".._cpython"}),
        ("_devices", {"..", ".._loops", ".._worker"}),
    ):
        for path in (package / folder).glob("*.py"):
            above = {module for module in imported(path) if module.startswith("..")}
            assert above <= allowed, path


def test_the_version_is_the_distributions():
    assert importlib.metadata.version("torchfut-aio")
    assert (ROOT / "torchfut_aio" / "py.typed").exists()

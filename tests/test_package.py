"""The cost of an import, the order of layers, the rules for handlers, the metadata."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import pathlib
import pickle
import typing

import pytest

import torchfut_aio
from torchfut_aio import debug, distributed

from . import forks

ROOT = pathlib.Path(__file__).parents[1]


def test_import_does_not_import_trio_uvloop_or_rpc():
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
import torchfut_aio.distributed, torchfut_aio.debug
print([m for m in sys.modules if m.split(".")[0] in ("trio", "uvloop", "anyio", "sniffio")])
"""
    # No module beyond those of torch itself, whichever these are in this version.
    assert forks.output(program).split() == ["[]", "[]"]


def test_library_sources_are_imported_when_one_is_adopted():
    program = """
import sys, torchfut_aio
from multiprocessing.pool import ThreadPool
def imported():
    print([name for name in sys.modules if name.startswith("torchfut_aio.contrib._")])
imported()
fut = torchfut_aio.Future()
assert torchfut_aio.as_future(fut) is fut
with ThreadPool(1) as pool:
    assert torchfut_aio.as_future(pool.apply_async(abs, [-1])).wait() == 1
imported()
"""
    assert forks.output(program).splitlines() == ["[]", "['torchfut_aio.contrib._pool']"]


def test_package_never_initialises_an_accelerator():
    output = forks.output(
        "import torch, torchfut_aio; fut = torchfut_aio.Future(); fut.set_result(torch.ones(2));"
        "fut.then(lambda f: f.wait()).wait(); print(torch.cuda.is_initialized())"
    )
    assert output == "False\n"


def test_package_works_without_trio_uvloop_and_anyio():
    output = forks.output(
        "import sys; sys.modules.update(trio=None, uvloop=None, anyio=None);"
        "import asyncio, torchfut_aio; fut = torchfut_aio.Future(); fut.set_result(5);"
        "print(asyncio.run(asyncio.wait_for(fut, 9)))"
    )
    assert output == "5\n"


def test_public_names_are_sorted_and_documented():
    assert sorted(torchfut_aio.__all__) == torchfut_aio.__all__
    for name in torchfut_aio.__all__:
        assert getattr(torchfut_aio, name).__doc__, name


@pytest.mark.parametrize("module", [torchfut_aio, distributed, debug], ids=lambda m: m.__name__)
def test_public_objects_are_named_after_their_import_path(module):
    for name in module.__all__:
        thing = getattr(module, name)
        assert (thing.__module__, thing.__qualname__) == (module.__name__, name)
        assert pickle.loads(pickle.dumps(thing)) is thing
        assert "torchfut_aio._" not in repr(thing)
        if dataclasses.is_dataclass(thing):
            assert [*typing.get_type_hints(thing)] == [f.name for f in dataclasses.fields(thing)]


# From bottom to top: each module imports only from those before it.
LAYERS = [
    "_public",
    "_cpython",
    "_speedups",  # in C
    "_extension",
    "_pytorch",
    "_annotations",
    "_repr",
    "_absent",
    "_process_local",
    "_arguments",
    "_errors",
    "_threads",
    "_loops",
    "_devices",
    "_rpc_errors",
    "_core",
    "_to_stdlib",
    "_future",
    "_dependent",
    "_tasks",
    "_adopt",
    "contrib",
    "_many",
    "_waiters",
    "_as_completed",
    "_timeouts",
    "serving",
    "task_state",
    "distributed",
    "debug",
]


def imported(path):
    """Return the parts of the package that a module imports at run time, by name."""
    package = [*path.relative_to(ROOT).parent.parts]
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node not in typing_only:
            base = package[: len(package) - node.level + 1]
            module = node.module.split(".") if node.module else []
            for alias in node.names:
                full = [*base, *module, alias.name]
                if len(full) > 1:
                    yield full[1]


def test_modules_import_only_lower_layers():
    for path in (ROOT / "torchfut_aio").rglob("*.py"):
        part = path.relative_to(ROOT / "torchfut_aio").parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        below = LAYERS[: LAYERS.index(part)]
        assert set(imported(path)) - {part} <= set(below), path


def names(expression):
    return {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(expression)
        if isinstance(node, (ast.Name, ast.Attribute))
    }


def is_reraise(statement):
    return isinstance(statement, ast.Raise) and statement.exc is None


def takes_any_runtime_error(tree):
    """Yield the lines where a handler of RuntimeError would swallow a RecursionError.

    An earlier handler of RecursionError may re-raise it. Or the handler of RuntimeError may begin
    with an `if` that checks the state or the text, and re-raises unknown errors.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and "suppress" in names(node.func):
            kinds = [names(kind) for kind in node.args]
            if {"RuntimeError"} in kinds:
                yield node.lineno
        if isinstance(node, ast.Try):
            reraised = False
            for handler in node.handlers:
                kinds = names(handler.type) if handler.type else set()
                first = handler.body[0]
                reraised |= "RecursionError" in kinds and is_reraise(first)
                checks = isinstance(first, ast.If) and is_reraise(first.body[-1])
                if "RuntimeError" in kinds and not reraised and not checks:
                    yield handler.lineno


def test_recursion_error_is_not_caught_as_runtime_error():
    for path in sorted((ROOT / "torchfut_aio").rglob("*.py")):
        lines = [*takes_any_runtime_error(ast.parse(path.read_text()))]
        assert not lines, f"{path.name}: a RecursionError is a RuntimeError: lines {lines}"


def test_version_matches_the_distribution():
    assert importlib.metadata.version("torchfut-aio") == torchfut_aio.__version__
    assert (ROOT / "torchfut_aio" / "py.typed").exists()

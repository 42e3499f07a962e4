"""What is documented is true: docstrings, README, and torch's own documentation."""

from __future__ import annotations

import doctest
import importlib
import pathlib
import pkgutil
import re
import subprocess
import sys
import types

import pytest
import torch

import torchfut_aio

from .threads import PATIENCE_WITH_PROCESSES

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def check_examples(text, name, names):
    test = doctest.DocTestParser().get_doctest(text, dict(names), name, None, None)
    report = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test, out=report.append)
    assert test.examples, f"{name} has no example"
    assert not runner.failures, "".join(report)


def documented():
    """Every docstring of the package that has an example, by its name."""
    for info in pkgutil.walk_packages(torchfut_aio.__path__, "torchfut_aio."):
        module = importlib.import_module(info.name)
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != info.name:
                continue
            if type(thing).__module__ == "typing":
                continue  # the docstring of a ParamSpec is Python's
            members = vars(thing).items() if isinstance(thing, type) else ()
            for where, doc in [(name, thing.__doc__)] + [
                (f"{name}.{member}", getattr(value, "__doc__", None)) for member, value in members
            ]:
                if doc and ">>>" in doc:
                    yield pytest.param(doc, id=f"{info.name}.{where}")


@pytest.mark.parametrize("doc", list(documented()))
def test_the_examples_in_docstrings_run_as_written(doc):
    check_examples(doc, "docstring", {"torchfut_aio": torchfut_aio})


TORCHS = {
    f"{holder.__name__}.{name}": getattr(holder, name).__doc__
    for holder, name in [
        (torch.futures.Future, "add_done_callback"),
        (torch.futures.Future, "set_exception"),
        (torch.futures.Future, "set_result"),
        (torch.futures.Future, "then"),
        (torch.futures, "collect_all"),
    ]
}


@pytest.mark.parametrize("name", TORCHS)
def test_the_examples_of_torchs_documentation_run_as_written(name):
    # With our futures in the place of torch's, and nothing else changed.
    ours = types.SimpleNamespace(futures=torchfut_aio, ones=torch.ones)
    check_examples(TORCHS[name], name, {"torch": ours})


def readme_blocks(language):
    readme = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", readme, flags=re.M | re.S)


RUN = {
    "asyncio": "anyio.run(main)",
    "uvloop": "anyio.run(main, backend_options={'use_uvloop': True})",
    "trio": "anyio.run(main, backend='trio')",
}


@pytest.mark.parametrize(
    ("number", "loop"),
    [
        (number, loop)
        for number, code in enumerate(readme_blocks("python"))
        for loop in (RUN if RUN["asyncio"] in code else ["asyncio"])
    ],
)
def test_the_readmes_examples_print_what_it_says(number, loop):
    readme = (ROOT / "README.md").read_text()
    code = readme_blocks("python")[number]
    _, _, after = readme.partition(code)
    expected = re.match(r"```\n\nIt prints:\n\n```\n(.*?)```\n", after, flags=re.S)
    code = code.replace(RUN["asyncio"], RUN[loop])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE_WITH_PROCESSES,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected[1]


def test_the_quickstart_runs_and_serves_what_it_learned():
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / "quickstart.py"],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_WITH_PROCESSES,
    )
    assert (done.returncode, done.stderr) == (0, "")
    accuracy = float(re.search(r"accuracy +([\d.]+)%", done.stdout)[1])
    assert accuracy > 95
    assert re.search(r"throughput +[\d,]+ requests/s", done.stdout)
    assert re.search(r"p50 [\d.]+ ms, p99 [\d.]+ ms", done.stdout)
    assert re.search(r"wait\(\) .* answer \d, label \d", done.stdout)

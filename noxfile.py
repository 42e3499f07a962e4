"""Run the tests on every supported Python and PyTorch, and the other checks.

``nox`` runs every session, ``nox -s check examples`` runs two, and ``nox -s 'tests(python=3.12,
torch=2.14.1)'`` runs one. Arguments after ``--`` are passed to pytest. A missing Python is an
error, as nothing would be tested there. Each session installs what it needs and runs one of
``scripts``.
"""

from __future__ import annotations

import pathlib
import re

import nox

nox.needs_version = ">=2024.4.15"
nox.options.error_on_missing_interpreters = True
nox.options.error_on_external_run = True
nox.options.stop_on_first_error = False

HERE = pathlib.Path(__file__).parent
PROJECT = nox.project.load_toml(HERE / "pyproject.toml")

# The Python and the torch of constraints.txt.
PYTHON = "3.11"
PINNED = re.search(r"^torch==(.*)$", (HERE / "constraints.txt").read_text(), flags=re.M)[1]
# The oldest versions that pyproject.toml allows, each with its newest bugfix release.
LOWEST = dict(re.findall(r"\b(torch|anyio|trio|uvloop)>=([\d.]+)", str(PROJECT["project"])))
OLDEST = LOWEST.pop("torch") + ".*"
NEWEST = "2.15.0"

# Each Python with the newest torch, and one Python with each torch.
TESTED = [
    *((python, NEWEST) for python in nox.project.python_versions(PROJECT)),
    *((PYTHON, torch) for torch in (OLDEST, PINNED)),
]


def install(session: nox.Session, extras: str, torch: str = PINNED) -> None:
    """Install this checkout with a torch; with the oldest, also the oldest of other libraries."""
    if (session.python, torch) == (PYTHON, PINNED):
        session.install("-c", "constraints.txt", f".[{extras}]")
        return
    others = [f"{name}=={version}.*" for name, version in LOWEST.items() if torch == OLDEST]
    session.install(f"torch=={torch}", *others, f".[{extras}]")


def run(session: nox.Session, script: str, *arguments: str) -> None:
    """Run one of ``scripts`` in the environment of the session."""
    session.run(str(HERE / "scripts" / script), *arguments, external=True)


@nox.session
@nox.parametrize(
    ("python", "torch"),
    TESTED,
    ids=[f"python={python}, torch={torch}" for python, torch in TESTED],
)
def tests(session: nox.Session, torch: str) -> None:
    """Run the test suite."""
    install(session, "test", torch)
    run(session, "test", *session.posargs)


@nox.session(python=PYTHON)
def check(session: nox.Session) -> None:
    """Check lint, format and types."""
    install(session, "test")
    run(session, "check")


@nox.session(python=PYTHON)
def examples(session: nox.Session) -> None:
    """Run each example; a warning is an error."""
    install(session, "examples")
    run(session, "examples")


@nox.session(python=PYTHON)
def integrations(session: nox.Session) -> None:
    """Run the tests that need Ray, gRPC and other libraries."""
    install(session, "test,integrations")
    files = ("tests/test_integrations.py", "tests/test_several_machines.py")
    run(session, "test", *files, *session.posargs)


@nox.session(python=False)
def dist(session: nox.Session) -> None:
    """Build and check the sdist and the wheel, in environments that the script creates."""
    run(session, "dist")


@nox.session(python=PYTHON)
def docs(session: nox.Session) -> None:
    """Build the site without a warning, and run the examples of the site and the docstrings."""
    install(session, "docs,test")
    run(session, "docs")
    run(session, "test", "tests/test_documentation.py", *session.posargs)


@nox.session(python=PYTHON, default=False)
def links(session: nox.Session) -> None:
    """Check the site's links to other sites; needs a network."""
    install(session, "docs")
    session.run("python", "-m", "sphinx", "-b", "linkcheck", "docs", "build/linkcheck")


@nox.session(python=False, default=False)
def cuda(session: nox.Session) -> None:
    """Run the device tests on PyTorch's CUDA build, in an environment that the script creates."""
    run(session, "test-on-cuda-runtime", "--all")

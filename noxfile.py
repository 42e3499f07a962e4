"""The tests on every Python and PyTorch that is supported, and the other checks.

``nox`` runs all, ``nox -s check examples`` some, ``nox -s 'tests(python=3.12, torch=2.14.1)'``
one; what follows ``--`` goes to pytest. A Python that is not on this machine is an error:
nothing has been tested there. Each session installs what it needs and runs one of ``scripts``.
``scripts/test-on-debian`` runs the tests on Debian's own build of PyTorch.
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

# What constraints.txt pins is for this Python and this torch.
PYTHON = "3.11"
PINNED = re.search(r"^torch==(.*)$", (HERE / "constraints.txt").read_text(), flags=re.M)[1]
# The oldest that pyproject.toml claims, with what was mended in it since.
LOWEST = dict(re.findall(r"\b(torch|anyio|trio|uvloop)>=([\d.]+)", str(PROJECT["project"])))
OLDEST = LOWEST.pop("torch") + ".*"
NEWEST = "2.15.0"

# Every Python that pyproject.toml names with the newest torch; one Python with each torch.
TESTED = [
    *((python, NEWEST) for python in nox.project.python_versions(PROJECT)),
    *((PYTHON, torch) for torch in (OLDEST, PINNED)),
]


def install(session: nox.Session, extras: str, torch: str = PINNED) -> None:
    """Installs this checkout with a certain torch; with the oldest, the oldest of the rest, too."""
    if (session.python, torch) == (PYTHON, PINNED):
        session.install("-c", "constraints.txt", f".[{extras}]")
        return
    others = [f"{name}=={version}.*" for name, version in LOWEST.items() if torch == OLDEST]
    session.install(f"torch=={torch}", *others, f".[{extras}]")


def run(session: nox.Session, script: str, *arguments: str) -> None:
    """Runs one of ``scripts`` in the environment of the session."""
    session.run(str(HERE / "scripts" / script), *arguments, external=True)


@nox.session
@nox.parametrize(
    ("python", "torch"),
    TESTED,
    ids=[f"python={python}, torch={torch}" for python, torch in TESTED],
)
def tests(session: nox.Session, torch: str) -> None:
    """The test suite."""
    install(session, "test", torch)
    run(session, "test", *session.posargs)


@nox.session(python=PYTHON)
def check(session: nox.Session) -> None:
    """Lint, format and types."""
    install(session, "test")
    run(session, "check")


@nox.session(python=PYTHON)
def examples(session: nox.Session) -> None:
    """Each example runs; a warning is an error."""
    install(session, "examples")
    run(session, "examples")


@nox.session(python=PYTHON)
def integrations(session: nox.Session) -> None:
    """The futures of other libraries, with the libraries themselves."""
    install(session, "test,integrations")
    run(session, "test", "tests/test_integrations.py", *session.posargs)


@nox.session(python=False)
def dist(session: nox.Session) -> None:
    """The sdist and the wheel, in environments that the script makes."""
    run(session, "dist")


@nox.session(python=PYTHON)
def docs(session: nox.Session) -> None:
    """The site is built without a warning, and what it and the docstrings show happens."""
    install(session, "docs,test")
    run(session, "docs")
    run(session, "test", "tests/test_documentation.py", *session.posargs)


@nox.session(python=PYTHON, default=False)
def links(session: nox.Session) -> None:
    """What the site links to elsewhere is there; takes the network."""
    install(session, "docs")
    session.run("python", "-m", "sphinx", "-b", "linkcheck", "docs", "build/linkcheck")


@nox.session(python=False, default=False)
def cuda(session: nox.Session) -> None:
    """The device tests on PyTorch's CUDA build, in an environment that the script makes."""
    run(session, "test-on-cuda-runtime", "--all")

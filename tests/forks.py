"""Run programs that each need a new interpreter, as forks of one that has imported torch.

A new interpreter takes seconds to import torch, and a fork starts in milliseconds. A program runs
and exits as with ``python -W error``. Processes for several requests are in `tests.cluster`.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import textwrap
import threading

from .threads import PATIENCE_WITH_PROCESSES

ROOT = pathlib.Path(__file__).parents[1]

Done = subprocess.CompletedProcess[str]


def run(
    program: str | pathlib.Path,
    *arguments: str,
    imported: tuple[str, ...] = ("torch",),
    filters: str = "error",
    finalizes: bool = True,
    folder: str | pathlib.Path = ".",
) -> Done:
    """Run a program in a fork of an interpreter that has imported some modules.

    Args:
        program: Its text, or its path.
        *arguments: The elements of ``sys.argv`` after the path.
        imported: The modules to import before the fork.
        filters: The value of ``PYTHONWARNINGS`` to emulate.
        finalizes: Whether the interpreter finalizes all modules at exit. With torch's, this takes
            longer than most programs.
        folder: The working directory. The package of this checkout can always be imported.
    """
    if isinstance(program, pathlib.Path):
        code, arguments = (folder / program).read_text(), (str(program), *arguments)
    else:
        code = textwrap.dedent(program)
    if not finalizes:
        code += "\n__import__('tests.fork_server').fork_server.exit_without_modules()"
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        request = {
            "code": code,
            "arguments": arguments,
            "folder": str(folder),
            "filters": filters,
            "files": [out.name, err.name],
        }
        status = _server(imported).exit_code_of(request)
        return Done(arguments, status, out.read(), err.read())


def output(program: str | pathlib.Path, *arguments: str, **options: object) -> str:
    """Run a program as `run` does; it must exit with 0, and write nothing to stderr."""
    done = run(program, *arguments, **options)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


_SERVER = "from tests import fork_server; exec(*fork_server.serve"


@functools.cache
def _server(imported: tuple[str, ...]) -> _Server:
    return _Server(imported)


class _Server:
    """A process that runs `tests.fork_server`."""

    def __init__(self, imported: tuple[str, ...]) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", f"{_SERVER}(*{imported}))"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "PYTHONWARNINGS": "",
                # For machines whose hostname resolves to no local address.
                "GLOO_SOCKET_IFNAME": "lo",
                "TP_SOCKET_IFNAME": "lo",
            },
            start_new_session=True,
        )
        atexit.register(self._close)

    def exit_code_of(self, request: dict[str, object]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        give_up = threading.Timer(PATIENCE_WITH_PROCESSES, os.killpg, (self._process.pid, 9))
        give_up.start()
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        finally:
            give_up.cancel()
            give_up.join()
        if not answer:
            _server.cache_clear()  # the next program starts a new server
            raise AssertionError("the program hangs, or the server cannot start")
        return int(answer)

    def _close(self) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()

"""The programs in the README and in ``docs/``, and a process that runs each in a fork of its own.

torch is imported once for all of them: on its own, each program would take seconds to import it.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import pathlib
import re
import sys
import tempfile
import threading
import traceback
import types
import warnings
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"^```(?P<language>\w+)\n(?P<code>.*?)^```\n(\nIt prints:\n\n```\w*\n(?P<printed>.*?)^```\n)?",
    flags=re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A block of code on a page, and what the page says that it prints.

    After the block, under "It prints:", or in comments that begin with ``# prints``.
    """

    page: str
    line: int
    language: str
    code: str
    printed: str


def blocks(language: str) -> list[Block]:
    """Returns the blocks in that language, of all pages."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _BLOCK.finditer(text):
            if match["language"] == language:
                line = text.count("\n", 0, match.start()) + 1
                name = str(page.relative_to(ROOT))
                code = match["code"]
                printed = match["printed"] or "".join(re.findall(r"# prints (.*\n)", code))
                found.append(Block(name, line, language, code, printed))
    return found


def serve() -> None:
    """Runs each program that comes in a line of stdin; writes a line of what became of it."""
    import anyio  # noqa: F401
    import torch  # noqa: F401
    import trio  # noqa: F401

    import torchfut_aio  # noqa: F401

    os.environ.update(GLOO_SOCKET_IFNAME="lo", TP_SOCKET_IFNAME="lo")
    # What rpc.init_rpc() of PyTorch warns of, about itself.
    warnings.filterwarnings("ignore", "You are using a Backend", UserWarning)
    gc.freeze()  # what is here already is not the programs' to collect
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                _run(json.loads(line))
            _, status = os.waitpid(child, 0)
            out.seek(0)
            err.seek(0)
            result: dict[str, Any] = {
                "returncode": os.waitstatus_to_exitcode(status),
                "stdout": out.read(),
                # But what some builds of gloo tell of themselves.
                "stderr": re.sub(r"^\[\./gloo/.* INFO .*\n", "", err.read(), flags=re.MULTILINE),
            }
        print(json.dumps(result), flush=True)


def _run(code: str) -> None:
    """Runs the program and ends the process, as an interpreter does that exits.

    All but the last step of that: to take down all of torch's modules takes longer than all else.
    """
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    status = 0
    try:
        exec(compile(code, "<the page>", "exec"), main.__dict__)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    main.__dict__.clear()
    gc.collect()  # an error that nobody has retrieved is logged
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()

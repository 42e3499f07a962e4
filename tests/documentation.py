"""The programs in the README and in ``docs/``, each run in its own process."""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple

from . import forks

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"^```(?P<language>\w+)\n(?P<code>.*?)^```\n(\nIt prints:\n\n```\w*\n(?P<printed>.*?)^```\n)?",
    flags=re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A block of code on a page, and the output that the page claims for it.

    The output follows the block, under "It prints:" or in comments that begin with ``# prints``.
    """

    page: str
    line: int
    language: str
    code: str
    printed: str


def blocks(language: str) -> list[Block]:
    """Return the blocks in that language, from all pages."""
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


def run(program: str) -> forks.Done:
    """Run a program of a page in a new process."""
    return forks.run(
        program,
        imported=("torch", "anyio", "trio", "torchfut_aio"),
        # PyTorch's rpc.init_rpc() emits this warning about itself.
        filters="error,ignore:You are using a Backend:UserWarning",
        finalizes=False,
    )

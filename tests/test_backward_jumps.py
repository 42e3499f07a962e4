"""No backward jump of the package lies outside the ``try`` that it stands in.

From Python 3.12 on, until 3.15.1, the compiler may put the jump that closes a loop where the
exception table does not lead to the ``try`` or ``with`` around the loop (CPython issue 130279).
If a signal handler raises at that jump, ``except`` and ``finally`` are skipped. A loop in a
separate function is safe, as the call of that function is covered.
"""

from __future__ import annotations

import ast
import dis
import gc
import itertools
import pathlib
import sys
import types

import pytest

import torchfut_aio

PACKAGE = pathlib.Path(torchfut_aio.__file__).parent


@pytest.fixture(autouse=True, scope="module")
def nothing_to_finalise():
    # Garbage of earlier tests may log a traceback when it is collected. CPython 3.11 then parses
    # the source, and its parser fails if that happens while it is already parsing.
    gc.collect()


def code_objects(code):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_objects(constant)


def guarded_blocks(tree):
    """Yield each ``try`` or ``with``, with the lines that it guards."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.With, ast.AsyncWith)):
            yield node, range(node.body[0].lineno, node.body[-1].end_lineno + 1)
        elif isinstance(node, ast.Try):
            blocks = [node.body]
            if node.finalbody:  # which guards the handlers and the else block as well
                blocks += [handler.body for handler in node.handlers] + [node.orelse]
            for block in filter(None, blocks):
                yield node, range(block[0].lineno, block[-1].end_lineno + 1)


def unguarded_jumps(source):
    """Return the functions and lines of loops whose backward jump their ``try`` does not cover."""
    guards = list(guarded_blocks(ast.parse(source)))
    found = []
    for code in code_objects(compile(source, "<source>", "exec", dont_inherit=True)):
        instructions = [i for i in dis.get_instructions(code) if i.opname != "EXTENDED_ARG"]
        lines = {i.offset: i.positions.lineno for i in instructions}
        for before, jump in itertools.pairwise(instructions):
            # CPython checks for no signals at the jump of an await. The jump after CLEANUP_THROW
            # closes no loop: it runs if an awaitable returns after an exception was thrown into it.
            if "JUMP_BACKWARD" not in jump.opname or "NO_INTERRUPT" in jump.opname:
                continue
            if before.opname == "CLEANUP_THROW":
                continue
            loop = [line for at, line in lines.items() if jump.argval <= at <= jump.offset and line]
            around = [
                (node, block)
                for node, block in guards
                if block.start <= min(loop)
                and max(loop) < block.stop
                # A function defined within the block runs outside of it.
                and node.lineno > code.co_firstlineno
            ]
            if not around:
                continue
            innermost, _ = min(around, key=lambda guard: len(guard[1]))
            if not _leads_to(code, jump.offset, innermost, lines):
                found.append(f"{code.co_qualname}, line {min(loop)}")
    return found


def _leads_to(code, offset, node, lines):
    """Return whether an exception raised at ``offset`` is handled within ``node``."""
    for entry in dis._parse_exception_table(code):
        if entry.start <= offset < entry.end:
            handler = next((line for at, line in lines.items() if at >= entry.target and line), 0)
            if node.lineno <= handler <= node.end_lineno:
                return True
    return False


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_an_interrupt_at_the_end_of_a_loop_skips_no_handler(path):
    assert unguarded_jumps(path.read_text()) == []


def test_scan_finds_jumps_the_compiler_leaves_unguarded():
    source = """
def loop(items, last):
    try:
        for item in items:
            if item:
                last(item)
    finally:
        last(None)
"""
    tables_are_complete = sys.version_info < (3, 12) or sys.version_info >= (3, 15, 1)
    assert bool(unguarded_jumps(source)) is not tables_are_complete

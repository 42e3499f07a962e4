"""The examples run, and print what they claim."""

from __future__ import annotations

import pathlib
import re

import pytest

from . import forks
from .threads import PATIENCE

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def printed_by(example, *arguments):
    """Return what an example prints; it must exit with 0 and emit no warning."""
    return forks.output(EXAMPLES / example, *arguments)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_task_group_example_uses_timely_results_only(loop):
    seconds, queries = 0.25, []
    pattern = r"query (\d) +(.*, (\d) given up): documents (.*)$"
    # Which replies arrive in time depends on the machine. Given enough time, all but one do.
    while any(given_up > "1" for _, _, given_up, _ in queries) or not queries:
        seconds *= 2
        assert seconds < PATIENCE
        printed = printed_by("task_group.py", loop, str(seconds))
        assert re.search(rf"event loop +{loop}$", printed, flags=re.M)
        queries = re.findall(pattern, printed, flags=re.M)
    assert [how for _, how, _, _ in queries] == ["4 shards answered, 1 failed, 1 given up"] * 5
    # Each query is a document in the index, so its shard finds the query itself.
    found = {number: documents.split(", ") for number, _, _, documents in queries}
    assert all(len(documents) == 3 for documents in found.values())
    assert [number for number, (best, *_) in found.items() if number == best] == ["0", "1", "3"]
    assert re.search(r"shard 4 +skipped 5 requests given up$", printed, flags=re.M)


def test_task_group_example_runs_on_asyncio_by_default():
    assert re.search(r"event loop +asyncio$", printed_by("task_group.py"), flags=re.M)


def test_script_example_reports_files_failures_and_timeouts():
    printed = printed_by("script.py")
    shown = dict(re.findall(r"^  (\w+) +(.*)$", printed, flags=re.M))
    assert re.fullmatch(r"8 files, [\d,]+ bytes", shown["written"])
    assert shown["measured"] == "7 of 8 files"
    assert shown["files"] == ", ".join(["fine"] * 5 + ["UnpicklingError"] + ["fine"] * 2)
    pattern = r"350,000 numbers, mean ([\d.]+), deviation ([\d.]+)"
    mean, deviation = map(float, re.fullmatch(pattern, shown["total"]).groups())
    assert mean == pytest.approx(5, abs=0.05)
    assert deviation == pytest.approx(3, abs=0.05)
    assert "was not done within 0.05 s" in shown["wait"]
    assert shown["fallback"] == shown["total"]
    assert shown["afterwards"] == "<Future pending waiters=0 callbacks=0>"

"""What a benchmark has found: medians and ratios as Markdown, all figures as JSON, and a plot."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from ._bench import measure
from ._machine import commit, machine

PACKAGES = (
    "torch",
    "uvloop",
    "trio",
    "anyio",
    "uvicorn",
    "starlette",
    "transformers",
    "ray",
    "janus",
    "culsans",
)
GREY = "#7d8590"  # visible on white and on black


def report(name: str, options: argparse.Namespace) -> None:
    """Run a benchmark, print its results, and save them if asked to."""
    module = importlib.import_module(f"benchmarks.{name}")
    rounds = options.rounds or (1 if options.quick else module.ROUNDS)
    about = facts(f"python -m benchmarks {name}" + " --quick" * options.quick, rounds)
    figures = measure(module.cases(options.quick), rounds)
    if options.save:
        save(options.folder, name, figures, about, module.DRAWN, module.BY)
    print(*tables(figures), about, sep="\n")


def facts(command: str, rounds: int) -> str:
    """Tells when, where, and of what the figures are."""
    found = [name for name in PACKAGES if importlib.util.find_spec(name)]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in found]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return (
        f"command: {command}; rounds: {rounds}; date: {now}; commit: {commit()}; "
        f"machine: {machine()}; load before: {os.getloadavg()[0]:.1f}; "
        f"versions: Python {platform.python_version()}, {', '.join(versions)}"
    )


def tables(figures: pd.DataFrame) -> Iterator[str]:
    """Yield each table: medians, and the median ratio to the first peer in the same round."""
    for title, rows in figures.groupby("table", sort=False):
        columns, peers = rows["column"].unique(), rows["peer"].unique()
        of_rounds = rows.pivot(index=["column", "round"], columns="peer", values="figure")[peers]
        medians = of_rounds.groupby("column").median()
        ratios = of_rounds.div(of_rounds[peers[0]], axis=0).groupby("column").median()
        # There is no ratio to nothing.
        shares = ratios.map(lambda it: f" (×{it:.2f})" if math.isfinite(it) else "")
        cells = medians.map(rounded) + shares
        cells[peers[0]] = medians[peers[0]].map(rounded)
        cells = cells.where(medians.notna(), "").loc[columns].rename(index=label)
        shown = cells.T if len(columns) <= len(peers) else cells
        shown = shown.rename_axis(index=None, columns=None)
        text = shown.to_markdown(stralign="right", disable_numparse=True)
        yield f"**{title}** (×: times {peers[0]})\n\n{text}\n"


def rounded(figure: float) -> str:
    """Return a figure with as many digits as are worth reading."""
    size = abs(figure)
    digits = 0 if size >= 100 or size == 0 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{figure:,.{digits}f}"


def label(column: Any) -> str:
    return str(column) if isinstance(column, str) else f"{column:,}"


def save(folder: Path, name: str, figures: pd.DataFrame, facts: str, drawn: str, by: str) -> None:
    """Write NAME.json, NAME.md, and NAME.svg of the tables whose titles match ``drawn``."""
    folder.mkdir(parents=True, exist_ok=True)
    short = figures.assign(figure=figures["figure"].map("{:.4g}".format).astype(float))
    of_rounds = short.groupby(["table", "column", "peer"], sort=False)["figure"].agg(list)
    rows = of_rounds.reset_index().values.tolist()
    (folder / f"{name}.json").write_text(json.dumps({"about": facts, "figures": rows}) + "\n")
    (folder / f"{name}.md").write_text("\n".join([*tables(figures), facts]) + "\n")
    if drawn:
        draw(folder / f"{name}.svg", figures[figures["table"].str.contains(drawn)], by)


def draw(path: Path, figures: pd.DataFrame, by: str) -> None:
    """Draws the medians of these tables, on no background."""
    import matplotlib as mpl
    import seaborn as sns

    texts = ("text.color", "xtick.color", "ytick.color", "axes.labelcolor", "axes.edgecolor")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": path.stem})
    mpl.rcParams.update(dict.fromkeys(texts, GREY))
    grid = sns.relplot(
        figures,
        x="column",
        y="figure",
        hue="peer",
        style="peer",
        col="table",
        col_wrap=2,
        kind="line",
        estimator="median",
        errorbar=None,
        markers=True,
        dashes=False,
        height=3,
        aspect=1.6,
        facet_kws={"sharex": False, "sharey": False},
    )
    grid.set(xscale="log", yscale="log").set_titles("{col_name}").set_axis_labels(by, "")
    grid.legend.set_title("")
    for axis in grid.axes.flat:
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.yaxis.set_minor_formatter("")
    grid.savefig(path, transparent=True, metadata={"Date": None})

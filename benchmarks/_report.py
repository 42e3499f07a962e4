"""The result of a benchmark: figures as JSON; from these, tables as Markdown, and plots as SVG."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from ._bench import KEYS, measure
from ._machine import commit, machine

PACKAGES = ("torch", "uvloop", "trio", "anyio", "uvicorn", "starlette", "transformers", "ray")
QUEUES = ("janus", "culsans")
WIDTH = 5.2  # inches of a plot; its text is readable on a phone
STYLES = ("oC3", "sC0", "^C2", "vC1", "DC4", "PC5", "XC6", "*C7")  # markers and colours


def report(name: str, options: argparse.Namespace) -> None:
    """Run a benchmark, or take its saved figures; print the results, and save them if asked to."""
    module = importlib.import_module(f"benchmarks.{name}")
    saved = options.folder / f"{name}.json"
    if options.redraw:
        result = json.loads(saved.read_text())
    else:
        rounds = options.rounds or (1 if options.quick else module.ROUNDS)
        about = facts(f"python -m benchmarks {name}" + " --quick" * options.quick, rounds)
        figures = measure(module.cases(options.quick), rounds)
        result = {"about": about, "figures": shortened(figures)}
    figures = pd.DataFrame(result["figures"], columns=[*KEYS, "figure"]).explode("figure")
    figures["figure"] = figures["figure"].astype(float)
    figures["round"] = figures.groupby(KEYS).cumcount()
    text = "\n".join([*tables(figures), result["about"]]) + "\n"
    print(text)
    if options.save or options.redraw:
        options.folder.mkdir(parents=True, exist_ok=True)
        saved.write_text(json.dumps(result) + "\n")
        saved.with_suffix(".md").write_text(text)
        for plot, titles in module.PLOTS.items():
            shown = figures[figures["table"].str.contains(titles)]
            draw(options.folder / f"{plot}.svg", shown, module.BY)


def facts(command: str, rounds: int) -> str:
    """Return when, where, and with which versions the figures were measured."""
    found = [name for name in PACKAGES + QUEUES if importlib.util.find_spec(name)]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in found]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return (
        f"command: {command}; rounds: {rounds}; date: {now}; commit: {commit()}; "
        f"machine: {machine()}; load before: {os.getloadavg()[0]:.1f}; "
        f"versions: Python {platform.python_version()}, {', '.join(versions)}"
    )


def shortened(figures: pd.DataFrame) -> list[list[Any]]:
    """Return a row for each table, column and peer, with the figures of all rounds."""
    short = figures.assign(figure=figures["figure"].map("{:.4g}".format).astype(float))
    rows = short.groupby(KEYS, sort=False)["figure"].agg(list).reset_index()
    return list(rows.values.tolist())


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
        cells = (
            cells.where(medians.notna(), "")
            .loc[columns]
            .rename(index=lambda it: it if isinstance(it, str) else f"{it:,}")
        )
        shown = cells.T if len(columns) <= len(peers) else cells
        shown = shown.rename_axis(index=None, columns=None)
        text = shown.to_markdown(stralign="right", disable_numparse=True)
        yield f"**{title}** (×: times {peers[0]})\n\n{text}\n"


def rounded(figure: float) -> str:
    """Return a figure with as many digits as are worth reading."""
    return f"{figure:,.0f}" if abs(figure) >= 100 else f"{figure:#.3g}" if figure else "0"


def draw(path: Path, figures: pd.DataFrame, by: str) -> None:
    """Plot the medians, a panel for each table: by numbers as lines, by names as rows of dots."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": path.stem, "grid.alpha": 0.3})
    plt.rcParams.update(
        {"legend.fontsize": 8.5, "legend.columnspacing": 1, "legend.frameon": False}
    )
    peers = [peer for peer in figures["peer"].unique() if not peer.startswith("floor")]
    panels = figures.groupby("table", sort=False)
    named = isinstance(figures["column"].iloc[0], str)
    size = (WIDTH, len(panels) * (0.9 + 0.2 * figures["column"].nunique() if named else 2) + 0.8)
    sharing = {"sharex": True, "sharey": named, "squeeze": False}
    figure, axes = plt.subplots(len(panels), figsize=size, layout="constrained", **sharing)
    for axis, (title, rows) in zip(axes.flat, panels, strict=True):
        medians = rows.groupby(["column", "peer"], sort=False)["figure"].median().unstack()
        for peer, style in zip(peers, STYLES, strict=False):
            if peer in medians:
                line = medians[peer].loc[rows["column"].unique()]
                ends = (line, line.index) if named else (line.index, line)
                axis.plot(*ends, style + ("" if named else "-"), label=peer)
        axis.set_title(textwrap.fill(title, 42 if named else 60), fontsize=10)
        if named:
            axis.margins(y=0.5 / len(medians))
            axis.set(xscale="log")
        else:
            axis.set(xscale="log", yscale="log")
            axis.yaxis.set(major_formatter="{x:,.7g}", minor_formatter="")
        axis.xaxis.set(major_formatter="{x:,.7g}", minor_formatter="")
        if medians.max(axis=None) < 100 * medians.min(axis=None):
            (axis.xaxis if named else axis.yaxis).set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.grid(visible=True)
    if named:
        axes[0, 0].invert_yaxis()
    axes[-1, 0].set_xlabel(by)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path, transparent=True, metadata={"Date": None})

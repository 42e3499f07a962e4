"""What a benchmark has found: samples in tables, shown on a terminal, as Markdown, JSON, plots."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from io import StringIO
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import rich.box
import rich.table
from rich.console import Console

from ._machine import commit, machine

# Visible on white and on black.
GREY, OURS_COLOURS = "#7d8590", ("#2f81f7", "#a371f7")
OTHER_COLOURS = ("#d9822b", "#c9a227", "#c0504d", "#b0708f", "#3a9a6b", "#2a9d9d", "#7d8590")


class Table:
    """Samples by peer and by column.

    Args:
        title: What is measured, and under which circumstances.
        unit: Of the samples.
        x: What the columns are.
        ours: The peers that are ours, of which the first is what the others are compared with.
        more_is_better: As with a rate; otherwise less is, as with a time.
        plot: Whether the table is drawn: the named column as bars, or all as lines.
    """

    def __init__(
        self,
        title: str,
        unit: str,
        x: str,
        ours: Sequence[str],
        more_is_better: bool = False,
        plot: bool | str = False,
    ) -> None:
        self.title, self.unit, self.x, self.ours = title, unit, x, ours
        self.more_is_better, self.plot = more_is_better, plot
        self.samples: dict[str, dict[Any, list[float]]] = {}

    def add(self, peer: str, column: Any, sample: float) -> None:
        """Adds the sample of one round."""
        self.samples.setdefault(peer, {}).setdefault(column, []).append(sample)

    def columns(self) -> list[Any]:
        """Returns all columns that have samples."""
        return list(dict.fromkeys(column for row in self.samples.values() for column in row))

    def cell(self, peer: str, column: Any) -> str:
        """Returns the median, and the median ratio to ours of the same round."""
        samples = self.samples[peer].get(column)
        if not samples:
            return ""
        of_ours = self.samples[self.ours[0]].get(column, ())
        ratios = [other / mine for mine, other in zip(of_ours, samples, strict=False) if mine]
        text = rounded(median(samples))
        return f"{text} (×{median(ratios):.2f})" if ratios and peer != self.ours[0] else text

    def print_to(self, console: Console, box: rich.box.Box = rich.box.SIMPLE) -> None:
        """Prints a row for each peer, or for each column if there are many."""
        peers, columns = list(self.samples), self.columns()
        by_peer = len(columns) <= len(peers)
        table = rich.table.Table(self.x, box=box)
        for head in columns if by_peer else peers:
            table.add_column(label(head), justify="right")
        if by_peer:
            for peer in peers:
                table.add_row(peer, *(self.cell(peer, column) for column in columns))
        else:
            for column in columns:
                table.add_row(label(column), *(self.cell(peer, column) for peer in peers))
        better = f"{self.unit}; {'more' if self.more_is_better else 'less'} is better; "
        how_to_read = f"{better if self.unit else ''}×: times {self.ours[0]}"
        console.print(f"**{self.title}** ({how_to_read})\n", table)

    def as_dict(self) -> dict[str, Any]:
        """Returns every sample, in the order of the rounds."""
        samples = {
            peer: {str(column): [float(f"{one:.4g}") for one in row[column]] for column in row}
            for peer, row in self.samples.items()
        }
        return {"title": self.title, "unit": self.unit, "x": self.x, "samples": samples}


def save(name: str, folder: Path, about: dict[str, Any], tables: Sequence[Table]) -> None:
    """Writes NAME.json, NAME.md, and NAME.svg if a table is to be drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = about | {"tables": [table.as_dict() for table in tables]}
    (folder / f"{name}.json").write_text(json.dumps(everything) + "\n")
    page = StringIO()
    console = Console(file=page, width=1_000)
    for table in tables:
        table.print_to(console, rich.box.MARKDOWN)
    console.print("; ".join(f"{key}: {value}" for key, value in about.items()))
    (folder / f"{name}.md").write_text(re.sub(" +\n", "\n", page.getvalue()))
    if drawn := [table for table in tables if table.plot and table.samples]:
        draw(folder / f"{name}.svg", drawn)


def draw(path: Path, tables: Sequence[Table]) -> None:
    """Draws the tables beneath each other, medians with quartiles, on no background."""
    import matplotlib as mpl
    from matplotlib import pyplot

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.size": 10})
    mpl.rcParams.update(
        {f"{what}.color": GREY for what in ("text", "xtick", "ytick")}
        | {f"axes.{what}color": GREY for what in ("label", "edge")}
    )
    figure, axes = pyplot.subplots(
        len(tables), squeeze=False, figsize=(8, 3.4 * len(tables)), layout="constrained"
    )
    for axis, table in zip(axes.flat, tables, strict=True):
        is_bars = isinstance(table.plot, str)
        others = cycle([GREY] if is_bars else OTHER_COLOURS)
        colours = dict(zip(table.ours, OURS_COLOURS, strict=False))
        colours = {peer: colours.get(peer) or next(others) for peer in table.samples}
        (bars if is_bars else lines)(axis, table, colours)
        axis.set_title(table.title, loc="left", fontweight="bold", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, axis="x" if is_bars else "both")
    figure.savefig(path, transparent=True, metadata={"Date": None})


def bars(axis: Any, table: Table, colours: dict[str, Any]) -> None:
    for peer, row in table.samples.items():
        middle, *spread = middle_and_spread(row[table.plot])
        drawn = axis.barh(
            peer, middle, xerr=[[each] for each in spread], color=colours[peer], ecolor=GREY
        )
        axis.bar_label(drawn, [rounded(middle)], padding=4)
    axis.invert_yaxis()
    axis.set_xlabel(", ".join(filter(None, [table.unit, str(table.plot)])))


def lines(axis: Any, table: Table, colours: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator

    for peer, row in table.samples.items():
        middles, *spreads = zip(*map(middle_and_spread, row.values()), strict=True)
        style = "-o" if peer in table.ours else "--" if peer.startswith("floor") else "-"
        wide = 2.4 if peer in table.ours else 1.2
        axis.errorbar(
            list(row), middles, spreads, fmt=style, lw=wide, ms=4, color=colours[peer], label=peer
        )
    axis.set(xscale="log", yscale="log", xlabel=table.x, ylabel=table.unit)
    axis.set_xticks(table.columns(), map(label, table.columns()))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)


def middle_and_spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median, and how far the quartiles are below and above it."""
    several = samples if len(samples) > 1 else samples * 2
    low, middle, high = quantiles(several, n=4, method="inclusive")
    return middle, middle - low, high - middle


def rounded(figure: float) -> str:
    """Returns a figure with as many digits as are worth reading."""
    size = abs(figure)
    digits = 0 if size >= 100 or size == 0 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{figure:,.{digits}f}"


def label(column: Any) -> str:
    return f"{column:,}" if isinstance(column, int) else str(column)


def about(command: str, rounds: int, load: str, notes: Sequence[str]) -> dict[str, Any]:
    """Returns when, where, and of what the figures are."""
    versions = [f"Python {platform.python_version()}"]
    for name in ("torch", "uvloop", "trio", "anyio", "uvicorn", "janus", "culsans"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "rounds": rounds,
        "machine": machine(),
        # At most a few tenths, or somebody else is at work there, too.
        "load before": load,
        "versions": ", ".join(versions),
    } | ({"notes": " ".join(notes)} if notes else {})

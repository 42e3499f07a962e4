"""Plots as SVG: horizontal bars, and lines on logarithmic axes, both with quartiles.

They have no background, and colours for light and for dark ones. Ours has a colour, what
it is compared with is grey, and a bound that nobody can beat is dashed. Everything is
labelled where it stands. Nothing here can measure text, so widths are taken for larger
than they are in any usual font.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import ceil, floor, log10

from ._report import quartiles, rounded

__all__ = ["bars", "lines"]

WIDTH = 760
MARGIN = 16
TOP = 64  # title and note are above
LETTER = 7.8  # of a text of 13 px

_STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #1f2328 }
.title { font-size: 15px; font-weight: 600 }
.note, .tick, .other { fill: #59636e }
.note, .tick { font-size: 12px }
.ours-text { fill: #0550ae; font-weight: 600 }
.grid { stroke: #d1d9e0 }
.whisker { stroke: #1f2328; stroke-width: 1.25; fill: none }
.bar-ours { fill: #0969da }
.bar-peer { fill: #a8b1bb }
.bar-bound { fill: none; stroke: #6e7781; stroke-dasharray: 3 2 }
.line-ours, .line-peer, .line-bound { fill: none; stroke: #818b98; stroke-width: 1.5 }
.line-ours { stroke: #0969da; stroke-width: 2.5 }
.line-bound { stroke-dasharray: 5 3 }
.dot-ours { fill: #0969da }
.dot-peer, .dot-bound { fill: #818b98 }
.leader { stroke: #a8b1bb; fill: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .note, .tick, .other { fill: #9da7b3 }
  .ours-text { fill: #79c0ff }
  .grid { stroke: #30363d }
  .whisker { stroke: #e6edf3 }
  .bar-ours, .dot-ours { fill: #388bfd }
  .bar-peer { fill: #59626d }
  .bar-bound { stroke: #9da7b3 }
  .line-peer, .line-bound { stroke: #848d97 }
  .line-ours { stroke: #388bfd }
  .dot-peer, .dot-bound { fill: #848d97 }
  .leader { stroke: #59626d }
}
"""


def bars(
    title: str,
    note: str,
    unit: str,
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    ours: str,
    bound: str = "",
) -> str:
    """Returns a plot of medians as bars, with the quartiles as whiskers.

    Args:
        title: What is shown.
        note: Under which circumstances.
        unit: For the axis.
        groups: Samples by group and by peer. The only group may have no name.
        ours: The peer to highlight.
        bound: The peer that is no peer, but a bound.
    """
    row, gap = 20, 32 if len(groups) > 1 else 4
    left = MARGIN + max(len(peer) for group in groups.values() for peer in group) * LETTER + 8
    right = WIDTH - MARGIN - 8 * LETTER  # the figures are behind the bars
    spreads = {
        (name, peer): quartiles(samples)
        for name, group in groups.items()
        for peer, samples in group.items()
    }
    ticks = _even_ticks(max(high for _, _, high in spreads.values()))
    scale = (right - left) / max(ticks[-1], *(high for _, _, high in spreads.values()))

    drawn, y = [], float(TOP)
    for name, group in groups.items():
        y += gap
        if len(groups) > 1:
            drawn.append(_text(MARGIN, y - 9, name, "note"))
        for peer in group:
            low, middle, high = spreads[name, peer]
            kind = _kind(peer, ours, bound)
            end, middle_of_row = left + middle * scale, y + row / 2
            drawn += [
                _text(left - 8, middle_of_row + 4.5, peer, _text_kind(kind), "end"),
                f'<rect class="bar-{kind}" x="{left:.1f}" y="{y + 4:.1f}" '
                f'width="{max(end - left, 0.5):.1f}" height="{row - 8}"/>',
                _whisker(left + low * scale, left + high * scale, middle_of_row),
                _text(
                    max(end, left + high * scale) + 6,
                    middle_of_row + 4.5,
                    rounded(middle),
                    _text_kind(kind),
                ),
            ]
            y += row
    grid = []
    for tick in ticks:
        x = left + tick * scale
        grid.append(_line(x, TOP, x, y + 6, "grid"))
        grid.append(_text(x, y + 21, _plain(tick), "tick", "middle"))
    axis = _text((left + right) / 2, y + 42, unit, "note", "middle")
    return _svg(y + 42 + MARGIN, title, note, [*grid, *drawn, axis])


def lines(
    title: str,
    note: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Mapping[float, Sequence[float]]],
    ours: str,
    bound: str = "",
) -> str:
    """Returns a plot of medians as lines on logarithmic axes, with the quartiles as whiskers.

    Args:
        title: What is shown.
        note: Under which circumstances.
        x_label: What is varied, and its unit.
        y_label: What is measured, and its unit.
        series: Samples by peer and by x, all positive.
        ours: The peer to highlight.
        bound: The peer that is no peer, but a bound.
    """
    top, bottom = TOP + 28, TOP + 28 + 300
    left, right = MARGIN + 48, WIDTH - MARGIN - 24 - max(map(len, series)) * LETTER
    spreads = {
        peer: {x: quartiles(samples) for x, samples in by_x.items()}
        for peer, by_x in series.items()
    }
    xs = sorted({x for by_x in spreads.values() for x in by_x})
    ys = [figure for by_x in spreads.values() for spread in by_x.values() for figure in spread]
    y_ticks = _log_ticks(min(ys), max(ys))
    x_of = _log_scale(xs[0], xs[-1], left + 10, right - 10)
    y_of = _log_scale(min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1]), bottom, top)

    drawn = [_text(MARGIN, top - 14, y_label, "note")]
    for tick in y_ticks:
        drawn.append(_line(left, y_of(tick), right, y_of(tick), "grid"))
        drawn.append(_text(left - 8, y_of(tick) + 4, _plain(tick), "tick", "end"))
    for x in xs:
        drawn.append(_line(x_of(x), bottom, x_of(x), bottom + 5, "grid"))
        drawn.append(_text(x_of(x), bottom + 21, _plain(x), "tick", "middle"))
    drawn.append(_text((left + right) / 2, bottom + 42, x_label, "note", "middle"))

    # Ours is drawn last, on top of the others.
    for peer in sorted(spreads, key=lambda peer: peer == ours):
        kind = _kind(peer, ours, bound)
        points = [(x_of(x), *map(y_of, spreads[peer][x])) for x in sorted(spreads[peer])]
        path = " ".join(f"{x:.1f},{middle:.1f}" for x, _, middle, _ in points)
        drawn.append(f'<polyline class="line-{kind}" points="{path}"/>')
        for x, low, middle, high in points:
            drawn.append(_line(x, low, x, high, f"line-{kind}"))
            drawn.append(f'<circle class="dot-{kind}" cx="{x:.1f}" cy="{middle:.1f}" r="3"/>')
    at_the_edge = {}
    for peer, by_x in spreads.items():
        y = y_of(by_x[max(by_x)][1])
        if max(by_x) == xs[-1]:
            at_the_edge[peer] = y
        else:  # it was not measured further
            drawn.append(_text(x_of(max(by_x)) + 8, y + 4.5, peer, "other"))
    for peer, height in _apart(at_the_edge, top, bottom).items():
        kind = _text_kind(_kind(peer, ours, bound))
        start = f"M{x_of(xs[-1]) + 5:.1f} {at_the_edge[peer]:.1f}"
        drawn.append(f'<path class="leader" d="{start} L{right + 4:.1f} {height:.1f} h8"/>')
        drawn.append(_text(right + 16, height + 4.5, peer, kind))
    return _svg(bottom + 42 + MARGIN, title, note, drawn)


def _kind(peer: str, ours: str, bound: str) -> str:
    return "ours" if peer == ours else "bound" if peer == bound else "peer"


def _text_kind(kind: str) -> str:
    return "ours-text" if kind == "ours" else "other"


def _svg(height: float, title: str, note: str, drawn: Sequence[str]) -> str:
    heading = [_text(MARGIN, 26, title, "title"), _text(MARGIN, 47, note, "note")]
    body = "\n".join([*heading, *drawn])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {ceil(height)}" '
        f'width="{WIDTH}" height="{ceil(height)}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n{body}\n</svg>\n"
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f} L{x2:.1f} {y2:.1f}"/>'


def _whisker(low: float, high: float, y: float) -> str:
    return (
        f'<path class="whisker" d="M{low:.1f} {y:.1f} H{high:.1f} '
        f'M{low:.1f} {y - 3:.1f} v6 M{high:.1f} {y - 3:.1f} v6"/>'
    )


def _plain(tick: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if tick >= size:
            return f"{tick / size:g}{letter}"
    return f"{tick:g}"


def _even_ticks(most: float) -> list[float]:
    """Returns about five ticks from 0 up to ``most`` or a little less."""
    size = 10 ** floor(log10(most / 5))
    step = min((size * n for n in (1, 2, 5, 10)), key=lambda step: abs(most / step - 5))
    return [step * n for n in range(floor(most / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Returns ticks around ``low`` to ``high``: every power of ten, or more of them."""
    decades = log10(high / low)
    factors = (1,) if decades > 3 else (1, 3) if decades > 2 else (1, 2, 5)
    ticks = [
        factor * 10.0**power
        for power in range(floor(log10(low)), ceil(log10(high)) + 1)
        for factor in factors
    ]
    first = max((tick for tick in ticks if tick <= low * 1.001), default=ticks[0])
    last = min((tick for tick in ticks if tick >= high * 0.999), default=ticks[-1])
    return [tick for tick in ticks if first <= tick <= last]


def _log_scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = log10(high / low) or 1
    return lambda figure: start + (end - start) * log10(figure / low) / span


def _apart(heights: Mapping[str, float], top: float, bottom: float) -> dict[str, float]:
    """Returns heights for labels, near the given ones but far enough from each other."""
    least = 17
    names = sorted(heights, key=heights.__getitem__)
    placed = dict(heights)
    free_from = top
    for name in names:
        placed[name] = max(placed[name], free_from)
        free_from = placed[name] + least
    free_to = bottom
    for name in reversed(names):
        placed[name] = min(placed[name], free_to)
        free_to = placed[name] - least
    return placed

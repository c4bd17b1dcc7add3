"""Quality against cost as a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmaccel.errors import MMAccelError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Point", "frontier", "pareto_plot"]

# Okabe and Ito's palette without black and yellow, told apart with every common colour blindness and on white, and two
# that differ from it in lightness; the marker tells a method as well
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#5B3A1A")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DENSE = "dense"


@dataclass(frozen=True)
class Point:
    """One setting: cost `x`, quality `y` with its interval, `method` (its colour and line) and `label` (its text)."""

    method: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""
    baseline: bool = False


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats: none is at most as costly and at least as good, and better in one of both."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def pareto_plot(
    points: Sequence[Point],
    path: str | Path,
    *,
    x: str,
    y: str,
    title: str,
    source: str,
    log: bool = False,
    percent: bool = False,
) -> Path:
    """Draw a PNG of quality against cost and return its path.

    One colour and marker a method (colour-blind safe), baselines hollow and dashed; the frontier is a grey line behind
    them; the method "dense" is a black star with a horizontal line. `x` and `y` are the axes' names with units, `log`
    makes the cost axis logarithmic, `percent` shows quality in percent. `source` says what the figures come from
    ("embedded model", "random weights") and is printed in the picture.

    Raises:
        MMAccelError: no points, a value that is not finite, or a cost that is not positive on a logarithmic axis.
    """
    _check(points, log)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    # a figure of its own, without pyplot, leaves the caller's backend and figures alone
    figure = Figure(figsize=(7.5, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    front = frontier(points)
    steps = {"drawstyle": "steps-post", "color": "0.8", "linewidth": 4, "zorder": 1}
    axes.plot([p.x for p in front], [p.y for p in front], label="frontier", **steps)
    methods = list(dict.fromkeys(point.method for point in points if point.method != _DENSE))
    for point in (p for p in points if p.method == _DENSE):
        axes.axhline(point.y, color="black", linewidth=0.8, linestyle=":", zorder=1)
        axes.plot([point.x], [point.y], "k*", markersize=13, label=_DENSE, zorder=4)
    for number, method in enumerate(methods):
        _draw(axes, [p for p in points if p.method == method], number)
    if log:
        axes.set_xscale("log")
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    figure.text(0.995, 0.005, source, ha="right", va="bottom", fontsize=9, color="0.25")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _draw(axes: Any, points: Sequence[Point], number: int) -> None:
    points = sorted(points, key=lambda point: point.x)
    # beyond eight methods colours come again, with another marker
    again = number + number // len(_COLOURS)
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[again % len(_MARKERS)]
    baseline = points[0].baseline
    xs, ys = [p.x for p in points], [p.y for p in points]
    down = [0.0 if p.low is None else max(0.0, p.y - p.low) for p in points]
    up = [0.0 if p.high is None else max(0.0, p.high - p.y) for p in points]
    axes.errorbar(
        xs, ys, yerr=(down, up), color=colour, marker=marker, markersize=7, linewidth=1.4, capsize=2, elinewidth=0.8,
        linestyle="--" if baseline else "-", markerfacecolor="white" if baseline else colour,
        label=points[0].method, zorder=2 if baseline else 3,
    )  # fmt: skip
    for point in points:
        if point.label:
            axes.annotate(
                point.label, (point.x, point.y), xytext=(5, -9), textcoords="offset points", fontsize=7, color=colour
            )


def _check(points: Sequence[Point], log: bool) -> None:
    if not points:
        raise MMAccelError("there are no points to plot.")
    for point in points:
        values = [v for v in (point.x, point.y, point.low, point.high) if v is not None]
        if not all(math.isfinite(v) for v in values):
            raise MMAccelError(f"{point.method} {point.label}: a value to plot is not finite.")
        if log and point.x <= 0:
            raise MMAccelError(f"{point.method} {point.label}: a logarithmic axis needs costs above 0, not {point.x}.")

"""Quality against cost as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Point", "pareto_plot"]


@dataclass(frozen=True)
class Point:
    """One setting: cost `x`, quality `y` with its interval, `method` (a line and a colour), `label` (its text)."""

    method: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""
    baseline: bool = False


def pareto_plot(
    points: Sequence[Point],
    path: str | Path,
    *,
    x: str,
    y: str,
    title: str,
    source: str,
    log: bool = False,
) -> Path:
    """Draw a PNG of quality against cost and return its path.

    One method a colour and a marker (colour-blind safe), baselines hollow and dashed; settings that no other one beats
    in both are joined by a grey line; the method "dense" is a horizontal line as well. `source` says what the figures
    come from ("embedded model", "random weights") and is printed in the picture.

    Raises:
        MMAccelError: no points, or a value is not finite.
    """
    raise NotImplementedError

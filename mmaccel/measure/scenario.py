"""Benchmarks as data: a TOML file says what is run; the runners live here so that they need no checkout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Scenario", "load_scenario", "run_scenario"]


@dataclass(frozen=True)
class Scenario:
    """One benchmark: its name, what it is about, which runner does it ("quality" or "speed"), and its options."""

    name: str
    title: str
    runner: str
    options: dict[str, Any]


def load_scenario(path: str | Path) -> Scenario:
    """Read a scenario.

    Raises:
        MMAccelError: the file is missing or no TOML, names no known runner, or an option that the runner does not have.
    """
    raise NotImplementedError


def run_scenario(
    scenario: Scenario,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Run a scenario, append its rows to the JSON-lines file `out` and return all rows of the run.

    `overrides` replaces options (clips, repeats, layers, ...). `progress(what, done, total)` is called now and then.
    What `out` or the work file beside it already holds for the same options is not run again.

    Raises:
        MMAccelError: an unknown option or a value of the wrong type.
    """
    raise NotImplementedError

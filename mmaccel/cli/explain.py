"""mmaccel explain: which methods fit a model, and what each would touch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmaccel.cli.terminal import Terminal

__all__ = ["run"]


def run(terminal: Terminal, source: str) -> None:
    """Explain one model."""
    from mmaccel.api import explain
    from mmaccel.cli.models import outline

    found = explain(outline(source))
    terminal.show(found)
    terminal.finish({"model": source, **found.as_dict()})

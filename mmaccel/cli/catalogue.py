"""mmaccel list: the methods, straight from what their classes say about themselves."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from mmaccel.cli.terminal import Terminal
    from mmaccel.method import Method

__all__ = ["describe", "run"]


def run(terminal: Terminal) -> None:
    """List all methods."""
    from mmaccel.method import registry

    entries = [describe(cls) for cls in registry().values()]
    terminal.show(_table(entries), "A spec is name:knob=value;knob=value, a stack spec+spec. Prices: mmaccel demo.")
    terminal.finish({"methods": entries})


def describe(cls: type[Method]) -> dict[str, Any]:
    """Everything that is declared about a method, as plain data."""
    info = cls.info
    return {
        "name": info.name,
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "stage": info.stage.name.lower().replace("_", " "),
        "verb": info.verb,
        "summary": info.summary,
        "source": info.source,
        "year": info.year,
        "licence": info.licence,
        "lossless": info.lossless,
        "trained": info.trained,
        "baseline": info.baseline,
        "targets": list(info.targets),
        "needs": list(info.needs),
        "works": list(info.slots),
        "knobs": _knobs(cls),
        "presets": {name: dict(values) for name, values in cls.presets.items()},
    }


def _knobs(cls: type[Method]) -> list[dict[str, Any]]:
    hints = typing.get_type_hints(cls)
    found = []
    for entry in dataclasses.fields(cls):
        required = entry.default is dataclasses.MISSING
        found.append(
            {
                "name": entry.name,
                "type": _type(hints[entry.name]),
                "default": None if required else entry.default,
                "required": required,
                "range": _range(entry),
                "doc": entry.metadata.get("doc", ""),
            }
        )
    return found


def _type(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(sorted({type(value).__name__ for value in typing.get_args(hint)}))
    parts = typing.get_args(hint)
    return " or ".join("none" if part is type(None) else part.__name__ for part in parts) if parts else hint.__name__


def _range(entry: dataclasses.Field[Any]) -> str:
    meta = entry.metadata
    if meta.get("choices"):
        return " | ".join(map(str, meta["choices"]))
    if entry.name == "keep":
        return "(0, 1] or a count"
    low, high, above = meta.get("low"), meta.get("high"), meta.get("above")
    if above is not None:
        return f"({above:g}, {high:g}]" if high is not None else f"> {above:g}"
    if low is not None:
        return f"[{low:g}, {high:g}]" if high is not None else f">= {low:g}"
    return "" if high is None else f"<= {high:g}"


def _table(entries: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title="methods", show_lines=True)
    for heading in ("method", "stage", "verb", "what it does", "knobs and defaults", "source", "lossless"):
        table.add_column(heading, no_wrap=heading == "method")
    for entry in entries:
        knobs = [
            f"{knob['name']}={'(required)' if knob['required'] else knob['default']}  {knob['range']}".rstrip()
            for knob in entry["knobs"]
        ]
        name = entry["name"] + ("\nbaseline" if entry["baseline"] else "")
        source = entry["source"] if entry["baseline"] else f"{entry['source']} ({entry['year']})"
        # Ranges have brackets, which rich would read as markup.
        cells = (name, entry["stage"], entry["verb"], entry["summary"], "\n".join(knobs), source)
        table.add_row(*(cell.replace("[", r"\[") for cell in cells), "yes" if entry["lossless"] else "no")
    return table

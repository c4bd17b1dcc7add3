"""How tables write their cells."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from mmaccel.method import registry

if TYPE_CHECKING:
    from collections.abc import Sequence

Row = dict[str, Any]


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]], caption: str) -> str:
    """A table with its caption."""
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))
    return f"\n{body}\n\n{caption}\n\n"


def mark(spec: str) -> str:
    """A star for a baseline."""
    cls = registry().get(spec.partition(":")[0])
    return " *" if cls is not None and cls.info.baseline else ""


def keep_of(spec: str) -> float:
    """The budget in a spec, 1 without one."""
    found = re.search(r"keep=([\d.]+)", spec)
    return float(found[1]) if found else 1.0


def percent(share: float) -> str:
    """A share in percent."""
    value = 100 * share
    return f"{value:.1f} %" if value >= 1 else f"{value:.2f} %"


def interval_text(interval: Row) -> str:
    """The bounds of an interval in percent."""
    return f"[{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def points(interval: Row) -> str:
    """A difference in points with its bounds."""
    return f"{100 * interval['value']:+.1f} {interval_text(interval)}"


def tokens_of(row: Row) -> str:
    """Visual tokens in the prompt, in the first and in the last decoder layer."""
    numbers = [f"{row[name]:.0f}" for name in ("tokens_in", "tokens_out", "tokens_last")]
    return " → ".join(dict.fromkeys(numbers))


def seconds_text(value: float) -> str:
    """A time in the unit that fits."""
    if value < 1e-3:
        return f"{1e6 * value:.0f} µs"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def against(rival: Row) -> str:
    """Our time as a share of a rival's."""
    return "missing" if rival["missing"] is not None else percent(rival["ratio"]["median"])


def path_of(event: Row) -> str:
    """Which implementation of a kernel ran, and why."""
    return event["backend"] if event["reason"] is None else f"{event['backend']} ({event['reason']})"


def share_of(row: Row, dense: Row, stage: str) -> str:
    """A stage: its time in the dense row, else its share of it."""
    if row is dense:
        return seconds_text(row["ttft"]["stages"][stage]["median"])
    return percent(row["stage_ratio"][stage]) if row["stage_ratio"][stage] is not None else ""


def place_of(row: Row) -> str:
    """The device that a row was made on."""
    # a run on the CPU of a machine that has a GPU says nothing of the GPU
    machine, device = row["machine"], row.get("device", "cpu")
    if device.startswith("cuda"):
        return machine["gpu"]
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads a process"


def machine_of(row: Row) -> str:
    """That, and the versions."""
    version = row["versions"]
    names = ("torch", "transformers", "mmaccel")
    return f"{place_of(row)}; {', '.join(f'{name} {version[name]}' for name in names)}."


def depth_of(row: Row) -> str:
    """How many layers there were, if not all."""
    if not row["shortened"]:
        return ""
    if "layers_total" not in row:
        return f", {row['layers']} + {row['vision_layers']} layers"
    return f", {row['layers']} of {row['layers_total']} + {row['vision_layers']} of {row['vision_layers_total']} layers"

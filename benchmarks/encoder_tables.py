"""Tables of what happens inside vision encoders, and of streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from table_format import (
    Row,
    depth_of,
    keep_of,
    machine_of,
    mark,
    markdown,
    percent,
    points,
    seconds_text,
    tokens_of,
)

from mmaccel.measure.equal_cost import Curve, at_equal_cost
from mmaccel.measure.outcome import unpack

_LEADERS = ("earlytom", "holitom", "stc")


def encoders(rows: list[Row], _everything: bool) -> str:
    """The stages of the newest run, and whether the encoder's time follows its FLOPs."""
    newest = max(rows, key=lambda row: row["time"])["key"]
    run = [row for row in rows if row["key"] == newest]
    dense = next(row for row in run if row["spec"] == "dense")
    stages = [stage for stage in dense["ttft"]["stages"] if stage != "rest"]
    heads = ["setting", "first token", "of dense", *stages, "own work", "encoder FLOPs", "encoder time", "time / FLOPs",
             "tokens"]  # fmt: skip
    lines = []
    for row in sorted(run, key=lambda row: row is not dense):
        flops = row["flops_encoder"] / dense["flops_encoder"]
        lines.append(
            [
                f"`{row['spec']}`{mark(row['spec'])}",
                seconds_text(row["ttft"]["total"]["median"]),
                percent(row["ttft_ratio"]),
                *(seconds_text(row["ttft"]["stages"][stage]["median"]) for stage in stages),
                "" if row is dense else percent(row["overhead_of_dense"]),
                percent(flops),
                percent(row["stage_ratio"]["encode"]) if row is not dense else "100.0 %",
                f"{row['stage_ratio']['encode'] / flops:.2f}" if row is not dense else "1.00",
                tokens_of(row),
            ]
        )
    depth = depth_of(dense).removeprefix(", ")
    caption = (
        f"**Random weights** in the published configuration of {dense['model']}, {dense['frames']} frames"
        f"{', ' + depth if depth else ''}, {dense['dtype']}, SDPA, batch 1, median of {dense['repeats']} warm rounds "
        "in turn; own work: scoring, deciding and merging, of the dense time to first token, contained in the stages; "
        f"encoder FLOPs and time: of dense. * baseline. {machine_of(dense)}"
    )
    return markdown(heads, lines, caption)


def towers(rows: list[Row], _everything: bool) -> str:
    """Vision encoders by themselves: time and FLOPs of a whole clip, and of one call that reuses another frame."""
    heads = ["encoder", "clip", "setting", "time", "of dense", "FLOPs", "time / FLOPs", "a reusing frame", "its FLOPs",
             "features differ"]  # fmt: skip
    newest: dict[tuple[str, str], str] = {}
    for row in sorted(rows, key=lambda row: row["time"]):
        newest[row["model"], row["clip"]] = row["key"]
    shown = [row for row in rows if newest[row["model"], row["clip"]] == row["key"]]
    lines = []
    for row in shown:
        reuse = _reusing(row)
        lines.append(
            [
                row["model"],
                row["clip"],
                f"`{row['spec']}`",
                seconds_text(row["seconds"]["median"]),
                percent(row["ratio"]["median"]),
                percent(row["flops_ratio"]),
                f"{row['ratio']['median'] / row['flops_ratio']:.2f}",
                *(("", "") if reuse is None else (percent(reuse["ratio"]["median"]), percent(reuse["flops_ratio"]))),
                f"{row['difference']:.1e}" if row["difference"] else "0",
            ]
        )
    one = shown[0]
    chunk = one["options"]["chunk"]
    how = f"{chunk} a call, as a stream" if chunk else "in one call"
    caption = (
        f"**Random weights** in published configurations, the first {one['layers']} layers, {one['dtype']}, SDPA, "
        f"{one['shapes']['frames'][0]} frames, {how}, median of the ratios of {one['repeats']} warm rounds in turn; "
        "features differ: norm of the difference, of that of dense. still: a camera that stands, with noise and a "
        f"moving square; pan: one that turns. {machine_of(one)}"
    )
    return markdown(heads, lines, caption)


def _reusing(row: Row) -> Row | None:
    """The second call of a stream, if it was cheaper than the dense one."""
    calls = row["calls"]
    return calls[1] if len(calls) > 1 and calls[1]["flops_ratio"] < 1 else None


def streaming(rows: list[Row], _everything: bool) -> str:
    """Latency and memory of streams, and whether they grow."""
    grows = "growth in 1,000 frames"
    heads = ["methods", "eviction", "a frame", "99 %", "of median", grows, "memory", grows, "evictions"]
    lines = []
    for row in rows:
        push, memory = row["push"], row["memory"]
        lines.append(
            [
                f"`{row['spec']}`" if row["spec"] else "none",
                row["mode"],
                seconds_text(push["median"]),
                seconds_text(push["p99"]),
                f"{push['p99_over_median']:.1f}x",
                _slope(row["push_slope"], 1e6, "ms"),
                f"{memory['first'] / 1e6:,.0f} → {memory['last'] / 1e6:,.0f} MB",
                _slope(row["memory_slope"], 1e-3, "MB"),
                f"{row['stats']['evictions']:,}",
            ]
        )
    one = rows[0]
    options = one["options"]
    caption = (
        f"**Embedded model** ({one['dtype']}, SDPA). {options['frames']:,} frames pushed one by one at a budget of "
        f"{options['max_tokens']} visual tokens; the first {options['settle']} do not count. Growth is the slope of a "
        f"line, with its 95 % interval from draws of blocks of 20 frames. {machine_of(one)}"
    )
    return markdown(heads, lines, caption)


def _slope(interval: Row, scale: float, unit: str) -> str:
    value, low, high = (interval[name] * scale for name in ("value", "low", "high"))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}] {unit}"


def plot_streaming(rows: list[Row], path: Path) -> Path:
    """Draw latency and memory over the frames of each stream."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for row, colour in zip(rows, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False):
        curve, label = row["curve"], f"{row['spec'] or 'no method'}, {row['mode']}"
        frames = [point["frame"] for point in curve]
        above.plot(frames, [1e3 * point["median"] for point in curve], color=colour, label=label)
        above.plot(frames, [1e3 * point["p99"] for point in curve], color=colour, linewidth=0.8, linestyle=":")
        below.plot(frames, [point["memory"] / 1e6 for point in curve], color=colour)
    above.set_ylabel("ms a frame (dotted: 99 %)")
    below.set_ylabel("memory, MB")
    below.set_xlabel("frames pushed")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    above.legend(frameon=False, fontsize=8, ncols=2)
    figure.text(0.995, 0.005, "embedded model", ha="right", va="bottom", fontsize=9, color="0.25")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def equal_flops(rows: list[Row], _everything: bool) -> str:
    """Methods of ours against all others at the same FLOPs of encoder and language model together."""
    curves, clips = _curves(rows)
    dense = next(row for row in rows if row["spec"] == "dense" and row["seed"] == "all")
    leaders = [row for row in rows if row["seed"] == "all" and row["spec"].partition(":")[0] in _LEADERS]
    lines = []
    for name in curves:
        if name.partition(":")[0] in _LEADERS:
            continue
        line = [f"`{name}`{mark(name)}"]
        for row in leaders:
            against = at_equal_cost(row["flops"], _hits(rows, row["spec"]), curves[name], clips)
            if against is None:
                line.append(f"from {percent(curves[name].costs[0] / dense['flops'])}")
            else:
                line.append(points(against.as_dict()))
        lines.append(line)
    heads = ["against"] + [f"`{row['spec']}`, {percent(row['flops'] / dense['flops'])}" for row in leaders]
    caption = (
        "**Embedded model**, the same clips. Points of accuracy that the setting of a column is ahead of the method of "
        "a row where that costs as much: encoder, language model and own work, of dense. Between its settings, and "
        "dense, the answers of a method are mixed in proportion; 95 % intervals draw clips. from: the cheapest setting "
        "that was run costs more. * baseline."
    )
    return markdown(heads, lines, caption)


def _hits(rows: list[Row], spec: str) -> np.ndarray:
    """float64 [n]: which questions were answered rightly, all seeds behind each other."""
    parts = sorted((row for row in rows if row["spec"] == spec and row["seed"] != "all"), key=lambda row: row["seed"])
    return np.concatenate([unpack(row["hits"], row["n"]) for row in parts]).astype(np.float64)


def _curves(rows: list[Row]) -> tuple[dict[str, Curve], np.ndarray]:
    """Of each method (and variant) its settings by cost, dense last; and to which clip each question belongs."""
    pooled = [row for row in rows if row["seed"] == "all"]
    dense = next(row for row in pooled if row["spec"] == "dense")
    found: dict[str, list[Row]] = {}
    for row in pooled:
        if row is not dense:
            name = row["spec"].partition(":")[0]
            found.setdefault(name, []).append(row)
    curves = {}
    for name, settings in found.items():
        settings = sorted(settings, key=lambda row: (row["flops"], keep_of(row["spec"])))
        points_ = [*(row for row in settings if row["flops"] < dense["flops"]), dense]
        curves[name] = Curve([row["flops"] for row in points_], [_hits(rows, row["spec"]) for row in points_])
    sizes: list[Any] = []
    for row in sorted((r for r in rows if r["spec"] == "dense" and r["seed"] != "all"), key=lambda row: row["seed"]):
        sizes += row["questions_per_clip"]
    return curves, np.repeat(np.arange(len(sizes)), sizes)

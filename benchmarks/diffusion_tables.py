"""Tables and pictures of the benchmarks of generation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from table_format import Row, machine_of, mark, markdown, percent, points, seconds_text

from mmaccel.measure import Point, pareto_plot
from mmaccel.measure.run_generation_quality import SETTLING

if TYPE_CHECKING:
    from pathlib import Path


def generation_quality(rows: list[Row], everything: bool) -> str:
    """Distance to the dense result and read-back against time, then our settings against each rival at their time."""
    settings = [row for row in rows if row["kind"] == "setting" and (everything or row["seed"] == "all")]
    shown = [row for row in settings if row["missing"] is None]
    shown.sort(key=lambda row: (str(row["seed"]) != "all", str(row["seed"]), -row["time"]))
    heads = ["setting", "time", "FLOPs", "latents", "median", "PSNR", "features", "read back", "over dense", "memory"]
    lines = []
    for row in shown:
        seed = "" if row["seed"] == "all" else f", seed {row['seed']}"
        dense = row["spec"] == "dense"
        back = row["read_back"]
        lines.append(
            [
                f"`{row['spec']}`{mark(row['spec'])}{seed}",
                percent(row["time"]),
                percent(row["work"]),
                "" if dense else f"{row['latents']['value']:.4f}",
                "" if dense else f"{row['latents_median']:.4f}",
                "" if dense else f"{row['psnr']['value']:.1f} dB",
                "" if dense else f"{row['features']['value']:.4f}",
                "" if back is None else percent(back["value"]),
                "" if back is None or dense else points(row["read_back_over_dense"]),
                f"{row['memory']['growth'] / 1e6:,.0f} MB",
            ]
        )
    one = shown[0]
    thing = "clips" if one["model"] == "text-to-video" else "images"
    out = {f" No `{row['spec']}`: {row['missing'].rstrip('.')}.": None for row in settings if row["missing"]}
    caption = (
        f"**Embedded {one['model']} model** (trained, {one['dtype']}, SDPA), {one['steps']} steps of "
        f"{one['scheduler']}, {shown[0]['clips']:,} {thing}, {len(one['options']['seeds'])} seeds, batches of "
        f"{one['batch']}. Time: of all but text encoder and autoencoder, of dense, the method's own work included; "
        "latents: size of the difference to the dense ones, of theirs, mean and median over "
        f"{thing}; PSNR: of the pixels to the dense ones, mean; features: cosine distance of the video-QA model's "
        "visual tokens; read back: questions that the video-QA model answers as the prompt says; over dense: points, "
        f"95 % intervals draw {thing}; memory: peak of the process above what it held before, at a "
        f"batch of {SETTLING}. FLOPs and memory: of one untimed call. * baseline.{''.join(out)} {machine_of(one)}"
    )
    return markdown(heads, lines, caption) + "\n" + equal_time(rows, True)


def equal_time(rows: list[Row], everything: bool) -> str:
    """Our settings against each rival at the same time; of HSA only halves and quarters unless everything is wanted."""
    thing = "clips" if rows[0]["model"] == "text-to-video" else "images"
    pairs: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        chosen = everything or row["spec"] in ("hsa:runtime=0.5", "hsa:runtime=0.25")
        if row["kind"] == "comparison" and row["seed"] == "all" and chosen:
            pairs.setdefault((row["spec"], row["rival"]), {})[row["metric"]] = row
    lines = []
    for (spec, rival), found in pairs.items():
        latents, over = found["latents"], found["psnr"]["over"]
        no_psnr = "dense" in (found["psnr"]["between"] or [])
        if latents["over"] is None:
            fast = latents["fastest"]
            told = [
                f"not that fast: `{fast['spec']}` takes {percent(fast['time'])}",
                f"{fast['value']:.4f}",
                "",
                "",
                "",
            ]
        else:
            told = [
                " to ".join(f"`{name}`" for name in latents["between"]),
                f"{latents['theirs']:.4f}",
                f"{latents['over']['value']:+.4f} [{latents['over']['low']:+.4f}, {latents['over']['high']:+.4f}]",
                "" if no_psnr else f"{over['value']:+.1f} [{over['low']:+.1f}, {over['high']:+.1f}] dB",
                _who(latents["over"], True) + ("" if no_psnr else f" / {_who(over, False)}"),
            ]
        lines.append([f"`{spec}`", percent(latents["time"]), f"{latents['ours']:.4f}", f"`{rival}`", *told])
    heads = [
        "ours",
        "time",
        "latents",
        "rival",
        "its settings",
        "its latents",
        "ours less its",
        "PSNR",
        "nearer to dense",
    ]
    caption = (
        f"**At the same measured time**, embedded {rows[0]['model']} model (trained, {rows[0]['dtype']}), "
        f"{rows[0]['steps']} steps of {rows[0]['scheduler']}. A rival is read between the two settings of its Pareto "
        "curve beside our time, dense being its last: distances mix by the geometric mean, which favours the rival; "
        "differences are paired, "
        f"95 % intervals draw {thing}. Nearer to dense: by the mean distance of the latents / by PSNR, "
        "or open where the interval holds zero; no PSNR where a rival is mixed with dense, whose own is infinite. "
        f"{machine_of(rows[0])}"
    )
    return markdown(heads, lines, caption)


def _who(over: Row, small: bool) -> str:
    """Who is nearer to dense by a difference that is to be small, or large."""
    if over["low"] <= 0 <= over["high"]:
        return "open"
    return "ours" if (over["high"] < 0) == small else "rival"


def generation_speed(rows: list[Row], _everything: bool) -> str:
    """Time and memory of published transformers."""
    newest = {(row["model"], row["device"], row["spec"]): row for row in rows}
    lines, dense = [], {row["key"]: row for row in newest.values() if row["spec"] == "dense"}
    out: dict[str, None] = {}
    for row in newest.values():
        if row["missing"] is not None:
            out[f" {row['model']}, no `{row['spec']}`: {row['missing'].rstrip('.')}."] = None
            continue
        whole = row is dense[row["key"]]
        depth = " + ".join(f"{row['layers'][field]} of {total}" for field, total in row["layers_total"].items())
        size = " x ".join(str(value) for value in row["size"].values())
        lines.append(
            [
                f"{row['model']}, {depth} layers, {size}",
                f"`{row['spec']}`{mark(row['spec'])}",
                seconds_text(row["transformer"]["median"]) if whole else percent(row["transformer_ratio"]["median"]),
                "" if whole else percent(row["time_ratio"]["median"]),
                "" if whole else percent(row["work"]),
                f"{row['memory']['growth'] / 1e6:,.0f} MB",
            ]
        )
    one = next(iter(dense.values()))
    heads = ["model, depth, height x width (x frames)", "setting", "transformer", "with the rest", "FLOPs", "memory"]
    caption = (
        f"**Random weights** in published configurations, {one['dtype']}, SDPA, batch 1, no guidance, {one['steps']} "
        f"steps, median of {one['repeats']} rounds in turn behind an untimed call. Transformer: dense, then shares of "
        "it; with the rest: scheduler and the method's work outside the transformer included; FLOPs: of the "
        "transformer, by torch's counter; memory: peak above what was held before the call "
        f"({one['memory']['method']}). Text encoders and autoencoders do not run. How many steps an adaptive cache "
        "skips here says nothing of trained weights; methods that compute the first block of every step cannot fall "
        f"below its share of a short model.{''.join(out)} * baseline. {machine_of(one)}"
    )
    return markdown(heads, lines, caption)


def plot_generation(rows: list[Row], path: Path) -> list[Path]:
    """Draw PSNR to dense, and read-back, of all seeds together against time."""
    settings = [r for r in rows if r["kind"] == "setting" and r["seed"] == "all" and r["missing"] is None]
    thing = "clips" if settings[0]["model"] == "text-to-video" else "images"
    drawn = []
    for metric, label in (("psnr", "PSNR to the dense result, dB"), ("read_back", "answers read back")):
        chosen = [r for r in settings if r[metric] is not None and (metric != "psnr" or r["spec"] != "dense")]
        points_ = [
            Point(
                r["method"], r["time"], r[metric]["value"], r[metric]["low"], r[metric]["high"],
                r["spec"].partition(":")[2] if r["method"] == "hsa" else "", bool(mark(r["spec"])),
            )
            for r in chosen
        ]  # fmt: skip
        if points_:
            drawn.append(
                pareto_plot(
                    points_, path.with_name(f"{path.name}_{metric}.png"), x="time of dense", y=label,
                    title=f"{label} against time, {settings[0]['clips']:,} {thing}",
                    source=f"embedded {settings[0]['model']} model, {settings[0]['scheduler']}",
                    percent=metric == "read_back",
                )
            )  # fmt: skip
    return drawn

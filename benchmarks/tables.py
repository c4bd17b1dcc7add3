"""Generate the tables of README and docs from the result files: `python benchmarks/tables.py [--check] [--plots]`.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`. NAME is that of a scenario; with "/all" behind it
the table has every row instead of the chosen ones. `--check` writes nothing and fails where a file is out of date.
`--plots` draws the pictures beside the result files.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmaccel.measure import Point, pareto_plot, read_rows
from mmaccel.method import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
BLOCK = re.compile(r"(<!-- table:(?P<name>\S+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
README_FRAMES = 32


def documents(root: Path = ROOT) -> list[Path]:
    """The files that may hold tables."""
    return [path for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))) if path.exists()]


def rows_of(scenario: str, results: Path = RESULTS) -> list[Row]:
    """All rows of a scenario: `results/NAME.jsonl`, and `results/NAME-*.jsonl` of other machines."""
    paths = [results / f"{scenario}.jsonl", *sorted(results.glob(f"{scenario}-*.jsonl"))]
    return [row for path in paths for row in read_rows(path) if row["benchmark"] == scenario]


def table(name: str, results: Path = RESULTS) -> str:
    """The Markdown of one table.

    Raises:
        KeyError: no table has this name.
    """
    kind = name.removesuffix("/all")
    make, scenario = TABLES[kind], SCENARIOS.get(kind, kind)
    rows = rows_of(scenario, results)
    if not rows:
        return f"No results yet: `mmaccel bench {scenario} --out benchmarks/results/{scenario}.jsonl`.\n"
    return make(rows, name.endswith("/all"))


def refreshed(text: str, results: Path = RESULTS) -> str:
    """A document with its tables made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{table(m['name'], results)}{m[4]}", text)


def quality(rows: list[Row], everything: bool) -> str:
    """Accuracy at equal budgets, all seeds together, or also one by one."""
    pooled = [row for row in rows if everything or row["seed"] == "all"]
    dense = {row["seed"]: row for row in rows if row["spec"] == "dense"}
    heads = ["setting", "accuracy", "of dense", "over random", "same answer", "tokens", "prefill", "FLOPs"]
    lines = []
    pooled.sort(key=lambda row: (str(row["seed"]) != "all", str(row["seed"]), -_keep(row["spec"])))
    for row in pooled:
        seed = "" if row["seed"] == "all" else f", seed {row['seed']}"
        lines.append(
            [
                f"`{row['spec']}`{_mark(row['spec'])}{seed}",
                f"{_percent(row['accuracy']['value'])} {_interval(row['accuracy'])}",
                "" if row["ratio"] is None or row["spec"] == "dense" else _percent(row["ratio"]["value"]),
                "" if row["over_random"] is None else _points(row["over_random"]),
                _percent(row["agreement"]),
                _tokens(row),
                *(_percent(row[cost] / dense[row["seed"]][cost]) for cost in ("prefill_flops", "flops")),
            ]
        )
    one = pooled[0]
    frames = "read back from H.264 files" if one["options"]["source"] == "h264" else "rendered"
    caption = (
        f"**Embedded model** (trained, {one['dtype']}, SDPA). {one['clips']:,} held-out clips, {frames}, {one['n']:,} "
        f"questions, {len(one['options']['seeds'])} seeds; 95 % intervals draw clips; over random: points, at the same "
        "keep; tokens: in the prompt, in the first and in the last decoder layer; FLOPs of the prefill, and of encoder "
        f"and prefill, of dense. * baseline. {_machine(one)}"
    )
    return _markdown(heads, lines, caption)


def speed(rows: list[Row], everything: bool) -> str:
    """Time to first token of each model, at one length or at all."""
    latest = {(_machine(r), r["model"], r["frames"], r["layers"], r["vision_layers"], r["spec"]): r for r in rows}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for key, row in latest.items():
        groups.setdefault(key[:-1], []).append(row)
    heads = ["model", "setting", "first token", "of dense", "encode", "prefill", "overhead", "tokens", "FLOPs"]
    tables: dict[str, list[list[str]]] = {}
    for (machine, model, frames, *_), group in groups.items():
        lengths = {key[2] for key in groups if key[:2] == (machine, model)}
        if not everything and frames != min(lengths, key=lambda n: abs(n - README_FRAMES)):
            continue
        dense = next(row for row in group if row["spec"] == "dense")
        depth = f", {dense['layers']} + {dense['vision_layers']} layers" if dense["shortened"] else ""
        for row in sorted(group, key=lambda row: row is not dense):
            share = row["flops_counted"]["total"] / dense["flops_counted"]["total"]
            own = "" if row is dense else f"{_percent(row['overhead_of_dense'])} / {_percent(row['overhead_of_own'])}"
            tables.setdefault(machine, []).append(
                [
                    f"{model}, {frames} frames{depth}",
                    f"`{row['spec']}`{_mark(row['spec'])}",
                    _seconds(row["ttft"]["total"]["median"]),
                    _percent(row["ttft_ratio"]),
                    *(_share(row, dense, stage) for stage in ("encode", "prefill")),
                    own,
                    _tokens(row),
                    _percent(share),
                ]
            )
    parts = []
    for machine, lines in tables.items():
        one = next(row for row in rows if _machine(row) == machine)
        caption = (
            f"**Random weights** in published configurations, {one['dtype']}, SDPA, batch 1, median of "
            f"{one['repeats']} warm rounds in turn; encode and prefill: time of dense, then share of it; overhead: the "
            "method's own work, of the dense and of its own time to first token; FLOPs: torch's counter, of dense. "
            f"* baseline. {machine}"
        )
        parts.append(_markdown(heads, lines, caption))
    return "\n".join(parts)


def kernels(rows: list[Row], everything: bool) -> str:
    """A line for each op, size and dtype; the sizes of tests only on demand."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if everything or row["size"] != "tiny":
            key = (_processor(row), row["op"], row["size"], row["dtype"])
            groups.setdefault(key, {})[row["contestant"]] = row
    heads = ["op", "time", "of eager", "of compiled", "of SDPA", "of the limit", "path"]
    tables: dict[str, list[list[str]]] = {}
    missing: dict[str, dict[str, None]] = {}
    for (place, *_), group in groups.items():
        ours = group["mmaccel"]
        rivals = [group.get(name) for name in ("eager", "compiled", "sdpa")]
        tables.setdefault(place, []).append(
            [
                f"`{ours['op']}`, {ours['shape']}, {ours['dtype']}",
                _seconds(ours["seconds"]["median"]),
                *("" if rival is None else _against(rival) for rival in rivals),
                f"{_percent(ours['of_limit'])} ({ours['limited_by']})",
                ", ".join(_path(event) for event in ours["path"]),
            ]
        )
        for row in group.values():
            if row["missing"] is not None:
                missing.setdefault(place, {})[f"No {row['contestant']} `{row['op']}`: {row['missing']}."] = None
    parts = []
    for place, lines in tables.items():
        one = next(row for row in rows if _processor(row) == place)
        gpu = "" if any(row["device"] != "cpu" for row in rows) else " No GPU figure exists yet."
        caption = (
            f"**Random inputs**, {one['device']}, median of {one['repeats']} warm rounds in turn; of eager, compiled "
            "and SDPA: the op's time as a share of that of plain torch, of the same under `torch.compile` and of dense "
            "attention over all rows; of the limit: the time that the bytes or the matrix products alone must take, at "
            "the copy bandwidth and the matmul rate measured in the same rounds, as a share of the op's."
            f"{' '.join(['', *missing.get(place, {})])}{gpu} {place}"
        )
        parts.append(_markdown(heads, lines, caption))
    return "\n".join(parts)


TABLES: dict[str, Callable[[list[Row], bool], str]] = {
    "video_lm/quality": quality,
    "video_lm/speed": speed,
    "kernels": kernels,
}
SCENARIOS = {"kernels": "kernels/speed"}  # of tables that are not called as theirs


def plot_quality(results: Path = RESULTS) -> list[Path]:
    """Draw accuracy of all seeds together against all FLOPs, and against those of the prefill alone."""
    rows = [row for row in rows_of("video_lm/quality", results) if row["seed"] == "all"]
    drawn = []
    for cost, stage, name in (("flops", "encoder and prefill", "quality"), ("prefill_flops", "prefill", "prefill")):
        points = [_point(row, row[cost] / 1e9) for row in rows]
        if points:
            drawn.append(
                pareto_plot(
                    points, results / "video_lm" / f"{name}.png", x=f"{stage}, GFLOPs a question", y="accuracy",
                    title=f"Accuracy against cost, {rows[0]['clips']:,} held-out clips", source="embedded model",
                    log=cost == "prefill_flops", percent=True,
                )
            )  # fmt: skip
    return drawn


def _point(row: Row, cost: float) -> Point:
    name, _, knobs = row["spec"].partition(":")
    interval, label = row["accuracy"], re.sub(r"keep=0?", "", knobs)
    return Point(name, cost, interval["value"], interval["low"], interval["high"], label, bool(_mark(row["spec"])))


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]], caption: str) -> str:
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))
    return f"\n{body}\n\n{caption}\n\n"


def _mark(spec: str) -> str:
    cls = registry().get(spec.partition(":")[0])
    return " *" if cls is not None and cls.info.baseline else ""


def _keep(spec: str) -> float:
    found = re.search(r"keep=([\d.]+)", spec)
    return float(found[1]) if found else 1.0


def _percent(share: float) -> str:
    value = 100 * share
    return f"{value:.1f} %" if value >= 1 else f"{value:.2f} %"


def _interval(interval: Row) -> str:
    return f"[{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _points(interval: Row) -> str:
    return f"{100 * interval['value']:+.1f} {_interval(interval)}"


def _tokens(row: Row) -> str:
    numbers = [f"{row[name]:.0f}" for name in ("tokens_in", "tokens_out", "tokens_last")]
    return " → ".join(dict.fromkeys(numbers))


def _seconds(value: float) -> str:
    if value < 1e-3:
        return f"{1e6 * value:.0f} µs"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def _against(rival: Row) -> str:
    return "missing" if rival["missing"] is not None else _percent(rival["ratio"]["median"])


def _path(event: Row) -> str:
    return event["backend"] if event["reason"] is None else f"{event['backend']} ({event['reason']})"


def _processor(row: Row) -> str:
    """The machine, by the part of it that did the work."""
    return _machine(row if row["device"] != "cpu" else {**row, "machine": {**row["machine"], "gpu": None}})


def _share(row: Row, dense: Row, stage: str) -> str:
    if row is dense:
        return _seconds(row["ttft"]["stages"][stage]["median"])
    return _percent(row["stage_ratio"][stage]) if row["stage_ratio"][stage] is not None else ""


def _machine(row: Row) -> str:
    machine, versions = row["machine"], row["versions"]
    place = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads a process"
    return (
        f"{place}; torch {versions['torch']}, transformers {versions['transformers']}, mmaccel {versions['mmaccel']}."
    )


def main(arguments: list[str] | None = None, root: Path = ROOT, results: Path = RESULTS) -> int:
    """Refresh or check all documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plots", action="store_true")
    chosen = parser.parse_args(arguments)
    stale = []
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        new = refreshed(text, results)
        if new != text:
            stale.append(path)
            if not chosen.check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{path.relative_to(root)}: {'out of date' if chosen.check else 'refreshed'}")
    if chosen.plots and not chosen.check:
        for path in plot_quality(results):
            print(f"{path}: drawn")
    return 1 if stale and chosen.check else 0


if __name__ == "__main__":
    sys.exit(main())

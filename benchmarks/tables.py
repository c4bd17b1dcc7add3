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
    # rows from before the methods' own work was counted
    own = all("flops_own" in row for row in pooled)
    cost = "FLOPs, own scoring included" if own else "FLOPs"
    heads = ["setting", "accuracy", "of dense", "over random", "same answer", "tokens", "prefill", cost]
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
    work = "encoder, prefill and the method's own scoring and merging" if own else "encoder and prefill"
    caption = (
        f"**Embedded model** (trained, {one['dtype']}, SDPA). {one['clips']:,} held-out clips, {frames}, {one['n']:,} "
        f"questions, {len(one['options']['seeds'])} seeds; 95 % intervals draw clips; over random: points, at the same "
        "keep; tokens: in the prompt, in the first and in the last decoder layer; prefill: FLOPs of the language "
        f"model, of dense; FLOPs: of {work}, of dense. "
        f"* baseline. {_machine(one)}"
    )
    return _markdown(heads, lines, caption)


def speed(rows: list[Row], everything: bool) -> str:
    """Time to first token of each model, at one length or at all, of the newest run of each setup."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["key"], []).append(row)
    newest: dict[tuple[Any, ...], list[Row]] = {}
    # the sort is stable, so of two runs of one second the later in the files wins
    for run in sorted(runs.values(), key=lambda run: max(row["time"] for row in run)):
        newest[_setup(run[0])] = run
    parts: dict[str, list[list[Row]]] = {}
    for run in sorted(newest.values(), key=lambda run: rows.index(run[0])):
        lengths = {other[0]["frames"] for other in newest.values() if _setup(other[0])[:2] == _setup(run[0])[:2]}
        if everything or run[0]["frames"] == min(lengths, key=lambda n: abs(n - README_FRAMES)):
            # runs that one caption describes share a table
            parts.setdefault(_speed_caption(run), []).append(run)
    return "\n".join(_speed_part(caption, shown) for caption, shown in parts.items())


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
                f"`{row['spec']}`{_mark(row['spec'])}",
                _seconds(row["ttft"]["total"]["median"]),
                _percent(row["ttft_ratio"]),
                *(_seconds(row["ttft"]["stages"][stage]["median"]) for stage in stages),
                "" if row is dense else _percent(row["overhead_of_dense"]),
                _percent(flops),
                _percent(row["stage_ratio"]["encode"]) if row is not dense else "100.0 %",
                f"{row['stage_ratio']['encode'] / flops:.2f}" if row is not dense else "1.00",
                _tokens(row),
            ]
        )
    depth = _depth(dense).removeprefix(", ")
    caption = (
        f"**Random weights** in the published configuration of {dense['model']}, {dense['frames']} frames"
        f"{', ' + depth if depth else ''}, {dense['dtype']}, SDPA, batch 1, median of {dense['repeats']} warm rounds "
        "in turn; own work: scoring, deciding and merging, of the dense time to first token, contained in the stages; "
        f"encoder FLOPs and time: of dense. * baseline. {_machine(dense)}"
    )
    return _markdown(heads, lines, caption)


def _setup(row: Row) -> tuple[Any, ...]:
    return _place(row), row["model"], row["frames"], row["dtype"], row["layers"], row["vision_layers"]


def _speed_part(caption: str, runs: list[list[Row]]) -> str:
    tokens_timed = any("time_per_output_token" in row for run in runs for row in run)
    heads = ["model", "setting", "first token", "of dense", "encode", "prefill", "overhead"]
    heads += ["output token"] * tokens_timed + ["peak memory", "tokens", "FLOPs"]
    lines = []
    for run in runs:
        dense = next(row for row in run if row["spec"] == "dense")
        for row in sorted(run, key=lambda row: row is not dense):
            share = row["flops_counted"]["total"] / dense["flops_counted"]["total"]
            own = "" if row is dense else f"{_percent(row['overhead_of_dense'])} / {_percent(row['overhead_of_own'])}"
            token = row.get("time_per_output_token")
            lines.append(
                [
                    f"{row['model']}, {row['frames']} frames{_depth(row)}",
                    f"`{row['spec']}`{_mark(row['spec'])}",
                    _seconds(row["ttft"]["total"]["median"]),
                    _percent(row["ttft_ratio"]),
                    *(_share(row, dense, stage) for stage in ("encode", "prefill")),
                    own,
                    *([_seconds(token["median"]) if token else ""] * tokens_timed),
                    f"{row['memory']['growth'] / 1e6:,.0f} MB",
                    _tokens(row),
                    _percent(share),
                ]
            )
    return _markdown(heads, lines, caption)


def kernels(rows: list[Row], everything: bool) -> str:
    """A line for each op, size and dtype; the sizes of tests only on demand."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if everything or row["size"] != "tiny":
            key = ((_machine(row), row["repeats"]), row["op"], row["size"], row["dtype"])
            groups.setdefault(key, {})[row["contestant"]] = row
    heads = ["op", "time", "of eager", "of compiled", "of SDPA", "of the limit", "path"]
    # what one caption describes shares a table
    tables: dict[tuple[str, int], list[list[str]]] = {}
    missing: dict[tuple[str, int], dict[str, None]] = {}
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
        one = next(row for row in rows if (_machine(row), row["repeats"]) == place)
        gpu = "" if any(row["device"] != "cpu" for row in rows) else " No GPU figure exists yet."
        caption = (
            f"**Random inputs**, {one['device']}, median of {one['repeats']} warm rounds in turn; of eager, compiled "
            "and SDPA: the op's time as a share of that of plain torch, of the same under `torch.compile` and of dense "
            "attention over all rows; of the limit: the time that the bytes or the matrix products alone must take, at "
            "the copy bandwidth and the matmul rate measured in the same rounds, as a share of the op's."
            f"{' '.join(['', *missing.get(place, {})])}{gpu} {place[0]}"
        )
        parts.append(_markdown(heads, lines, caption))
    return "\n".join(parts)


def codecs(rows: list[Row], everything: bool) -> str:
    """A line for each file and request, against the fastest exact peer; or one for each contestant."""
    places: dict[str, dict[str, dict[str, Row]]] = {}
    for row in _newest(rows):
        if row["contestant"] not in ("limit", "engines"):
            videos = row["videos"]
            request = row["cell"] if videos == 1 else f"{videos} times {row['cell']}"
            places.setdefault(_codec_place(row), {}).setdefault(request, {})[row["contestant"]] = row
    parts = []
    for cells in places.values():
        one = next(row for group in cells.values() for row in group.values())
        heads, lines = _codec_lines(cells) if everything else _codec_summary(cells)
        parts.append(_markdown(heads, lines, _codec_caption(one, cells)))
    return "\n".join(parts)


def _newest(rows: list[Row]) -> list[Row]:
    """Of runs of one cell on one machine the rows of the last."""
    ordered = sorted(rows, key=lambda row: row["time"])
    newest = {(_codec_place(row), row["cell"]): (row["key"], row["time"]) for row in ordered}
    return [row for row in rows if newest[_codec_place(row), row["cell"]] == (row["key"], row["time"])]


def _codec_place(row: Row) -> str:
    machine, version = row["machine"], row["versions"]
    return f"{machine['cpu']}, {row['cores']} cores; PyAV {version['av']}, mmaccel {version['mmaccel']}"


def _fastest(group: dict[str, Row]) -> Row | None:
    """The fastest of the others whose frames are all the right ones."""
    peers = [row for name, row in group.items() if not name.startswith("mmaccel") and row.get("exact")]
    return min(peers, key=lambda row: row["seconds"]["median"], default=None)


def _codec_summary(cells: dict[str, dict[str, Row]]) -> tuple[list[str], list[list[str]]]:
    heads = ["request", "time", "of the fastest exact peer", "CPU", "peak memory", "decoded", "of the limit"]
    lines = []
    for cell, group in cells.items():
        ours, peer = group["mmaccel"], _fastest(group)
        if ours["missing"] is not None:
            lines.append([cell, f"missing: {ours['missing']}", *[""] * 5])
            continue
        against = "" if peer is None else f"{_percent(peer['ratio']['median'])} ({peer['contestant']})"
        lines.append([cell, _codec_time(ours), against, *_codec_cost(ours)])
    return heads, lines


def _codec_lines(cells: dict[str, dict[str, Row]]) -> tuple[list[str], list[list[str]]]:
    heads = ["request", "reader", "time", "spread", "mmaccel's, of it", "exact", "CPU", "peak memory", "decoded"]
    heads += ["of the limit"]
    lines = []
    for cell, group in cells.items():
        fastest = _fastest(group)
        for name, row in group.items():
            reader = f"**{name}**" if row is fastest else name
            if row["missing"] is not None:
                lines.append([cell, reader, "missing", *[""] * 7])
                continue
            low, high = (_seconds(row["seconds"][end]) for end in ("low", "high"))
            ratio = "" if row["ratio"] is None or name == "mmaccel" else _percent(row["ratio"]["median"])
            exact = "yes" if row["exact"] else "NO"
            spread = f"{low} to {high}"
            lines.append([cell, reader, _codec_time(row), spread, ratio, exact, *_codec_cost(row)])
    return heads, lines


def _codec_time(row: Row) -> str:
    seconds, videos = row["seconds"]["median"], row["videos"]
    return _seconds(seconds) if videos == 1 else f"{_seconds(seconds)}, {videos / seconds:.1f} a second"


def _codec_cost(row: Row) -> list[str]:
    memory = "" if row["growth"] is None else f"{row['growth'] / 1e6:,.0f} MB"
    decoded = "" if row["decoded"] is None else f"{row['decoded']:,}"
    limit = "" if row["of_limit"] is None else _percent(row["of_limit"])
    return [f"{row['cpu']['median']:.2f} s", memory, decoded, limit]


def _codec_caption(one: Row, cells: dict[str, dict[str, Row]]) -> str:
    group = [row for rows in cells.values() for row in rows.values()]
    low, high = min(row["repeats"] for row in group), max(row["repeats"] for row in group)
    repeats = f"{low}" if low == high else f"{low} to {high}"
    versions = {
        name.partition("-")[0]: row["version"]
        for rows in cells.values()
        for name, row in rows.items()
        if row["missing"] is None and not name.startswith("mmaccel")
    }
    reasons: dict[str, dict[str, None]] = {}
    for row in group:
        if row["missing"] is not None and not row["missing"].startswith("it would decode all"):
            reasons.setdefault(row["contestant"], {})[row["missing"]] = None
    missing = "".join(f" No {name}: {'; '.join(why)}." for name, why in reasons.items())
    limit = (
        " of the limit: the time to decode the needed packets alone, on one thread, divided by the cores, as a share;"
        if any(row.get("of_limit") for row in group)
        else ""
    )
    return (
        f"**Rendered files** in real codecs, median of {repeats} warm rounds in turn, each reader in a process of its "
        f"own; 384 rows out unless said; spread: 20th to 80th percentile; a share of another's time is the median of "
        f"the rounds; exact: the frame numbers drawn into the pixels are the right ones;{limit} peak memory: above "
        f"what was held before the call; decoded: frames, where the reader tells.{missing} "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}; {_codec_place(one)}."
    )


def codec_pool(rows: list[Row], _everything: bool) -> str:
    """Threads of one call, then hardware decoders by simulation."""
    places: dict[str, list[Row]] = {}
    for row in _newest(rows):
        places.setdefault(_codec_place(row), []).append(row)
    parts = []
    for place, group in places.items():
        lines = []
        by_name = {(row["cell"], row["contestant"]): row for row in group if row["contestant"] != "engines"}
        for (cell, name), row in by_name.items():
            one = by_name.get((cell, "mmaccel-1"))
            if name == "limit" or row["missing"] is not None:
                continue
            what = f"{cell}, {row['threads'] or 'default'} thread{'s' * (row['threads'] != 1)}"
            share = "" if one is None else f"{one['seconds']['median'] / row['seconds']['median']:.2f}"
            lines.append([what, _seconds(row["seconds"]["median"]), share, f"{row['cpu']['median']:.2f} s"])
        for row in group:
            if row["contestant"] == "engines" and row["missing"] is None:
                what = f"{row['cell']}, {row['engines']} simulated decoder{'s' * (row['engines'] != 1)}"
                lines.append([what, _seconds(row["makespan"]), f"{row['alone'] / row['makespan']:.2f}", ""])
        reasons = {f" No {row['contestant']}: {row['missing']}.": None for row in group if row["missing"] is not None}
        caption = (
            f"**Rendered files**, median of {group[0]['repeats']} warm rounds in turn; times one: against one thread, "
            "or one simulated decoder; simulated: the needed groups of pictures at the seconds that decoding each "
            f"alone takes one core here, from one queue, without conversion.{''.join(reasons)} {place}."
        )
        parts.append(_markdown(["request", "time", "times one", "CPU"], lines, caption))
    return "\n".join(parts)


def codec_signals(rows: list[Row], _everything: bool) -> str:
    """What signals of the codec are worth: accuracy at equal budgets, ranks against features, and their cost."""
    kinds: dict[str, list[Row]] = {"quality": [], "correlation": [], "cost": []}
    for row in rows:
        kinds[row["kind"]].append(row)
    rivals = sorted(kinds["quality"][0]["options"]["methods"], key=lambda rival: not _mark(rival))
    lines = []
    for row in sorted(kinds["quality"], key=lambda row: -_keep(row["spec"])):
        over = [row["over"].get(rival) for rival in rivals]
        lines.append(
            [
                f"`{row['spec']}`{_mark(row['spec'])}",
                row["signals"].replace("none", ""),
                f"{_percent(row['accuracy']['value'])} {_interval(row['accuracy'])}",
                *("" if rival is None else _points(rival) for rival in over),
            ]
        )
    one = kinds["quality"][0]
    caption = (
        f"**Embedded model.** {one['options']['clips']:,} held-out clips written as H.264, 8 of 32 frames; signals: "
        "what the method is given (noise: chance); over: points, at the same keep, 95 % intervals draw clips. * "
        f"baseline. {_machine(one)}"
    )
    heads = ["setting", "signals", "accuracy", *(f"over `{rival}`" for rival in rivals)]
    parts = [_markdown(heads, lines, caption)]
    names = ("change, features", "pixels, features", "change, pixels")
    lines = [
        [f"{row['clips']}, {row['n']} clip{'s' * (row['n'] != 1)}"]
        + ["" if row[name] is None else f"{row[name]['value']:.2f}" for name in names]
        for row in kinds["correlation"]
    ]
    caption = (
        "**Rank correlation** (Spearman, cells of frames after the first) of the change that the codec states, of the "
        "change of raw pixels, and of the cosine change of the embedded model's features."
    )
    parts.append(_markdown(["clips", "codec, features", "pixels, features", "codec, pixels"], lines, caption))
    if not kinds["cost"]:
        return "\n".join(parts)
    lines = [
        [
            row["clips"],
            _seconds(row["decode_seconds"]),
            f"{100 * (row['export_over_decode'] - 1):+.0f} %",
            f"{100 * (row['signals_over_decode'] - 1):+.0f} %",
        ]
        for row in kinds["cost"]
    ]
    caption = (
        f"**Cost** on one thread, median of {one['options']['repeats']}: decoding every frame without conversion; with "
        "the vectors handed out; and all of `codec_signals`, its decoding included."
    )
    parts.append(_markdown(["clip", "decode", "with vectors", "signals"], lines, caption))
    return "\n".join(parts)


def _speed_caption(run: list[Row]) -> str:
    """What is true of all rows of a run, and of none that it is not said of."""
    one = run[0]
    token = "; output token: each token behind the first" if any("time_per_output_token" in row for row in run) else ""
    cut = (
        " Layers: of the language model + of the vision tower. A total flatters where the vision tower is cut harder "
        "than the language model; what carries over to the whole model are the shares of encode (too high where a "
        "short tower is scored) and prefill."
        if one["shortened"]
        else ""
    )
    return (
        f"**Random weights** in published configurations, {one['dtype']}, SDPA, batch 1, median of {one['repeats']} "
        "warm rounds in turn; encode and prefill: time of dense, then share of it; overhead: the method's own work, of "
        f"the dense and of its own time to first token{token}; peak memory: above what was held before the call "
        f"({one['memory']['method']}); FLOPs: torch's counter, the method's own included, of dense.{cut} "
        f"* baseline. {_machine(one)}"
    )


def _depth(row: Row) -> str:
    if not row["shortened"]:
        return ""
    if "layers_total" not in row:
        return f", {row['layers']} + {row['vision_layers']} layers"
    return f", {row['layers']} of {row['layers_total']} + {row['vision_layers']} of {row['vision_layers_total']} layers"


TABLES: dict[str, Callable[[list[Row], bool], str]] = {
    "video_lm/quality": quality,
    "video_lm/speed": speed,
    "video_lm/speed_published": speed,
    "encoders/ttft": encoders,
    "encoders/merging": encoders,
    "kernels": kernels,
    "codecs/decode": codecs,
    "codecs/long": codecs,
    "codecs/many": codecs,
    "codecs/pool": codec_pool,
    "codecs/signals": codec_signals,
    "codecs/reuse": codec_signals,
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


def _share(row: Row, dense: Row, stage: str) -> str:
    if row is dense:
        return _seconds(row["ttft"]["stages"][stage]["median"])
    return _percent(row["stage_ratio"][stage]) if row["stage_ratio"][stage] is not None else ""


def _place(row: Row) -> str:
    # a run on the CPU of a machine that has a GPU says nothing of the GPU
    machine, device = row["machine"], row.get("device", "cpu")
    if device.startswith("cuda"):
        return machine["gpu"]
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads a process"


def _machine(row: Row) -> str:
    version = row["versions"]
    names = ("torch", "transformers", "mmaccel")
    return f"{_place(row)}; {', '.join(f'{name} {version[name]}' for name in names)}."


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

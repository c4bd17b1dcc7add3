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

from diffusion_tables import equal_time, generation_quality, generation_speed, plot_generation
from encoder_tables import encoders, equal_flops, plot_streaming, streaming, towers
from table_format import (
    Row,
    against,
    depth_of,
    interval_text,
    keep_of,
    machine_of,
    mark,
    markdown,
    path_of,
    percent,
    place_of,
    points,
    seconds_text,
    share_of,
    tokens_of,
)

from mmaccel.measure import Point, pareto_plot, read_rows

if TYPE_CHECKING:
    from collections.abc import Callable

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
    pooled.sort(key=lambda row: (str(row["seed"]) != "all", str(row["seed"]), -keep_of(row["spec"])))
    for row in pooled:
        seed = "" if row["seed"] == "all" else f", seed {row['seed']}"
        lines.append(
            [
                f"`{row['spec']}`{mark(row['spec'])}{seed}",
                f"{percent(row['accuracy']['value'])} {interval_text(row['accuracy'])}",
                "" if row["ratio"] is None or row["spec"] == "dense" else percent(row["ratio"]["value"]),
                "" if row["over_random"] is None else points(row["over_random"]),
                percent(row["agreement"]),
                tokens_of(row),
                *(percent(row[cost] / dense[row["seed"]][cost]) for cost in ("prefill_flops", "flops")),
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
        f"* baseline. {machine_of(one)}"
    )
    return markdown(heads, lines, caption)


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


def _setup(row: Row) -> tuple[Any, ...]:
    return place_of(row), row["model"], row["frames"], row["dtype"], row["layers"], row["vision_layers"]


def _speed_part(caption: str, runs: list[list[Row]]) -> str:
    tokens_timed = any("time_per_output_token" in row for run in runs for row in run)
    heads = ["model", "setting", "first token", "of dense", "encode", "prefill", "overhead"]
    heads += ["output token"] * tokens_timed + ["peak memory", "tokens", "FLOPs"]
    lines = []
    for run in runs:
        dense = next(row for row in run if row["spec"] == "dense")
        for row in sorted(run, key=lambda row: row is not dense):
            share = row["flops_counted"]["total"] / dense["flops_counted"]["total"]
            own = "" if row is dense else f"{percent(row['overhead_of_dense'])} / {percent(row['overhead_of_own'])}"
            token = row.get("time_per_output_token")
            lines.append(
                [
                    f"{row['model']}, {row['frames']} frames{depth_of(row)}",
                    f"`{row['spec']}`{mark(row['spec'])}",
                    seconds_text(row["ttft"]["total"]["median"]),
                    percent(row["ttft_ratio"]),
                    *(share_of(row, dense, stage) for stage in ("encode", "prefill")),
                    own,
                    *([seconds_text(token["median"]) if token else ""] * tokens_timed),
                    f"{row['memory']['growth'] / 1e6:,.0f} MB",
                    tokens_of(row),
                    percent(share),
                ]
            )
    return markdown(heads, lines, caption)


def kernels(rows: list[Row], everything: bool) -> str:
    """A line for each op, size and dtype; the sizes of tests only on demand."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if everything or row["size"] != "tiny":
            key = ((machine_of(row), row["repeats"]), row["op"], row["size"], row["dtype"])
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
                seconds_text(ours["seconds"]["median"]),
                *("" if rival is None else against(rival) for rival in rivals),
                f"{percent(ours['of_limit'])} ({ours['limited_by']})",
                ", ".join(path_of(event) for event in ours["path"]),
            ]
        )
        for row in group.values():
            if row["missing"] is not None:
                missing.setdefault(place, {})[f"No {row['contestant']} `{row['op']}`: {row['missing']}."] = None
    parts = []
    for place, lines in tables.items():
        one = next(row for row in rows if (machine_of(row), row["repeats"]) == place)
        gpu = "" if any(row["device"] != "cpu" for row in rows) else " No GPU figure exists yet."
        caption = (
            f"**Random inputs**, {one['device']}, median of {one['repeats']} warm rounds in turn; of eager, compiled "
            "and SDPA: the op's time as a share of that of plain torch, of the same under `torch.compile` and of dense "
            "attention over all rows; of the limit: the time that the bytes or the matrix products alone must take, at "
            "the copy bandwidth and the matmul rate measured in the same rounds, as a share of the op's."
            f"{' '.join(['', *missing.get(place, {})])}{gpu} {place[0]}"
        )
        parts.append(markdown(heads, lines, caption))
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
        parts.append(markdown(heads, lines, _codec_caption(one, cells)))
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
        against = "" if peer is None else f"{percent(peer['ratio']['median'])} ({peer['contestant']})"
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
            low, high = (seconds_text(row["seconds"][end]) for end in ("low", "high"))
            ratio = "" if row["ratio"] is None or name == "mmaccel" else percent(row["ratio"]["median"])
            exact = "yes" if row["exact"] else "NO"
            spread = f"{low} to {high}"
            lines.append([cell, reader, _codec_time(row), spread, ratio, exact, *_codec_cost(row)])
    return heads, lines


def _codec_time(row: Row) -> str:
    seconds, videos = row["seconds"]["median"], row["videos"]
    return seconds_text(seconds) if videos == 1 else f"{seconds_text(seconds)}, {videos / seconds:.1f} a second"


def _codec_cost(row: Row) -> list[str]:
    memory = "" if row["growth"] is None else f"{row['growth'] / 1e6:,.0f} MB"
    decoded = "" if row["decoded"] is None else f"{row['decoded']:,}"
    limit = "" if row["of_limit"] is None else percent(row["of_limit"])
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
            lines.append([what, seconds_text(row["seconds"]["median"]), share, f"{row['cpu']['median']:.2f} s"])
        for row in group:
            if row["contestant"] == "engines" and row["missing"] is None:
                what = f"{row['cell']}, {row['engines']} simulated decoder{'s' * (row['engines'] != 1)}"
                lines.append([what, seconds_text(row["makespan"]), f"{row['alone'] / row['makespan']:.2f}", ""])
        reasons = {f" No {row['contestant']}: {row['missing']}.": None for row in group if row["missing"] is not None}
        caption = (
            f"**Rendered files**, median of {group[0]['repeats']} warm rounds in turn; times one: against one thread, "
            "or one simulated decoder; simulated: the needed groups of pictures at the seconds that decoding each "
            f"alone takes one core here, from one queue, without conversion.{''.join(reasons)} {place}."
        )
        parts.append(markdown(["request", "time", "times one", "CPU"], lines, caption))
    return "\n".join(parts)


def codec_signals(rows: list[Row], _everything: bool) -> str:
    """What signals of the codec are worth: accuracy at equal budgets, ranks against features, and their cost."""
    kinds: dict[str, list[Row]] = {"quality": [], "correlation": [], "cost": []}
    for row in rows:
        kinds[row["kind"]].append(row)
    rivals = sorted(kinds["quality"][0]["options"]["methods"], key=lambda rival: not mark(rival))
    lines = []
    for row in sorted(kinds["quality"], key=lambda row: -keep_of(row["spec"])):
        over = [row["over"].get(rival) for rival in rivals]
        lines.append(
            [
                f"`{row['spec']}`{mark(row['spec'])}",
                row["signals"].replace("none", ""),
                f"{percent(row['accuracy']['value'])} {interval_text(row['accuracy'])}",
                *("" if rival is None else points(rival) for rival in over),
            ]
        )
    one = kinds["quality"][0]
    caption = (
        f"**Embedded model.** {one['options']['clips']:,} held-out clips written as H.264, 8 of 32 frames; signals: "
        "what the method is given (noise: chance); over: points, at the same keep, 95 % intervals draw clips. * "
        f"baseline. {machine_of(one)}"
    )
    heads = ["setting", "signals", "accuracy", *(f"over `{rival}`" for rival in rivals)]
    parts = [markdown(heads, lines, caption)]
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
    parts.append(markdown(["clips", "codec, features", "pixels, features", "codec, pixels"], lines, caption))
    if not kinds["cost"]:
        return "\n".join(parts)
    lines = [
        [
            row["clips"],
            seconds_text(row["decode_seconds"]),
            f"{100 * (row['export_over_decode'] - 1):+.0f} %",
            f"{100 * (row['signals_over_decode'] - 1):+.0f} %",
        ]
        for row in kinds["cost"]
    ]
    caption = (
        f"**Cost** on one thread, median of {one['options']['repeats']}: decoding every frame without conversion; with "
        "the vectors handed out; and all of `codec_signals`, its decoding included."
    )
    parts.append(markdown(["clip", "decode", "with vectors", "signals"], lines, caption))
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
        f"* baseline. {machine_of(one)}"
    )


TABLES: dict[str, Callable[[list[Row], bool], str]] = {
    "video_lm/quality": quality,
    "video_lm/speed": speed,
    "video_lm/speed_published": speed,
    "encoders/ttft": encoders,
    "encoders/merging": encoders,
    "encoders/quality": quality,
    "encoders/equal-flops": equal_flops,
    "encoders/caching": towers,
    "encoders/towers": towers,
    "encoders/streaming": streaming,
    "kernels": kernels,
    "codecs/decode": codecs,
    "codecs/long": codecs,
    "codecs/many": codecs,
    "codecs/pool": codec_pool,
    "codecs/signals": codec_signals,
    "codecs/reuse": codec_signals,
    "diffusion/video": generation_quality,
    "diffusion/equal-time": equal_time,
    "diffusion/image": generation_quality,
    "diffusion/speed": generation_speed,
    "diffusion/wan": generation_speed,
}
SCENARIOS = {
    "kernels": "kernels/speed",
    "encoders/equal-flops": "encoders/quality",
    "diffusion/equal-time": "diffusion/video",
}  # of tables that are not called as theirs


def plot_quality(results: Path = RESULTS, scenario: str = "video_lm/quality") -> list[Path]:
    """Draw accuracy of all seeds together against all FLOPs, and against those of the prefill alone."""
    rows = [row for row in rows_of(scenario, results) if row["seed"] == "all"]
    drawn = []
    for cost, stage, name in (("flops", "encoder and prefill", "quality"), ("prefill_flops", "prefill", "prefill")):
        points_ = [_point(row, row[cost] / 1e9) for row in rows]
        if points_:
            drawn.append(
                pareto_plot(
                    points_, (results / scenario).parent / f"{name}.png", x=f"{stage}, GFLOPs a question", y="accuracy",
                    title=f"Accuracy against cost, {rows[0]['clips']:,} held-out clips", source="embedded model",
                    log=cost == "prefill_flops", percent=True,
                )
            )  # fmt: skip
    return drawn


def _point(row: Row, cost: float) -> Point:
    name, _, knobs = row["spec"].partition(":")
    interval, label = row["accuracy"], re.sub(r"keep=0?", "", knobs)
    return Point(name, cost, interval["value"], interval["low"], interval["high"], label, bool(mark(row["spec"])))


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
        drawn = [*plot_quality(results), *plot_quality(results, "encoders/quality")]
        if streams := rows_of("encoders/streaming", results):
            drawn.append(plot_streaming(streams, results / "encoders" / "streaming.png"))
        for name in ("diffusion/video", "diffusion/image"):
            if found := rows_of(name, results):
                drawn += plot_generation(found, results / name)
        for path in drawn:
            print(f"{path}: drawn")
    return 1 if stale and chosen.check else 0


if __name__ == "__main__":
    sys.exit(main())

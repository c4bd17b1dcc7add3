"""Benchmark runner: sampled frames of real files by `load_video` and by every other reader at hand."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmaccel.codecs.pool import cores as usable_cores
from mmaccel.codecs.sampling import target_size
from mmaccel.errors import MMAccelError
from mmaccel.measure.codec_clips import Recipe, make_clip
from mmaccel.measure.codec_contest import Crew, Entry, Outcome, contest
from mmaccel.measure.nvdec import simulate
from mmaccel.measure.rows import append_rows, environment, read_rows
from mmaccel.measure.stages import Spread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mmaccel.measure.codec_clips import Clip

__all__ = ["OURS", "CodecOptions", "run"]

OURS = "mmaccel"
_LIMIT = "limit"
# They decode everything up to the last wanted frame.
_SEQUENTIAL = ("pyav-sequential", "opencv")
_ENGINES_A_GPU = 7


@dataclass(frozen=True)
class _Cell:
    """One file and one request. codec, rows, gop, made: as `Recipe`; seconds: how long the file lasts.

    frames: how many are wanted, evenly spread. size: their shorter side, 0 for the video's own. rounds: instead of
    those of the options, 0 for theirs. everyone: whether all contestants take part, and not only the chosen ones.
    """

    name: str
    codec: str
    rows: int
    gop: int
    seconds: int
    frames: int
    made: int = 30
    size: int = 384
    rounds: int = 0
    everyone: bool = False

    def __post_init__(self) -> None:
        if self.frames < 1 or self.size < 0 or self.rounds < 0:
            raise MMAccelError(f"the cell {self.name} needs at least one frame, and no negative size or rounds.")

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.codec, self.rows, self.gop, self.made)


@dataclass(frozen=True)
class CodecOptions:
    """What is run.

    cells: files and requests, each a table with the fields of a cell (name, codec, rows, gop, seconds, frames; made,
    size, rounds). only: names of those that are run, none for all. mode: "decode" is one file by all contestants,
    "pool" the same by `load_video` with each of `thread_counts` and by simulated hardware decoders, as many as each of
    `engines`, "many" is `videos` different files of one recipe. contestants: names of those that take part besides
    `load_video`, none for all. rounds: timed runs of each. sequential_frames: in longer files contestants that decode
    everything up to the last wanted frame are left out. clips: a folder that keeps the files, "" for one in the
    system's temporary folder. peers_python: an interpreter with libraries that this one lacks (numpy must be one of
    them), "" for none. patience: seconds after which a contestant that does not answer is given up.
    """

    cells: tuple[dict, ...]
    only: tuple[str, ...] = ()
    mode: str = "decode"
    contestants: tuple[str, ...] = ()
    rounds: int = 5
    sequential_frames: int = 1000
    thread_counts: tuple[int, ...] = (1, 2, 4)
    engines: tuple[int, ...] = (1, 2, 4, 7, 14, 56)
    videos: int = 24
    clips: str = ""
    peers_python: str = ""
    patience: float = 300.0

    def key(self, cell: _Cell) -> str:
        """Tells apart groups of rows whose results may differ."""
        left_out = {"cells": asdict(cell), "only": (), "clips": "", "peers_python": bool(self.peers_python)}
        return hashlib.sha256(json.dumps({**asdict(self), **left_out}, sort_keys=True).encode()).hexdigest()[:12]


def run(name: str, options: CodecOptions, out: Path, progress: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """Measure every cell that `out` does not hold yet; the rows of a cell, one a contestant, are written together.

    A contestant that cannot take part has `missing`, the reason, instead of figures. The contestant "limit" only
    decodes, on one thread, the packets that any exact reader must decode.

    Raises:
        MMAccelError: an option out of range, an unknown contestant, a cell with unknown or missing fields, clips that
            cannot be made, an interpreter that is not there, or a system that cannot fork.
    """
    if not hasattr(os, "fork"):
        raise MMAccelError("the codec benchmarks fork processes, which this system cannot; run them on Linux or macOS.")
    if options.peers_python and shutil.which(options.peers_python) is None:
        raise MMAccelError(f"peers_python={options.peers_python}: there is no such interpreter.")
    cells = _cells(options)
    _entries(options, usable_cores(), 0, True)
    held = {row["key"] for row in read_rows(out) if row.get("benchmark") == name}
    wanted = [cell for cell in cells if options.key(cell) not in held]
    folder = Path(options.clips) if options.clips else Path(tempfile.gettempdir()) / "mmaccel-codec-clips"
    clips = {}
    for done, cell in enumerate(wanted):
        clips[cell.name] = _clips(options, cell, folder)
        progress("clips", done + 1, len(wanted))
    with Crew(options.peers_python, options.patience) as crew:
        for cell in wanted:
            append_rows(out, _measure(name, options, cell, clips[cell.name], crew, progress))
    keys = {options.key(cell) for cell in cells}
    return [row for row in read_rows(out) if row.get("benchmark") == name and row["key"] in keys]


def _cells(options: CodecOptions) -> list[_Cell]:
    known = {entry.name: entry for entry in fields(_Cell)}
    needed = {name for name, entry in known.items() if entry.default is MISSING}
    cells = []
    for table in options.cells:
        for name, value in table.items():
            if name not in known:
                raise MMAccelError(f"a cell has no field {name!r}; its fields are {', '.join(known)}.")
            if type(value).__name__ != known[name].type:
                raise MMAccelError(f"the field {name} of a cell is a {known[name].type}, not {value!r}.")
        if missing := needed - table.keys():
            raise MMAccelError(f"the cell {table.get('name', '?')!r} lacks {', '.join(sorted(missing))}.")
        cells.append(_Cell(**table))
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        raise MMAccelError("two cells have the same name.")
    if unknown := set(options.only) - set(names):
        raise MMAccelError(f"no cell is called {', '.join(sorted(unknown))}; cells are {', '.join(names)}.")
    least = min((options.rounds, options.videos, *options.thread_counts, *options.engines))
    if least < 1 or options.patience <= 0:
        raise MMAccelError("rounds, videos, thread_counts, engines and patience must be at least 1.")
    if any(count > _ENGINES_A_GPU and count % _ENGINES_A_GPU for count in options.engines):
        raise MMAccelError(f"engines above {_ENGINES_A_GPU} are a multiple of it: a GPU has {_ENGINES_A_GPU}.")
    chosen = [cell for cell in cells if not options.only or cell.name in options.only]
    for cell in chosen:
        _ = cell.recipe  # refused here, before hours of work
    return chosen


def _entries(options: CodecOptions, cores: int, total: int, everyone: bool) -> dict[str, Entry | str]:
    """All contestants of a mode; a string is the reason why one does not take part."""
    entries: dict[str, Entry | str] = {OURS: Entry(OURS, "list" if options.mode == "many" else "loop")}
    peers = ("pyav", "decord", "opencv", "torchcodec")
    if options.mode == "decode":
        entries |= {name: Entry(name) for name in (*peers[:1], "pyav-sequential", *peers[1:])}
        entries["torchcodec-1"] = Entry("torchcodec", threads=1)
        entries["pynvvideocodec"] = Entry("pynvvideocodec")
        for name in _SEQUENTIAL:
            if total > options.sequential_frames:
                entries[name] = f"it would decode all {total} frames"
    elif options.mode == "pool":
        entries |= {f"{OURS}-{count}": Entry(OURS, threads=count) for count in options.thread_counts}
    elif options.mode == "many":
        for name in (OURS, *peers):
            entries |= {f"{name}-loop": Entry(name), f"{name}-pool": Entry(name, "pool", 1, cores)}
    else:
        raise MMAccelError(f'mode is "decode", "pool" or "many", not {options.mode!r}.')
    if unknown := set(options.contestants) - entries.keys():
        raise MMAccelError(f"no contestant is called {', '.join(sorted(unknown))}; known are {', '.join(entries)}.")
    chosen = {OURS, *((not everyone and options.contestants) or entries)}
    kept = {name: entry for name, entry in entries.items() if name in chosen}
    if options.mode != "many":
        kept[_LIMIT] = Entry(_LIMIT)
    return kept


def _clips(options: CodecOptions, cell: _Cell, folder: Path) -> list[Clip]:
    orders: list[int | None] = [None] if options.mode != "many" else list(range(options.videos))
    clips = [make_clip(folder, cell.recipe, cell.seconds, order) for order in orders]
    if cell.frames > clips[0].total:
        raise MMAccelError(f"the cell {cell.name} wants {cell.frames} frames of {clips[0].total}.")
    return clips


def _measure(
    name: str,
    options: CodecOptions,
    cell: _Cell,
    clips: list[Clip],
    crew: Crew,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    one, rounds, cores = clips[0], cell.rounds or options.rounds, usable_cores()
    places = np.linspace(0, one.total - 1, cell.frames).round().astype(int)
    size = target_size(cell.rows, cell.recipe.columns, cell.size) if cell.size else None
    job = {"paths": [str(clip.path) for clip in clips], "wanted": places.tolist(), "size": size}
    machine = environment()
    entries = _entries(options, cores, one.total, cell.everyone)
    playing = {contestant: entry for contestant, entry in entries.items() if isinstance(entry, Entry)}
    outcomes = contest(crew, playing, job, rounds, lambda done: progress(cell.name, done, rounds))
    for contestant, entry in entries.items():
        if isinstance(entry, str):
            outcomes[contestant] = Outcome(missing=entry)
    expected = [clip.numbers[places].tolist() for clip in clips]
    height, width = size or (cell.rows, cell.recipe.columns)
    common = {
        "benchmark": name, "key": options.key(cell), "mode": options.mode, "cell": cell.name, "codec": cell.codec,
        "rows": cell.rows, "columns": cell.recipe.columns, "gop": cell.gop, "length": cell.seconds,
        "frames": cell.frames, "total": one.total, "videos": len(clips), "bytes": one.path.stat().st_size,
        "height": height, "width": width, "repeats": rounds, "cores": cores,
    }  # fmt: skip
    least = None
    if _LIMIT in outcomes and outcomes[_LIMIT].missing is None:
        least = float(np.median([answer["seconds"] for answer in outcomes[_LIMIT].rounds])) / cores
    rows = []
    for contestant in entries:
        figures = _figures(contestant, outcomes, expected, least)
        entry = playing.get(contestant)
        threads = None if entry is None else entry.threads
        rows.append({**common, "contestant": contestant, "threads": threads, **figures, **machine})
    if options.mode == "pool":
        rows += [{**common, **row, **machine} for row in _simulated(options.engines, outcomes[_LIMIT])]
    return rows


def _figures(
    contestant: str, outcomes: Mapping[str, Outcome], expected: list[list[int]], least: float | None
) -> dict[str, Any]:
    """What a row says of a contestant; ratio: the seconds of `load_video` as a share of its own, round by round.

    exact: whether every frame was the right one in every round. limit: seconds of "limit" on all cores, of_limit: that
    as a share of the contestant's. growth: bytes, the largest of all runs.
    """
    outcome = outcomes[contestant]
    figures: dict[str, Any] = {"missing": outcome.missing, "version": outcome.version, "limit": least}
    if outcome.missing is not None:
        return figures
    answers = [outcome.warm_up, *outcome.rounds]
    spread = Spread.of([answer["seconds"] for answer in outcome.rounds])
    bare, ours = contestant == _LIMIT, outcomes[OURS]
    ratio = None
    if ours.missing is None and not bare:
        shares = [a["seconds"] / b["seconds"] for a, b in zip(ours.rounds, outcome.rounds, strict=True)]
        ratio = Spread.of(shares).as_dict()
    growths = [answer["growth"] for answer in answers if answer["growth"] is not None]
    return {
        **figures,
        "seconds": spread.as_dict(),
        "cpu": Spread.of([answer["cpu"] for answer in outcome.rounds]).as_dict(),
        "growth": max(growths) if growths and not bare else None,
        "decoded": outcome.warm_up["decoded"],
        "exact": None if bare else all(answer["numbers"] == expected for answer in answers),
        "ratio": ratio,
        "of_limit": None if bare or least is None else least / spread.median,
    }


def _simulated(engines: tuple[int, ...], limit: Outcome) -> list[dict[str, Any]]:
    """Rows of "engines": the groups of pictures, at their measured seconds each, on decoders that share a queue."""
    rows = [{"contestant": "engines", "engines": count, "missing": limit.missing} for count in engines]
    if limit.missing is not None:
        return rows
    costs = np.median([answer["groups"] for answer in limit.rounds], axis=0).tolist()
    for row in rows:
        gpus = max(1, row["engines"] // _ENGINES_A_GPU)
        result = simulate(costs, row["engines"] // gpus, gpus=gpus)
        row |= {"makespan": result.makespan, "groups": len(costs), "alone": sum(costs), "longest": max(costs)}
    return rows

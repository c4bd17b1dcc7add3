"""Benchmark runner: time of a vision encoder by itself under each method, against its FLOPs and against dense."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmaccel.api import accelerate
from mmaccel.core.stream import Stream, following
from mmaccel.errors import MMAccelError
from mmaccel.measure.devices import dtype_named
from mmaccel.measure.flops import counted_flops
from mmaccel.measure.memory import peak_memory
from mmaccel.measure.rows import append_rows, cpu_name, environment, load, read_rows
from mmaccel.measure.stages import DENSE, Spread

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TowerOptions", "run"]


@dataclass(frozen=True)
class TowerOptions:
    """What is run, on the CPU.

    towers: names of `mmaccel.tiny.families.real_towers.TOWERS`. specs: methods. clips: kinds of clips there. frames: of
    a clip. chunk: how many go into one call; with 0 all do, else the calls are those of a stream. layers: keep so many,
    0 for all. repeats: timed rounds, in each of which dense and every spec run once.
    """

    towers: tuple[str, ...]
    specs: tuple[str, ...]
    clips: tuple[str, ...] = ("still",)
    frames: int = 8
    chunk: int = 0
    layers: int = 0
    dtype: str = "float32"
    repeats: int = 7
    threads: int = 1

    def key(self, tower: str, clip: str) -> str:
        """Tells apart groups of rows whose results may differ."""
        relevant = {**asdict(self), "towers": tower, "clips": clip, "cpu": cpu_name()}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:12]


def run(name: str, options: TowerOptions, out: Path, progress: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """Measure every tower on every clip that `out` does not hold yet; rows of one such group are written together.

    Raises:
        MMAccelError: an unknown name or dtype, or an option out of range.
    """
    from mmaccel.tiny.families.real_towers import build_tower, tower_clip

    dtype = dtype_named(options.dtype)
    if min(options.threads, options.repeats, options.frames) < 1 or options.chunk < 0:
        raise MMAccelError("threads, repeats and frames must be at least 1, and chunk at least 0.")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        for tower in options.towers:
            model = build_tower(tower, options.layers or None, dtype)
            for clip in options.clips:
                held = {row["key"] for row in read_rows(out) if row.get("benchmark") == name}
                if options.key(tower, clip) not in held:
                    frames = tower_clip(clip, tower, options.frames, dtype)
                    append_rows(out, _group(name, options, model, tower, clip, frames, progress))
    finally:
        torch.set_num_threads(before)
    keys = {options.key(tower, clip) for tower in options.towers for clip in options.clips}
    return [row for row in read_rows(out) if row.get("benchmark") == name and row["key"] in keys]


@dataclass(frozen=True)
class _Pass:
    """One pass over the clip: seconds and FLOPs of each call, features [frames, ...], what the report says."""

    seconds: list[float]
    flops: list[int]
    features: torch.Tensor
    events: dict[str, Any]


@torch.no_grad()
def _over(model: Any, spec: str, frames: torch.Tensor, chunk: int, *, count: bool = False) -> _Pass:
    seconds, flops, parts = [], [], []
    with ExitStack() as stack:
        handle = stack.enter_context(accelerate(model, spec)) if spec != DENSE else None
        if chunk:
            stack.enter_context(following(Stream()))
        for part in frames.split(chunk or len(frames)):
            with counted_flops() if count else ExitStack() as counter:
                start = time.perf_counter()
                made = model(part)
                seconds.append(time.perf_counter() - start)
            flops.append(counter.get_total_flops() if count else 0)  # type: ignore[union-attr]
            parts.append(made if isinstance(made, torch.Tensor) else made.last_hidden_state)
        events = dict(handle.report().events) if handle else {}
    return _Pass(seconds, flops, torch.cat(parts), events)


def _group(
    name: str, options: TowerOptions, model: Any, tower: str, clip: str, frames: torch.Tensor,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:  # fmt: skip
    settings, what = (DENSE, *options.specs), f"{tower}, {clip}"
    total, counted, peaks = len(settings) * (1 + options.repeats), {}, {}
    for number, spec in enumerate(settings):
        progress(what, number, total)
        with peak_memory("cpu") as peak:
            counted[spec] = _over(model, spec, frames, options.chunk, count=True)
        peaks[spec] = {"peak": peak.peak, "growth": peak.growth, "method": peak.method}
    machine = environment()
    rounds: dict[str, list[list[float]]] = {spec: [] for spec in settings}
    for turn in range(options.repeats):
        for number, spec in enumerate(settings):
            progress(what, len(settings) * (1 + turn) + number, total)
            rounds[spec].append(_over(model, spec, frames, options.chunk).seconds)
    machine["machine"]["load_after"] = load()
    dense = counted[DENSE]
    rows = []
    for spec in settings:
        one = counted[spec]
        difference = torch.linalg.vector_norm((one.features - dense.features).float())
        rows.append(
            {
                "benchmark": name, "key": options.key(tower, clip), "model": tower, "weights": "random",
                "dtype": options.dtype, "attention": "sdpa", "device": "cpu", "clip": clip, "spec": spec,
                "shapes": {"frames": list(frames.shape)}, "layers": _depth(model), "shortened": bool(options.layers),
                "seconds": Spread.of([sum(calls) for calls in rounds[spec]]).as_dict(),
                "ratio": _paired([sum(calls) for calls in rounds[spec]], [sum(calls) for calls in rounds[DENSE]]),
                "flops": sum(one.flops), "flops_ratio": sum(one.flops) / sum(dense.flops),
                "calls": [
                    {
                        "seconds": Spread.of(list(times)).as_dict(), "ratio": _paired(times, others),
                        "flops_ratio": flops / whole,
                    }
                    for times, others, flops, whole in zip(
                        zip(*rounds[spec], strict=True), zip(*rounds[DENSE], strict=True), one.flops, dense.flops,
                        strict=True,
                    )
                ],
                "difference": float(difference / torch.linalg.vector_norm(dense.features.float())),
                "events": one.events, "memory": peaks[spec], "repeats": options.repeats, "options": asdict(options),
                **machine,
            }
        )  # fmt: skip
    return rows


def _paired(times: Any, others: Any) -> dict[str, float]:
    """Ratio of times to those of dense in the same round: median, 20th and 80th percentile."""
    return Spread.of([a / b for a, b in zip(times, others, strict=True)]).as_dict()


def _depth(model: Any) -> int:
    from mmaccel.targets import resolve

    return len(resolve(model).site.encoder().blocks)

"""Benchmark runner: time to first token of real configs with random weights, dense against each method."""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmaccel.adapters import video_lm
from mmaccel.api import accelerate
from mmaccel.errors import MMAccelError
from mmaccel.measure.devices import device_named, dtype_named
from mmaccel.measure.flops import count_flops, encoder_flops, paper_prefill_macs, prefill_flops
from mmaccel.measure.memory import peak_memory
from mmaccel.measure.rows import append_rows, cpu_name, environment, load, read_rows
from mmaccel.measure.shapes import record_shapes
from mmaccel.measure.stages import DENSE, StageTimes, compare, time_per_output_token

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SpeedOptions", "run"]


@dataclass(frozen=True)
class SpeedOptions:
    """What is run.

    models: names of `mmaccel.tiny.families.REAL`. frames: video lengths. specs: methods. layers, vision_layers: keep so
    many of each model, 0 for all. device: "cpu", "cuda" or "auto". repeats: timed rounds, in each of which dense and
    every spec run once. new_tokens: 0, or how many to generate for the time per output token. decode: rows of an H.264
    clip of 30 seconds from which `load_video` takes as many frames at 384 pixels, as the first stage; 0 for none.
    """

    models: tuple[str, ...]
    frames: tuple[int, ...]
    specs: tuple[str, ...]
    layers: int = 0
    vision_layers: int = 0
    dtype: str = "bfloat16"
    device: str = "auto"
    repeats: int = 5
    threads: int = 1
    new_tokens: int = 0
    decode: int = 0

    def key(self, model: str, frames: int, device: torch.device) -> str:
        """Tells apart groups of rows whose results may differ; `device` is the one that "auto" turned out to be."""
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        place = {"device": device.type, "gpu": gpu, "cpu": cpu_name()}
        given = asdict(self)
        if not self.decode:  # as in rows from before there was this option
            del given["decode"]
        relevant = {**given, "models": model, "frames": frames, **place}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:12]


def run(name: str, options: SpeedOptions, out: Path, progress: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """Measure every model at every length that `out` does not hold yet; rows of one such group are written together.

    Raises:
        MMAccelError: an unknown dtype, a device that is not there, or an option out of range.
    """
    device, dtype = device_named(options.device), dtype_named(options.dtype)
    if options.threads < 1 or options.repeats < 1:
        raise MMAccelError("threads and repeats must be at least 1.")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        for model_name in options.models:
            held = {row["key"] for row in read_rows(out) if row.get("benchmark") == name}
            missing = [frames for frames in options.frames if options.key(model_name, frames, device) not in held]
            if not missing:
                continue
            from mmaccel.tiny.families import build_real

            model = build_real(
                model_name, options.layers or None, options.vision_layers or None, dtype=dtype, device=device
            )
            for frames in missing:
                rows = _group(name, options, model, model_name, frames, progress)
                append_rows(out, rows)
            del model
    finally:
        torch.set_num_threads(before)
    keys = {options.key(model, frames, device) for model in options.models for frames in options.frames}
    return [row for row in read_rows(out) if row.get("benchmark") == name and row["key"] in keys]


def _decoding(options: SpeedOptions, frames: int) -> dict[str, float] | None:
    """Seconds that decoding takes, the median of `repeats`."""
    if not options.decode:
        return None
    from mmaccel.codecs import load_video
    from mmaccel.measure.codec_clips import Recipe, make_clip

    with tempfile.TemporaryDirectory() as folder:
        path = make_clip(Path(folder), Recipe("h264", options.decode, 60, 10), 30).path
        seconds = []
        for _ in range(options.repeats + 1):
            start = time.perf_counter()
            load_video(path, frames=frames, size=384, threads=options.threads)
            seconds.append(time.perf_counter() - start)
    return {"decode": statistics.median(seconds[1:])}


@dataclass(frozen=True)
class _Profile:
    """What one untimed call computed and held."""

    counted: dict[str, int]
    tokens_per_layer: list[int]
    vision_tokens: int
    encoder: float
    memory: dict[str, Any]


def _profile(model: Any, inputs: dict[str, Any], spec: str) -> _Profile:
    with ExitStack() as stack:
        if spec != DENSE:
            stack.enter_context(accelerate(model, spec))
        shapes = stack.enter_context(record_shapes(model))
        with peak_memory(model.device) as peak:
            counted = count_flops(model, inputs)
    memory = {"peak": peak.peak, "growth": peak.growth, "method": peak.method}
    return _Profile(counted, shapes.prefill, sum(shapes.vision[0]), encoder_flops(model, shapes.vision), memory)


def _group(
    name: str,
    options: SpeedOptions,
    model: Any,
    model_name: str,
    frames: int,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    from mmaccel.tiny.families import REAL, real_inputs

    what = f"{model_name}, {frames} frames"
    dtype = next(model.parameters()).dtype
    inputs = {key: value.to(model.device) for key, value in real_inputs(model_name, frames, dtype=dtype).items()}
    settings = (DENSE, *options.specs)
    calls = len(settings) * (1 + options.repeats)
    profiles = {}
    for number, spec in enumerate(settings):
        progress(what, number, calls)
        profiles[spec] = _profile(model, inputs, spec)
    machine = environment()
    times = compare(
        model, inputs, options.specs, repeats=options.repeats, warmup=0, before=_decoding(options, frames),
        progress=lambda done, _total: progress(what, len(settings) + done, calls),
    )  # fmt: skip
    machine["machine"]["load_after"] = load()
    common = {
        "benchmark": name, "key": options.key(model_name, frames, model.device), "model": model_name,
        "weights": "random", "frames": frames, "dtype": options.dtype, "attention": "sdpa",
        "device": str(model.device), "batch": 1,
        "layers": len(video_lm(model).layers), "layers_total": REAL[model_name].layers,
        "vision_layers": len(video_lm(model).vision_blocks()), "vision_layers_total": REAL[model_name].vision_layers,
        "shortened": bool(options.layers or options.vision_layers), "repeats": options.repeats,
        "shapes": {key: list(value.shape) for key, value in inputs.items()}, "threads": options.threads,
        "options": asdict(options),
    }  # fmt: skip
    rows = []
    for spec in settings:
        rows.append({**common, "spec": spec, **_row(model, inputs, times, profiles, spec), **machine})
        if options.new_tokens:
            with ExitStack() as stack:
                if spec != DENSE:
                    stack.enter_context(accelerate(model, spec))
                spread = time_per_output_token(model, inputs, new_tokens=options.new_tokens, repeats=2, warmup=0)
            rows[-1]["time_per_output_token"] = spread.as_dict()
    return rows


def _row(
    model: Any, inputs: dict[str, Any], times: dict[str, StageTimes], profiles: dict[str, _Profile], spec: str
) -> dict[str, Any]:
    own, dense, profile = times[spec], times[DENSE], profiles[spec]
    site = video_lm(model)
    config = site.language_model.config
    ids = inputs["input_ids"]
    visual = sum(int(where.sum()) for where in site.placeholders(ids, ids).values())
    text = ids.shape[1] - visual
    tokens = profile.tokens_per_layer
    stages = {
        stage: _over(own.stages[stage].median, dense.stages[stage].median) for stage in ("encode", "project", "prefill")
    }
    return {
        "ttft": own.as_dict(),
        "ttft_ratio": own.total.median / dense.total.median,
        "stage_ratio": stages,
        "overhead_of_dense": own.overhead.median / dense.total.median,
        "overhead_of_own": own.overhead.median / own.total.median,
        "tokens_in": visual,
        "tokens_out": tokens[0] - text,
        "tokens_last": tokens[-1] - text,
        "tokens_per_layer": tokens,
        "vision_tokens": profile.vision_tokens,
        "flops_counted": profile.counted,
        "flops_encoder": profile.encoder,
        "flops_prefill": prefill_flops(model, tokens),
        "flops_prefill_causal": prefill_flops(model, tokens, causal=True),
        "paper_macs": paper_prefill_macs([n - text for n in tokens], config.hidden_size, config.intermediate_size),
        "memory": profile.memory,
    }


def _over(a: float, b: float) -> float | None:
    return a / b if b > 0 else None

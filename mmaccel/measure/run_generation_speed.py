"""Benchmark runner: time and memory of real diffusion transformers with random weights, dense against each method."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmaccel.errors import MMAccelError
from mmaccel.measure.devices import device_named, dtype_named
from mmaccel.measure.generation import pipeline_stages, watch_steps
from mmaccel.measure.generation_settings import Profile, applied, check_settings, method_name, profile
from mmaccel.measure.rows import append_rows, cpu_name, environment, load, read_rows
from mmaccel.measure.stages import DENSE, Spread

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GenerationSpeedOptions", "run"]


@dataclass(frozen=True)
class GenerationSpeedOptions:
    """What is run.

    models: names of `mmaccel.tiny.families.REAL_GENERATORS`. specs: methods. layers: keep so many blocks of each kind,
    of each model or one number for all, 0 for all blocks. steps: 0 for those that the model is published with. full:
    the published size of picture, not a small one. guided: with a branch for the empty prompt. device: "cpu", "cuda" or
    "auto". repeats: timed rounds, in each of which dense and every spec run once.
    """

    models: tuple[str, ...]
    specs: tuple[str, ...]
    layers: tuple[int, ...] = (0,)
    steps: int = 0
    full: bool = False
    guided: bool = False
    dtype: str = "float32"
    device: str = "auto"
    repeats: int = 2
    threads: int = 1

    def key(self, model: str, device: torch.device) -> str:
        """Tells apart groups of rows whose results may differ; `device` is the one that "auto" turned out to be."""
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        place = {"device": device.type, "gpu": gpu, "cpu": cpu_name()}
        relevant = {**asdict(self), "models": model, "layers": self.depth(model), **place}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:12]

    def depth(self, model: str) -> int:
        """How many blocks of each kind of a model are kept, 0 for all."""
        return self.layers[self.models.index(model) if len(self.layers) > 1 else 0]


def run(
    name: str, options: GenerationSpeedOptions, out: Path, progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """Measure every model that `out` does not hold yet; its rows are written together.

    Raises:
        MMAccelError: an unknown model, dtype or method, a device that is not there, or an option out of range.
    """
    from mmaccel.tiny.families.real_generators import REAL_GENERATORS

    device, dtype = device_named(options.device), dtype_named(options.dtype)
    unknown = [model for model in options.models if model not in REAL_GENERATORS]
    if unknown or not options.models:
        raise MMAccelError(f"unknown models {', '.join(unknown)}; known are {', '.join(REAL_GENERATORS)}.")
    if min(options.threads, options.repeats) < 1 or options.steps < 0:
        raise MMAccelError("threads and repeats must be at least 1, and steps at least 0.")
    if len(options.layers) not in (1, len(options.models)) or min(options.layers) < 0:
        raise MMAccelError("layers takes one number of at least 0 for all models, or one for each.")
    check_settings(options.specs)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        for model in options.models:
            held = {row["key"] for row in read_rows(out) if row.get("benchmark") == name}
            if options.key(model, device) not in held:
                append_rows(out, _group(name, options, model, device, dtype, progress))
    finally:
        torch.set_num_threads(before)
    keys = {options.key(model, device) for model in options.models}
    return [row for row in read_rows(out) if row.get("benchmark") == name and row["key"] in keys]


def _group(
    name: str, options: GenerationSpeedOptions, model: str, device: torch.device, dtype: torch.dtype,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:  # fmt: skip
    from mmaccel.tiny.families.real_generators import REAL_GENERATORS, build_generator, generator_call

    depth = options.depth(model)
    pipe = build_generator(model, depth or None, dtype=dtype, device=device)
    arguments = generator_call(model, dtype=dtype, full=options.full, guided=options.guided)
    arguments = {key: value.to(device) if torch.is_tensor(value) else value for key, value in arguments.items()}
    if options.steps:
        arguments["num_inference_steps"] = options.steps
    call = _Call(pipe, arguments)
    settings = (DENSE, *options.specs)
    total, done = len(settings) * (1 + options.repeats), 0
    profiles: dict[str, Profile] = {}
    for spec in settings:
        progress(f"{model}, {spec}", done, total)
        profiles[spec] = profile(pipe, spec, call, profiles.get(DENSE), device)
        done += 1
    runnable = [spec for spec in settings if profiles[spec].missing is None]
    machine = environment()
    seconds: dict[str, list[dict[str, float]]] = {spec: [] for spec in runnable}
    for number in range(options.repeats):
        # whoever runs first in one round runs later in the next
        turn = number % len(runnable)
        for spec in runnable[turn:] + runnable[:turn]:
            progress(f"{model}, {spec}", done, total)
            seconds[spec].append(call.timed(spec, profiles[spec].settles))
            done += 1
    machine["machine"]["load_after"] = load()
    common = {
        "benchmark": name, "key": options.key(model, device), "model": model, "weights": "random",
        "dtype": options.dtype, "attention": "sdpa", "device": str(device), "batch": 1,
        "layers": {field: depth or whole for field, whole in REAL_GENERATORS[model].depths.items()},
        "layers_total": REAL_GENERATORS[model].depths, "shortened": bool(depth), "guided": options.guided,
        "steps": arguments["num_inference_steps"], "threads": options.threads, "repeats": options.repeats,
        "size": {key: arguments[key] for key in ("height", "width", "num_frames") if key in arguments},
        "options": asdict(options),
    }  # fmt: skip
    return [{**common, **_row(spec, profiles[spec], seconds), **machine} for spec in settings]


class _Call:
    """Calls of one pipeline with the same prompt and noise."""

    def __init__(self, pipe: Any, arguments: dict[str, Any]) -> None:
        self.pipe, self.arguments = pipe, arguments

    def __call__(self) -> torch.Tensor:
        with watch_steps(self.pipe) as denoised:
            self.pipe(**self.arguments, generator=torch.Generator().manual_seed(0))
        if denoised.latents is None:
            raise MMAccelError("the pipeline never called its scheduler, so there is nothing to measure.")
        if not torch.isfinite(denoised.latents).all():
            raise MMAccelError("the latents are not finite; choose another dtype.")
        return denoised.latents

    def timed(self, spec: str, settles: bool) -> dict[str, float]:
        """Seconds by stage of one call."""
        with applied(self.pipe, spec):
            if settles:
                self()
            return pipeline_stages(self.pipe, self)[1]


def _row(spec: str, found: Profile, seconds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    row = {"spec": spec, "method": method_name(spec), **asdict(found)}
    if found.missing is not None:
        return row
    own, dense = seconds[spec], seconds[DENSE]
    return {
        **row,
        "transformer": Spread.of([one["transformer"] for one in own]).as_dict(),
        "rest": Spread.of([one["rest"] for one in own]).as_dict(),
        # shares round by round, because the machine drifts
        "transformer_ratio": Spread.of(_shares(own, dense, "transformer")).as_dict(),
        "time_ratio": Spread.of(_shares(own, dense, "transformer", "rest")).as_dict(),
    }


def _shares(own: list[dict[str, float]], dense: list[dict[str, float]], *stages: str) -> list[float]:
    return [
        sum(mine[stage] for stage in stages) / sum(whole[stage] for stage in stages)
        for mine, whole in zip(own, dense, strict=True)
    ]

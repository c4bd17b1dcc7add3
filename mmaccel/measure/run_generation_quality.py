"""Benchmark runner: what methods cost in quality on the embedded generators, beside the time that they take."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmaccel.errors import MMAccelError
from mmaccel.measure.generation import pipeline_stages, watch_steps
from mmaccel.measure.generation_comparison import compared
from mmaccel.measure.generation_settings import Profile, applied, check_settings, method_name, profile
from mmaccel.measure.quality import bootstrap_difference, bootstrap_mean
from mmaccel.measure.rows import append_rows, environment, load, read_rows
from mmaccel.measure.stages import DENSE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["GenerationQualityOptions", "run"]

POOLED = "all"
BEST_PSNR = 100.0
SETTLING = 2
_SCHEDULERS = ("own", "euler")


@dataclass(frozen=True)
class GenerationQualityOptions:
    """What is run.

    model: "text-to-video" or "class-to-image", the embedded ones. specs: methods. ours: those of them that are compared
    with every method that is not named so. scheduler: "own", or "euler" (flow matching) for text-to-video. clips: of
    each seed, disjoint prompts and noise. first: number of the first one. batch: clips of one call. steps: 0 for those
    that the model was made for. read_back: ask the video-QA model about every clip.
    """

    model: str
    specs: tuple[str, ...]
    ours: tuple[str, ...] = ("hsa",)
    scheduler: str = "own"
    clips: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    first: int = 30_000_000
    batch: int = 8
    steps: int = 0
    read_back: bool = True
    samples: int = 10_000
    threads: int = 1

    def key(self) -> str:
        """Tells apart runs whose results may differ."""
        relevant = {name: value for name, value in asdict(self).items() if name not in ("seeds", "samples", "ours")}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:12]


def run(
    name: str, options: GenerationQualityOptions, out: Path, progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """Run what is still missing, batch by batch; write the settings, each seed alone and all together, and comparisons.

    Batches that are done stand in a work file beside `out`, so an interrupted run goes on where it was.

    Raises:
        MMAccelError: an option out of range, or results of the same name in `out` that other options made.
    """
    _check(options)
    held = _rows_of(out, name, options)
    if held:
        return held
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return _run(name, options, out, progress)
    finally:
        torch.set_num_threads(before)


def _run(
    name: str, options: GenerationQualityOptions, out: Path, progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    work = out.with_name(out.name + ".part")
    subject = _Subject(options)
    parts = [row for row in read_rows(work) if row["key"] == options.key()]
    jobs = [(seed, batch) for seed in options.seeds for batch in range(-(-options.clips // options.batch))]
    total = len(jobs) * (1 + len(options.specs))
    machine = environment()
    profiles = {row["spec"]: Profile(**row["profile"]) for row in parts if "profile" in row}
    for spec in (DENSE, *options.specs):
        if spec not in profiles:
            progress(f"{name}, {spec} once", len(profiles), len(options.specs) + 1)
            profiles[spec] = subject.profile(spec, profiles.get(DENSE))
            append_rows(work, [{"key": options.key(), "spec": spec, "profile": asdict(profiles[spec])}])
    done = {(row["seed"], row["batch"]): row for row in parts if "batch" in row}
    runnable = [spec for spec in (DENSE, *options.specs) if profiles[spec].missing is None]
    for number, (seed, batch) in enumerate(jobs):
        if (seed, batch) in done:
            continue
        # whoever runs first in one batch runs later in the next
        turn = number % len(runnable)
        order = runnable[turn:] + runnable[:turn]
        first = options.first + seed * options.clips
        numbers = range(first + batch * options.batch, first + min(options.clips, (batch + 1) * options.batch))
        found = subject.measure(
            order, numbers, {spec for spec in runnable if profiles[spec].settles},
            lambda at, number=number: progress(name, number * (1 + len(options.specs)) + at, total),
        )  # fmt: skip
        done[seed, batch] = {"key": options.key(), "seed": seed, "batch": batch, "load": load(), "found": found}
        append_rows(work, [done[seed, batch]])
    machine["machine"]["load_after"] = load()
    common = {
        "benchmark": name, "key": options.key(), "model": options.model, "weights": "trained", "dtype": "float32",
        "attention": "sdpa", "device": "cpu", "scheduler": subject.scheduler, "steps": subject.steps,
        "batch": options.batch, "threads": options.threads, "options": asdict(options), **machine,
    }  # fmt: skip
    rows = []
    for seed in (*options.seeds, POOLED):
        some = [done[job]["found"] for job in jobs if seed in (POOLED, job[0])]
        merged = {spec: _merged([found[spec] for found in some]) for spec in runnable}
        rows += [
            {**common, "seed": seed, **_setting(spec, merged, profiles, options.samples, raw=seed != POOLED)}
            for spec in (DENSE, *options.specs)
        ]
        times = {spec: _denoising(merged[spec]) / _denoising(merged[DENSE]) for spec in runnable}
        errors = {spec: {kind: merged[spec][kind] for kind in ("latents", "psnr")} for spec in runnable}
        rows += [
            {**common, "kind": "comparison", "seed": seed, **row}
            for row in compared(times, errors, options.ours, samples=options.samples)
        ]
    append_rows(out, rows)
    work.unlink(missing_ok=True)
    return _rows_of(out, name, options)


def _check(options: GenerationQualityOptions) -> None:
    if options.model not in ("text-to-video", "class-to-image") or options.scheduler not in _SCHEDULERS:
        raise MMAccelError("model must be text-to-video or class-to-image, and scheduler own or euler.")
    if options.model == "class-to-image" and options.scheduler != "own":
        raise MMAccelError("the class-to-image model predicts noise; its scheduler must be own.")
    if min(options.clips, options.batch, options.threads) < 1 or options.steps < 0 or not options.seeds:
        raise MMAccelError("clips, batch and threads must be at least 1, steps at least 0, and seeds not empty.")
    check_settings(options.specs)


def _rows_of(out: Path, name: str, options: GenerationQualityOptions) -> list[dict[str, Any]]:
    rows = [row for row in read_rows(out) if row.get("benchmark") == name]
    if any(row["key"] != options.key() or row["options"]["seeds"] != list(options.seeds) for row in rows):
        raise MMAccelError(f"{out} holds results of {name} with other options; remove them or name another file.")
    return rows


class _Subject:
    """One of the embedded generators, and how it is called and judged."""

    def __init__(self, options: GenerationQualityOptions) -> None:
        from mmaccel.tiny import IMAGE_CALL, VIDEO_CALL, class_to_image, text_to_video, video_qa

        self.video, self.options = options.model == "text-to-video", options
        self.pipe = text_to_video() if self.video else class_to_image()
        self.call_arguments = dict(VIDEO_CALL if self.video else IMAGE_CALL)
        if options.steps:
            self.call_arguments["num_inference_steps"] = options.steps
        if options.scheduler == "euler":
            import diffusers

            library: Any = diffusers  # exported lazily, out of sight of a type checker
            shift = self.pipe.scheduler.config.flow_shift
            self.pipe.scheduler = library.FlowMatchEulerDiscreteScheduler(shift=shift)
        self.scheduler = type(self.pipe.scheduler).__name__
        self.steps = self.call_arguments["num_inference_steps"]
        self.judge = video_qa()

    def request(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Arguments of a call for the clips with these numbers."""
        noise = [torch.Generator().manual_seed(number) for number in numbers]
        if self.video:
            from mmaccel.tiny.stories import sample_story

            # prompts of the kind that the model was trained on: it reads others back badly, dense too
            prompts = [str(sample_story(number, "train")) for number in numbers]
            return {"prompt": prompts, "generator": noise, **self.call_arguments}
        labels = [number % len(self.pipe.labels) for number in numbers]
        return {"class_labels": labels, "generator": noise, **self.call_arguments}

    def story(self, number: int) -> Any:
        """What a clip shows, and the kinds of questions that are asked about it."""
        from mmaccel.tiny.generation_scoring import IMAGE_KINDS, image_story
        from mmaccel.tiny.stories import sample_story

        if self.video:
            return sample_story(number, "train"), ()
        names = {place: name for name, place in self.pipe.labels.items()}
        return image_story(names[number % len(names)]), IMAGE_KINDS

    def call(self, numbers: Sequence[int]) -> tuple[torch.Tensor, np.ndarray]:
        """Latents, and pixels uint8 [N, T, H, W, 3] or [N, H, W, 3]."""
        with watch_steps(self.pipe) as denoised:
            found = self.pipe(**self.request(numbers), output_type="np")
        if denoised.latents is None:
            raise MMAccelError("the pipeline never called its scheduler, so there is nothing to judge.")
        pixels = found.frames if self.video else found.images
        return denoised.latents.detach().double(), np.floor(np.asarray(pixels) * 255.0 + 0.5).astype(np.uint8)

    def profile(self, spec: str, dense: Profile | None) -> Profile:
        """Work and memory of a setting, with some clips that are not measured."""
        return profile(self.pipe, spec, lambda: self.call(self._settling()), dense)

    def _settling(self) -> range:
        return range(self.options.first - SETTLING, self.options.first)

    def measure(
        self, order: Sequence[str], numbers: range, settles: set[str], progress: Callable[[int], None]
    ) -> dict[str, Any]:
        """Seconds by stage of every setting, and of each clip its distances to the dense one and what is read back."""
        seconds, made = {}, {}
        for place, spec in enumerate(order):
            progress(place)
            with applied(self.pipe, spec):
                if spec in settles:
                    self.call(self._settling())
                made[spec], seconds[spec] = pipeline_stages(self.pipe, lambda: self.call(numbers))
        features = [self._features(pixels) for pixels in made[DENSE][1]]
        return {
            spec: {"seconds": seconds[spec], **self._judged(made[spec], made[DENSE], features, numbers)}
            for spec in order
        }

    def _judged(self, made: Any, dense: Any, features: list[torch.Tensor], numbers: Sequence[int]) -> dict[str, Any]:
        from mmaccel.tiny.read_back import psnr, replies_right

        (latents, pixels), (reference, dense_pixels) = made, dense
        change = (latents - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
        if not torch.isfinite(change).all():
            raise MMAccelError("the latents of a clip are not finite, so they have no distance to the dense ones.")
        far = [
            float(1 - torch.cosine_similarity(self._features(clip), seen, dim=-1).mean())
            for clip, seen in zip(pixels, features, strict=True)
        ]
        right: list[list[tuple[str, bool]]] = []
        if self.options.read_back:
            for number, clip in zip(numbers, pixels, strict=True):
                story, kinds = self.story(number)
                right.append(replies_right(*self.judge, self._clip(clip), story, kinds))
        return {
            "latents": change.tolist(),
            "psnr": [min(psnr(clip, other), BEST_PSNR) for clip, other in zip(pixels, dense_pixels, strict=True)],
            "features": far,
            "right": right,
        }

    def _features(self, pixels: np.ndarray) -> torch.Tensor:
        from mmaccel.tiny.read_back import clip_features

        return clip_features(*self.judge, self._clip(pixels))

    def _clip(self, pixels: np.ndarray) -> np.ndarray:
        from mmaccel.tiny.read_back import still

        return pixels if self.video else still(pixels)


def _merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batches of one setting, one after the other."""
    seconds = {stage: sum(part["seconds"][stage] for part in parts) for stage in parts[0]["seconds"]}
    names = ("latents", "psnr", "features", "right")
    lists = {name: [value for part in parts for value in part[name]] for name in names}
    return {"seconds": seconds, **lists}


def _denoising(merged: dict[str, Any]) -> float:
    """Seconds of all that a method can change: transformers, scheduler, and what the method does beside them."""
    return merged["seconds"]["transformer"] + merged["seconds"]["rest"]


def _setting(
    spec: str, merged: dict[str, dict[str, Any]], profiles: dict[str, Profile], samples: int, raw: bool
) -> dict[str, Any]:
    row = {"kind": "setting", "spec": spec, "method": method_name(spec), **asdict(profiles[spec])}
    if profiles[spec].missing is not None:
        return row
    own, dense = merged[spec], merged[DENSE]
    row |= {
        "clips": len(own["psnr"]),
        "seconds": own["seconds"],
        "time": _denoising(own) / _denoising(dense),
        "transformer": own["seconds"]["transformer"] / dense["seconds"]["transformer"],
        "latents_median": float(np.median(own["latents"])),
        **{name: bootstrap_mean(own[name], samples=samples).as_dict() for name in ("latents", "psnr", "features")},
        "read_back": None,
    }
    if own["right"]:
        hits, owner = _hits(own["right"])
        whole = [all(hit for _, hit in clip) for clip in own["right"]]
        row["read_back"] = bootstrap_mean(hits, owner, samples=samples).as_dict()
        row["read_back_over_dense"] = bootstrap_difference(
            hits, _hits(dense["right"])[0], owner, samples=samples
        ).as_dict()
        row["read_back_whole"] = math.fsum(whole) / len(whole)
    if raw:
        row["clip_values"] = {name: [round(value, 6) for value in own[name]] for name in ("latents", "psnr")}
    return row


def _hits(right: Sequence[Sequence[tuple[str, bool]]]) -> tuple[np.ndarray, np.ndarray]:
    """Answers [n], and the number of the clip of each."""
    hits = np.array([hit for clip in right for _, hit in clip], dtype=np.float64)
    return hits, np.repeat(np.arange(len(right)), [len(clip) for clip in right])

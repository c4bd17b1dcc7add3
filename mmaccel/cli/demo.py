"""mmaccel demo: every token-reducing method on the embedded model, from real H.264 files to a report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmaccel.errors import MMAccelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.table import Table

    from mmaccel.cli.models import Loaded
    from mmaccel.cli.terminal import Terminal
    from mmaccel.codecs import Video
    from mmaccel.measure import Case, StageTimes
    from mmaccel.tiny.world import Question

__all__ = ["run", "settings", "writable_folder"]

KEEPS = (0.25, 0.10)
BATCH = 4
# Held-out clips that neither the committed scores nor the test-suite have looked at.
FIRST = 500_000
_TIMING_SHARE = 0.15


@dataclass(frozen=True)
class _Seen:
    """One clip as it came back from its file."""

    path: Path
    video: Video
    questions: list[Question]
    seconds: float


def run(terminal: Terminal, out: Path, *, clips: int, seconds: float) -> None:
    """Measure, print the table and write `report.html`, `pareto.png` and the clips to `out`.

    Raises:
        MMAccelError: the folder cannot be written.
    """
    start = time.perf_counter()
    folder = writable_folder(out)
    from mmaccel import measure
    from mmaccel.cli.models import load
    from mmaccel.cli.report_page import write_page

    loaded = load(None)
    specs = settings(loaded.model)
    first = _clip(folder, 0)
    with terminal.progress() as progress:
        times = _first_token(loaded, first, specs, _TIMING_SHARE * seconds, _bar(progress, "time to first token"))
        bar = progress.add_task("clips", total=clips)
        evaluation = measure.evaluate(
            loaded.model,
            loaded.processor,
            _cases(folder, first, clips, start + seconds),
            specs,
            batch=BATCH,
            progress=lambda done: progress.update(bar, completed=done),
        )
    environment = measure.environment()
    rows = _rows(evaluation.rows(), times)
    pareto = _plot(rows, folder / "pareto.png")
    question = first.questions[0].text
    facts = {
        "label": loaded.label, "frames": len(first.video), "keeps": KEEPS, "repeats": times["dense"].total.n,
        "clips": rows[0]["clips"], "questions": rows[0]["n"], "seconds": time.perf_counter() - start, **environment,
    }  # fmt: skip
    page = write_page(folder / "report.html", rows, facts, pareto, _strips(loaded, first, question, specs), first.path)
    terminal.show(
        _table(rows, facts),
        f"Report: {page}\nPlot:   {pareto}\nTry:    mmaccel ask {first.path} {question!r} --compare",
    )
    terminal.finish({"report": page, "plot": pareto, "clips": folder / "clips", "settings": facts, "rows": rows})


def settings(model: Any) -> list[str]:
    """Spec strings of all methods with a token budget that fit the model and need no more, at each of `KEEPS`."""
    from mmaccel.api import explain
    from mmaccel.method import registry

    fitting = explain(model).touches
    names = [
        name
        for name, cls in registry().items()
        if name in fitting and hasattr(cls, "keep") and "codec signals" not in cls.info.needs
    ]
    return [f"{name}:keep={keep:g}" for name in names for keep in KEEPS]


def writable_folder(out: Path) -> Path:
    """The folder, with one for clips in it. Raises MMAccelError where nothing can be written."""
    probe = out / ".probe"
    try:
        (out / "clips").mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MMAccelError(f"{out} cannot be written ({error.strerror}); choose another folder with --out.") from error
    return out


def _clip(folder: Path, number: int) -> _Seen:
    """Render a held-out clip, encode it and read it back, as any user's video would be."""
    from mmaccel.codecs import load_video
    from mmaccel.tiny.world import FRAMES, encode, sample_clip, sample_questions

    clip = sample_clip(FIRST + number, "held-out")
    path = folder / "clips" / f"clip-{number:03}.mp4"
    encode(clip, path)
    start = time.perf_counter()
    video = load_video(path, frames=FRAMES)
    return _Seen(path, video, sample_questions(clip), time.perf_counter() - start)


def _cases(folder: Path, first: _Seen, clips: int, deadline: float) -> Iterator[Case]:
    """Clips until there are enough, or until another batch would end behind the deadline."""
    from mmaccel.measure import Case

    began, longest = time.perf_counter(), 0.0
    for number in range(clips):
        if number and number % BATCH == 0:
            now = time.perf_counter()
            longest = max(longest, now - began)
            began = now
            if now + longest > deadline:
                return
        seen = _clip(folder, number) if number else first
        yield Case(seen.video.numpy(), [(q.text, q.answer, q.kind) for q in seen.questions])


def _first_token(
    loaded: Loaded, seen: _Seen, specs: Sequence[str], seconds: float, progress: Callable[[int, int], None]
) -> dict[str, StageTimes]:
    """Time to first token of all settings in turn, as often as the time allows."""
    from mmaccel.cli.ask import chat_inputs
    from mmaccel.measure import compare, ttft

    inputs = chat_inputs(loaded, seen.video, seen.questions[0].text)
    # The first call is the warm-up of the whole process, the second tells what a round of all settings will take.
    once = ttft(loaded.model, inputs, repeats=1, warmup=1).total.median * (1 + len(specs))
    rounds = min(8, max(1, int(seconds / once)))
    warmup = 1 if rounds > 2 else 0
    return compare(
        loaded.model, inputs, specs, repeats=rounds - warmup, warmup=warmup, before={"decode": seen.seconds},
        progress=progress,
    )  # fmt: skip


def _bar(progress: Any, name: str) -> Callable[[int, int], None]:
    bar = progress.add_task(name, total=None)
    return lambda done, total: progress.update(bar, completed=done, total=total)


def _rows(rows: list[dict[str, Any]], times: dict[str, StageTimes]) -> list[dict[str, Any]]:
    """Quality and time of each setting in one row, with ratios to the dense model."""
    dense = rows[0]
    merged = []
    for row in rows:
        spent = times[row["spec"]].as_dict()
        ratio = spent["total"]["median"] / times["dense"].total.median
        merged.append({**row, "flops_ratio": row["flops"] / dense["flops"], "ttft": spent, "ttft_ratio": ratio})
    return merged


def _plot(rows: list[dict[str, Any]], path: Path) -> Path:
    from mmaccel.measure import Point, pareto_plot
    from mmaccel.method import registry

    points = []
    for row in rows:
        name, accuracy = row["spec"].partition(":")[0], row["accuracy"]
        baseline = name != "dense" and registry()[name].info.baseline
        interval = accuracy["value"], accuracy["low"], accuracy["high"]
        points.append(Point(name, row["flops"] / 1e9, *interval, baseline=baseline))
    return pareto_plot(
        points, path, x="GFLOP a question: vision tower, prefill, own work", y="accuracy",
        title=f"Accuracy against cost, keep {' and '.join(f'{keep:g}' for keep in KEEPS)}", source="embedded model",
        percent=True,
    )  # fmt: skip


def _strips(loaded: Loaded, seen: _Seen, question: str, specs: Sequence[str]) -> list[tuple[str, str, Any]]:
    """For each method at the larger budget: spec, a caption, and the frames with what was dropped darkened."""
    from mmaccel.api import accelerate
    from mmaccel.cli.ask import chat_inputs
    from mmaccel.cli.overlay import kept_cells, strip
    from mmaccel.measure.stages import first_token

    inputs = chat_inputs(loaded, seen.video, question)
    frames = seen.video.numpy()
    found = [("dense", "all tokens", strip(frames, None))]
    for spec in specs:
        if not spec.endswith(f"keep={KEEPS[0]:g}"):
            continue
        with accelerate(loaded.model, spec) as handle:
            first_token(loaded.model, inputs)
            # a method that works twice is shown where it works first: that is what the language model gets
            method, place = next(iter(handle.report().tokens))
            kept = handle.report().kept(method, place)[0]
        cells = kept_cells(inputs["input_ids"][0], loaded.model.config.video_token_id, kept, len(frames))
        picture = strip(frames, cells, shrunk=method == "fewer-pixels")
        found.append((spec, f"{int(cells.sum())} of {cells.size} tokens, {place}", picture))
    return found


def _table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> Table:
    from rich.table import Table

    from mmaccel.cli.report_page import cells

    table = Table(
        title=f"{facts['clips']} held-out clips, {facts['questions']} questions, {facts['frames']} frames each",
        caption=f"{facts['label']}; 95 % intervals over clips; times of this run, {facts['repeats']} repeats",
    )
    for heading in ("setting", "accuracy, %", "to dense", "same answer", "tokens", "FLOPs", "first token", "ratio"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in cells(row)))
    return table

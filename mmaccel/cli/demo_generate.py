"""mmaccel demo generate: the embedded text-to-video model, dense beside the methods for diffusion transformers."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.table import Table

    from mmaccel.cli.pipelines import Made, Pipeline
    from mmaccel.cli.terminal import Terminal
    from mmaccel.tiny.stories import Story

__all__ = ["SPECS", "panels", "run", "settings"]

SPECS = (
    "hsa:runtime=0.5",
    "hsa:runtime=0.25",
    "fewer-steps:keep=0.5",
    "fewer-steps:keep=0.25",
    "first-block-cache:threshold=0.05",
    "seacache",
    "taylorseer",
    "magcache",
    "pab",
)
# Held-out stories that neither the committed scores nor the test-suite have looked at.
FIRST = 530_000
_SCALE, _BAR, _ROW = 3, 14, 5


@dataclass
class _Setting:
    """One way of generating, on a pipeline of its own, and what it has made so far."""

    name: str
    pipeline: Pipeline
    report: Any = None
    made: list[Made] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    right: float = 0.0
    questions: int = 0


def settings() -> list[str]:
    """The specs of `SPECS` whose method there is."""
    from mmaccel.method import registry

    return [spec for spec in SPECS if spec.partition(":")[0] in registry()]


def run(terminal: Terminal, out: Path, *, specs: Sequence[str], clips: int, steps: int | None, seconds: float) -> None:
    """Generate clips with every setting in turn, print the table and write them side by side to `out`.

    Raises:
        MMAccelError: the folder cannot be written, or a method does not work with this model or number of steps.
    """
    start = time.perf_counter()
    from mmaccel.api import accelerate
    from mmaccel.cli.demo import writable_folder
    from mmaccel.cli.pipelines import Request, load_pipeline, measured, save, warm
    from mmaccel.compose import arrange, normalise
    from mmaccel.tiny import VIDEO_CALL, video_qa
    from mmaccel.tiny.stories import sample_story

    methods = [arrange(normalise([spec])) for spec in specs or settings()]
    folder = writable_folder(out) / "clips"
    files = []
    with ExitStack() as stack, terminal.progress() as progress:
        # a pipeline each, so that methods stay on and what they measured in their first call stays known
        ways = [_Setting("dense", load_pipeline(None))]
        for some in methods:
            way = _Setting("+".join(method.spec for method in some), load_pipeline(None))
            way.report = stack.enter_context(accelerate(way.pipeline.pipe, some)).report()
            ways.append(way)
        judge = video_qa()
        began = time.perf_counter()
        bar = progress.add_task("warming up", total=len(ways))
        for way in ways:
            warm(way.pipeline, Request(str(sample_story(FIRST)), steps=steps), whole=True)
            progress.update(bar, advance=1)
        longest = time.perf_counter() - began
        bar = progress.add_task("clips", total=clips)
        for number in range(clips):
            began = time.perf_counter()
            if number and began + longest > start + seconds:
                break
            story = sample_story(FIRST + number)
            request = Request(str(story), seed=number, steps=steps)
            for way in ways:
                way.made.append(measured(way.pipeline, request))
                _judge(way, ways[0], story, judge)
            picture = panels([way.name for way in ways], [way.made[-1].frames for way in ways])
            files.append(save(folder / f"generated-{number:03}.mp4", picture, video=True, fps=ways[0].pipeline.fps))
            longest = max(longest, time.perf_counter() - began)
            progress.update(bar, completed=number + 1)
    rows = [_row(way, ways[0]) for way in ways]
    prompt = str(sample_story(FIRST))
    facts = {
        "label": ways[0].pipeline.label, "clips": len(files), "questions": ways[0].questions,
        "steps": steps or VIDEO_CALL["num_inference_steps"], "seconds": time.perf_counter() - start,
    }  # fmt: skip
    best = ways[1].name if len(ways) > 1 else "hsa:runtime=0.5"
    terminal.show(
        _table(rows, facts),
        f"Clips: {files[0]} and on\nTry:   mmaccel generate {prompt!r} --compare --method {best!r}",
    )
    terminal.finish({"clips": files, "settings": facts, "rows": rows})


def _judge(way: _Setting, dense: _Setting, story: Story, judge: tuple[Any, Any]) -> None:
    """Compare the newest clip with the dense one, and have the video-QA model read its prompt back."""
    from mmaccel.tiny.read_back import feature_distance, psnr, read_back

    frames = way.made[-1].frames
    if way is not dense:
        way.psnr.append(psnr(frames, dense.made[-1].frames))
        way.distance.append(feature_distance(*judge, frames, dense.made[-1].frames))
    found = read_back(*judge, [frames], [story])
    asked = sum(kind["questions"] for kind in found["by_kind"].values())
    way.whole.append(found["whole"] == 1)
    way.right += found["answers"] * asked
    way.questions += asked


def _row(way: _Setting, dense: _Setting) -> dict[str, Any]:
    pairs = list(zip(way.made, dense.made, strict=True))
    stages = {name: float(np.median([made.stages[name] for made in way.made])) for name in way.made[0].stages}
    growth = [made.growth for made in way.made if made.growth is not None]
    finite = [value for value in way.psnr if np.isfinite(value)]
    return {
        "setting": way.name,
        "seconds": float(np.median([made.seconds for made in way.made])),
        "stages": stages,
        "transformer_ratio": float(np.median([a.stages["transformer"] / b.stages["transformer"] for a, b in pairs])),
        "ratio": float(np.median([a.seconds / b.seconds for a, b in pairs])),
        # clips that are equal to the dense ones have no PSNR, and are counted instead
        "psnr": float(np.mean(finite)) if finite else None,
        "identical": len(way.psnr) - len(finite),
        "feature_distance": float(np.mean(way.distance)) if way.distance else None,
        "answers": way.right / way.questions,
        "whole": float(np.mean(way.whole)),
        "growth_bytes": max(growth) if growth else None,
        "report": None if way.report is None else way.report.as_dict(),
    }


def _table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{facts['clips']} held-out prompts, {facts['questions']} questions about their clips, "
        f"{facts['steps']} steps",
        caption=Text(
            f"{facts['label']}; medians of this run; read-back: right answers of the embedded video-QA model, "
            "and clips with all of them right; memory: what a call adds at its peak"
        ),
    )
    for heading in (
        "setting", "transformer", "ratio", "text + vae", "whole call", "PSNR, dB", "feature distance", "read-back, %",
        "whole, %", "memory",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for row in rows:
        stages, growth, dense = row["stages"], row["growth_bytes"], row["feature_distance"] is None
        psnr = "same" if row["psnr"] is None else f"{row['psnr']:.1f}"
        table.add_row(
            Text(row["setting"]), f"{stages['transformer']:.2f} s", f"{row['transformer_ratio']:.2f}",
            f"{stages['text encoder'] + stages['vae']:.2f} s", f"{row['ratio']:.2f}", "-" if dense else psnr,
            "-" if dense else f"{row['feature_distance']:.4f}", f"{100 * row['answers']:.1f}",
            f"{100 * row['whole']:.0f}", "-" if growth is None else f"{growth / 1e6:.0f} MB",
        )  # fmt: skip
    return table


def panels(names: Sequence[str], clips: Sequence[np.ndarray]) -> np.ndarray:
    """Clips uint8 [T, H, W, 3] at three times their size under their names, five a row, uint8 [T, H', W', 3]."""
    from PIL import Image, ImageDraw

    count, height, width, _ = clips[0].shape
    row = min(_ROW, len(clips))
    rows = -(-len(clips) // row)
    tall, wide = height * _SCALE + _BAR, width * _SCALE
    canvas = np.full((count, rows * tall, row * wide, 3), 255, dtype=np.uint8)
    for number, (name, frames) in enumerate(zip(names, clips, strict=True)):
        top, left = number // row * tall, number % row * wide
        label = Image.new("RGB", (wide, _BAR), "white")
        ImageDraw.Draw(label).text((2, 1), name, fill="black")
        canvas[:, top : top + _BAR, left : left + wide] = np.asarray(label)
        large = frames.repeat(_SCALE, axis=1).repeat(_SCALE, axis=2)
        canvas[:, top + _BAR : top + tall, left : left + wide] = large
    return canvas

"""mmaccel generate: a clip or an image of a prompt, dense, accelerated, or both side by side."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmaccel.errors import MMAccelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from rich.table import Table

    from mmaccel.cli.pipelines import Made, Pipeline
    from mmaccel.cli.terminal import Terminal

__all__ = ["DEFAULT", "beside", "run", "size"]

DEFAULT = "hsa:runtime=0.5"


def run(
    terminal: Terminal,
    prompt: str,
    *,
    source: str | None,
    specs: Sequence[str],
    both: bool,
    out: Path | None,
    seed: int,
    steps: int | None,
    guidance: float | None,
    sides: tuple[int | None, int | None],
    frames: int | None,
    fps: float | None,
    dtype: str | None,
    device: str | None,
) -> None:
    """Generate, write the file, and show what it took. `sides` are height and width.

    Raises:
        MMAccelError: the prompt, the model, a method or the file will not do; what is cheap is checked first.
    """
    embedded = source in (None, "tiny")
    if not prompt.strip():
        raise MMAccelError("the prompt is empty.")
    if embedded:
        from mmaccel.tiny.stories import parse

        prompt = str(parse(prompt))
    calibrations = _calibrations(specs)
    methods = _methods([calibrations.get(spec, spec) for spec in specs], both)
    _check_folder(out or Path("clip"))

    from mmaccel.cli.pipelines import Request, load_pipeline, make, save

    pipeline = load_pipeline(source, dtype=dtype, device=device)
    path = _file(out, pipeline.video)
    height, width = sides
    request = Request(prompt, seed, steps, guidance, height, width, frames)
    count = request.arguments(pipeline).get("num_inference_steps")
    _check_fit(pipeline, methods)
    for calibration in calibrations.values():
        calibration.method_for(pipeline.pipe, steps=count)

    from mmaccel.measure.calibrated import label

    stack = "+".join(map(label, methods))
    wanted = ([("dense", [])] if both or not methods else []) + ([(stack, methods)] if methods else [])
    runs: dict[str, Made] = {}
    with terminal.progress() as progress:
        bar = progress.add_task("generating", total=len(wanted))
        for name, some in wanted:
            runs[name] = make(pipeline, request, some)
            progress.update(bar, advance=1)
    rate = fps or pipeline.fps
    save(path, beside([made.frames for made in runs.values()]), video=pipeline.video, fps=rate)

    distance = _distance(runs, stack) if both else None
    terminal.show(_table(pipeline, runs, prompt), *_reports(runs), *_remarks(runs, stack, distance, path))
    first = next(iter(runs.values())).frames
    terminal.finish(
        {
            "model": "embedded" if embedded else source, "label": pipeline.label, "prompt": prompt, "seed": seed,
            "methods": [method.spec for method in methods], "file": path,
            "kind": "video" if pipeline.video else "image",
            "from_left": list(runs), "frames": len(first), "height": first.shape[1], "width": first.shape[2],
            "fps": rate if pipeline.video else None, "psnr": None if distance is None else distance["psnr"],
            "identical": None if distance is None else distance["identical"],
            "runs": [{"setting": name, **made.as_dict()} for name, made in runs.items()],
        }
    )  # fmt: skip


def size(text: str | None, height: int | None, width: int | None) -> tuple[int | None, int | None]:
    """Height and width from `--size`, or from the two options of their own.

    Raises:
        MMAccelError: both are given, or `--size` is neither a number nor HEIGHTxWIDTH.
    """
    if text is None:
        return height, width
    if height or width:
        raise MMAccelError("--size says what --height and --width say; give one or the other.")
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text.strip().lower())
    if not match:
        raise MMAccelError(f"--size {text}: write HEIGHTxWIDTH, such as 480x832, or one number for a square.")
    return int(match[1]), int(match[2] or match[1])


def beside(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Clips uint8 [T, H, W, 3] of one shape next to each other, [T, H, N * W, 3]."""
    import numpy as np

    return np.concatenate(list(parts), axis=2)


def _calibrations(specs: Sequence[str]) -> dict[str, Any]:
    from mmaccel.measure.calibrated import Calibration

    return {spec: Calibration.load(spec) for spec in specs if spec.endswith(".json")}


def _methods(specs: Sequence[Any], both: bool) -> list[Any]:
    from mmaccel.compose import arrange, check, normalise

    specs = [getattr(spec, "method", spec) for spec in specs]
    wanted = list(specs) or ([DEFAULT] if both else [])
    methods = arrange(normalise(wanted)) if wanted else []
    check(methods, [])
    return methods


def _check_fit(pipeline: Pipeline, methods: Sequence[Any]) -> None:
    from mmaccel.api import plan
    from mmaccel.targets import resolve

    target = resolve(pipeline.pipe)
    for method in methods:
        plan(method, target)


def _check_folder(out: Path) -> None:
    if out.is_dir():
        raise MMAccelError(f"--out {out} is a folder; name a file such as {out / 'clip.mp4'}.")
    if not os.access(out.parent, os.W_OK):
        raise MMAccelError(f"--out {out}: there is no folder {out.parent} that can be written.")


def _file(out: Path | None, video: bool) -> Path:
    suffix = ".mp4" if video else ".png"
    if out is None:
        return Path(f"mmaccel-generated{suffix}")
    if out.suffix.lower() != suffix:
        raise MMAccelError(f"--out {out}: this model makes {'videos' if video else 'images'}; name a {suffix} file.")
    return out


def _distance(runs: dict[str, Made], stack: str) -> dict[str, Any]:
    from mmaccel.tiny.read_back import psnr

    value = psnr(runs[stack].frames, runs["dense"].frames)
    same = value == float("inf")
    return {"psnr": None if same else value, "identical": same}


def _table(pipeline: Pipeline, runs: dict[str, Made], prompt: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    first = next(iter(runs.values()))
    count, height, width, _ = first.frames.shape
    what = f"{count} frames of {height} x {width}" if pipeline.video else f"{height} x {width}"
    table = Table(title=Text(prompt), caption=Text(f"{pipeline.label}; {what}; one call each, behind one to warm up"))
    for heading in ("setting", *first.stages, "whole call", "peak memory"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for name, made in runs.items():
        cells = [*map(_seconds, made.stages.values()), _seconds(made.seconds)]
        table.add_row(Text(name), *cells, "-" if made.peak is None else f"{made.peak / 1e9:.2f} GB")
    return table


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _reports(runs: dict[str, Made]) -> list[Any]:
    return [made.report.table() for made in runs.values() if made.report is not None]


def _remarks(runs: dict[str, Made], stack: str, distance: dict[str, Any] | None, path: Path) -> list[str]:
    remarks = ["The report counts the call to warm up as well."] if stack else []
    if distance is not None:
        dense, fast = runs["dense"], runs[stack]
        alike = "the same pictures" if distance["identical"] else f"PSNR {distance['psnr']:.1f} dB to the dense result"
        remarks.append(
            f"{alike}; transformer {fast.stages['transformer'] / dense.stages['transformer']:.2f} of the dense time, "
            f"whole call {fast.seconds / dense.seconds:.2f}"
        )
    order = f" (from the left: {', '.join(runs)})" if len(runs) > 1 else ""
    return [*remarks, f"Written: {path}{order}"]

"""mmaccel calibrate: which method, and which setting of it, suits a checkpoint; written to a file for generate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmaccel.errors import MMAccelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmaccel.cli.terminal import Terminal

__all__ = ["read_prompts", "run"]

# Held-out stories that no committed score has looked at.
_FIRST, _STORIES = 540_000, 2


def run(
    terminal: Terminal,
    prompts: Sequence[str],
    *,
    source: str | None,
    runtime: float,
    specs: Sequence[str],
    out: Path,
    everything: bool,
    seed: int,
    steps: int | None,
    guidance: float | None,
    sides: tuple[int | None, int | None],
    frames: int | None,
    dtype: str | None,
    device: str | None,
) -> None:
    """Calibrate, write the file, and show what was tried. `sides` are height and width.

    Raises:
        MMAccelError: the prompts, the model, a method or the file will not do; what is cheap is checked first.
    """
    embedded = source in (None, "tiny")
    texts = read_prompts(prompts)
    if embedded:
        from mmaccel.tiny.stories import parse, sample_story

        texts = [str(parse(text)) for text in texts] or [str(sample_story(_FIRST + n)) for n in range(_STORIES)]
    if not texts:
        raise MMAccelError("no prompts given; a few like those you will use: --prompts TEXT or --prompts FILE.")
    _check_file(out)

    from mmaccel.cli.pipelines import Request, load_pipeline, refusals
    from mmaccel.measure.calibration import calibrate, checked_runtime, wanted_methods

    runtime, methods = checked_runtime(runtime), wanted_methods(list(specs) or None)
    pipeline = load_pipeline(source, dtype=dtype, device=device)
    height, width = sides
    found = [Request(text, seed, steps, guidance, height, width, frames).arguments(pipeline) for text in texts]
    what = "prompt" if "prompt" in found[0] else "class_labels"
    given = [one[what] if what == "prompt" else int(one[what][0]) for one in found]
    arguments = {name: value for name, value in found[0].items() if name not in (what, "output_type")}
    count = arguments.pop("num_inference_steps", None)
    with terminal.progress() as progress, refusals(pipeline.label):
        bar = progress.add_task("dense", total=None)
        result = calibrate(
            pipeline.pipe, given, runtime, methods, count, seed,
            progress=lambda one: progress.update(bar, advance=1, description=one.method.info.name), **arguments,
        )  # fmt: skip
    result.save(out)
    again = f" --model {source}" if not embedded else ""
    terminal.show(
        result.table(everything=everything),
        f"Written: {out}\nTry:     mmaccel generate {texts[0]!r}{again} --compare --method {out}",
    )
    document: dict[str, Any] = result.as_dict()
    terminal.finish({"model": "embedded" if embedded else source, "prompts": texts, "file": out, **document})


def read_prompts(given: Sequence[str]) -> list[str]:
    """Prompts, and the lines of files where one of that name exists; empty lines are left out.

    Raises:
        MMAccelError: a file holds no prompt, or is no text.
    """
    found: list[str] = []
    for entry in given:
        if not entry.strip():
            raise MMAccelError("a prompt is empty.")
        path = Path(entry)
        if not _is_file(path):
            if path.suffix == ".txt":
                raise MMAccelError(f"--prompts {entry}: there is no such file.")
            found.append(entry)
            continue
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise MMAccelError(f"--prompts {entry} cannot be read as text ({error}).") from error
        if not any(lines):
            raise MMAccelError(f"--prompts {entry} holds no prompt; write one a line.")
        found += filter(None, lines)
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a prompt may be too long for a name of a file
        return False


def _check_file(out: Path) -> None:
    if out.is_dir():
        raise MMAccelError(f"--out {out} is a folder; name a file such as {out / 'calibration.json'}.")
    if out.suffix != ".json":
        raise MMAccelError(f"--out {out}: name a .json file.")
    if not os.access(out.parent, os.W_OK):
        raise MMAccelError(f"--out {out}: there is no folder {out.parent} that can be written.")

"""report.html: one file with everything in it."""

from __future__ import annotations

import base64
import html
import io
from string import Template
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL.Image import Image

__all__ = ["cells", "write_page"]

_HEADINGS = (
    "setting", "accuracy, % [95 % interval]", "against dense, points", "same answer as dense",
    "visual tokens, first / last layer", "FLOPs", "time to first token", "ratio to dense",
)  # fmt: skip

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mmaccel demo</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem; margin: 2rem auto;
         padding: 0 1rem; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  .wide { overflow-x: auto; }
  th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
  th { vertical-align: bottom; white-space: normal; }
  th:first-child, td:first-child { text-align: left; }
  tr.baseline td:first-child::after { content: " baseline"; color: #777; font-size: .8em; }
  img { max-width: 100%; height: auto; }
  figure { margin: 0 0 1rem; }
  figcaption, .note { color: #555; font-size: .9em; }
  .label { background: #fff3cd; border-left: 4px solid #e0a800; padding: .5rem 1rem; }
  code { background: #f4f4f4; padding: 0 .2em; }
</style>
</head>
<body>
<h1>mmaccel demo</h1>
<p class="label"><b>$label.</b> Its figures compare methods with each other; they say nothing about the accuracy of a
real checkpoint on real video. Its vision tower was trained to attend to objects, which shows methods that read
attention at their best.</p>
<p>$clips held-out clips, rendered, encoded as H.264 files, and read back with $frames frames each; $questions questions
with one-word answers. Budgets: keep $keeps. The run took $seconds s.</p>
<div class="wide">
<table>
<thead><tr>$headings</tr></thead>
<tbody>
$rows
</tbody>
</table>
</div>
<p class="note">Intervals are bootstrap intervals that draw whole clips. "Against dense" is paired: both answered the
same questions. FLOPs count vision tower and prefill in closed form and the method's own scoring and merging, two for a
multiply-accumulate. Time to first token is the median of $repeats calls, settings in turn, batch 1, reading the video
included. The vision tower takes most of it on this model, and only the baselines that shrink the input save there.</p>
<h2>Accuracy against cost</h2>
<figure><img alt="Pareto plot" src="$pareto"></figure>
<h2>What is kept</h2>
<p class="note">One clip ($clip) at the larger budget. Dark cells were dropped, or merged into a cell that is left;
fewer-pixels sees the frames in this smaller size.</p>
$strips
<h2>Machine</h2>
<p>$machine</p>
<p class="note">$versions</p>
</body>
</html>
""")


def write_page(
    path: Path,
    rows: Sequence[dict[str, Any]],
    facts: dict[str, Any],
    pareto: Path,
    strips: Sequence[tuple[str, str, Image]],
    clip: Path,
) -> Path:
    """Write the page and return its path.

    rows: as the demo prints them. facts: label, counts, budgets, machine and versions. strips: spec, caption and
    picture of each.
    """
    from mmaccel.method import registry

    baselines = {name for name, cls in registry().items() if cls.info.baseline}
    body = []
    for row in rows:
        mark = ' class="baseline"' if row["spec"].partition(":")[0] in baselines else ""
        body.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)) + "</tr>")
    figures = [
        f"<figure><figcaption><code>{html.escape(spec)}</code> {html.escape(caption)}</figcaption>"
        f'<img alt="{html.escape(spec)}" src="{_picture(image)}"></figure>'
        for spec, caption, image in strips
    ]
    page = _PAGE.substitute(
        label=html.escape(facts["label"].capitalize()),
        clips=facts["clips"],
        frames=facts["frames"],
        questions=facts["questions"],
        keeps=" and ".join(f"{keep:g}" for keep in facts["keeps"]),
        seconds=f"{facts['seconds']:.0f}",
        headings="".join(f"<th>{html.escape(heading)}</th>" for heading in _HEADINGS),
        rows="\n".join(body),
        repeats=facts["repeats"],
        pareto=_data("image/png", pareto.read_bytes()),
        clip=html.escape(clip.name),
        strips="\n".join(figures),
        machine=html.escape(_listing(facts["machine"])),
        versions=html.escape(_listing(facts["versions"])),
    )
    path.write_text(page, encoding="utf-8")
    return path


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table as text: the terminal and the page show the same."""
    accuracy, difference = row["accuracy"], row["difference"]
    return [
        row["spec"],
        f"{accuracy['value'] * 100:.1f} [{accuracy['low'] * 100:.0f}, {accuracy['high'] * 100:.0f}]",
        f"{difference['value'] * 100:+.1f} [{difference['low'] * 100:+.0f}, {difference['high'] * 100:+.0f}]",
        f"{row['agreement']:.0%}",
        f"{row['tokens_out']:.0f} / {row['tokens_last']:.0f}",
        f"{row['flops'] / 1e9:.2f} G ({row['flops_ratio']:.0%})",
        f"{row['ttft']['total']['median'] * 1e3:.1f} ms",
        f"{row['ttft_ratio']:.2f}",
    ]


def _listing(values: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items() if value is not None)


def _picture(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return _data("image/jpeg", buffer.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

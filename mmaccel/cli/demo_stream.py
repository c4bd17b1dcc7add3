"""mmaccel demo stream: clips of the rendered world as one stream that does not end, asked about as it goes by."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from mmaccel.cli.terminal import Terminal
    from mmaccel.session import StreamSession
    from mmaccel.session.stream import OnEvict
    from mmaccel.tiny.world import Question

__all__ = ["run"]

# Held-out clips that neither the committed scores nor the test-suite have looked at.
FIRST = 520_000
_WORDS = 2
_MODES: dict[OnEvict, str] = {"rotate": "stream, keys turned", "rebuild": "stream, rebuilt"}


@dataclass
class _Setting:
    """What one way of reading has answered so far."""

    name: str
    session: StreamSession | None = None
    hits: list[bool] = field(default_factory=list)
    clips: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    most: int = 0

    def note(self, clip: int, asked: Sequence[Question], replies: Sequence[str]) -> None:
        """Count the answers to the questions about one clip."""
        self.hits += [question.answer == reply for question, reply in zip(asked, replies, strict=True)]
        self.clips += [clip] * len(asked)


def run(terminal: Terminal, *, specs: Sequence[str], clips: int, max_tokens: int | None, seconds: float) -> None:
    """Push the stream, ask at the end of each of its clips, and print the table.

    Raises:
        MMAccelError: a method does not work frame by frame, or the budget is below one frame.
    """
    deadline = time.perf_counter() + seconds
    from contextlib import ExitStack

    from mmaccel.cli.models import load
    from mmaccel.session import stream
    from mmaccel.tiny.scoring import answers
    from mmaccel.tiny.world import FRAMES, render, sample_clip, sample_questions

    # methods are on a model as long as a session is open, so the comparison has one of its own
    loaded, alone = load(None), load(None)
    budget = max_tokens or _one_clip(loaded, specs)
    dense = _Setting("each clip by itself")
    done, longest = 0, 0.0
    with ExitStack() as stack, terminal.progress() as progress:
        streams = [
            _Setting(name, stack.enter_context(stream(
                loaded.model, *specs, processor=loaded.processor, max_tokens=budget, on_evict=mode, slack=0
            )))
            for mode, name in _MODES.items()
        ]  # fmt: skip
        bar = progress.add_task("clips", total=clips)
        for number in range(clips):
            began = time.perf_counter()
            if number and began + longest > deadline:
                break
            clip = sample_clip(FIRST + number, "held-out")
            frames, asked = render(clip), sample_questions(clip)
            dense.note(number, asked, answers(alone.model, alone.processor, frames, [q.text for q in asked]))
            for setting in streams:
                setting.note(number, asked, _seen(setting, frames, asked))
            longest, done = max(longest, time.perf_counter() - began), number + 1
            progress.update(bar, completed=done)
    rows = [_row(setting, dense) for setting in (dense, *streams)]
    facts = {
        "label": loaded.label, "clips": done, "frames": done * FRAMES, "questions": len(dense.hits),
        "methods": list(specs), "max_tokens": budget,
    }  # fmt: skip
    terminal.show(_table(rows, facts, "+".join(specs) or "no method"), _remark(rows))
    terminal.finish({"settings": facts, "rows": rows})


def _one_clip(loaded: Any, specs: Sequence[str]) -> int:
    """Visual tokens that the methods leave of one clip: a budget that holds the clip of the questions and no more."""
    from mmaccel.session import stream
    from mmaccel.tiny.world import render, sample_clip

    with stream(loaded.model, *specs, processor=loaded.processor) as session:
        session.follow(render(sample_clip(FIRST, "held-out")))
        return session.stats().held


def _seen(setting: _Setting, frames: Any, asked: Sequence[Question]) -> list[str]:
    session = setting.session
    assert session is not None
    session.follow(frames)
    setting.most = max(setting.most, session.stats().held)
    found = [session.ask(question.text, max_new_tokens=_WORDS) for question in asked]
    setting.seconds += [answer.seconds for answer in found]
    return [answer.text for answer in found]


def _row(setting: _Setting, dense: _Setting) -> dict[str, Any]:
    from mmaccel.measure.quality import bootstrap_difference, bootstrap_mean

    hits, groups = [float(hit) for hit in setting.hits], setting.clips
    row: dict[str, Any] = {"setting": setting.name, "accuracy": bootstrap_mean(hits, groups).as_dict()}
    if setting.session is not None:
        reference = [float(hit) for hit in dense.hits]
        row["difference"] = bootstrap_difference(hits, reference, groups).as_dict()
        row["answer_seconds"] = sorted(setting.seconds)[len(setting.seconds) // 2]
        row |= setting.session.stats().as_dict() | {"most_held": setting.most}
    return row


def _table(rows: list[dict[str, Any]], facts: dict[str, Any], methods: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(f"{facts['frames']} frames as one stream, {facts['questions']} questions along it, {methods}"),
        caption=Text(f"{facts['label']}; 95 % intervals over {facts['clips']} clips; times of this run"),
    )
    for heading in (
        "reading", "accuracy, %", "to each clip", "tokens held", "cache", "a frame, median", "99 % below", "an answer",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "reading" else "right")
    for row in rows:
        cells = [row["setting"], _percent(row["accuracy"], "")]
        if "difference" in row:
            push = row["push_seconds"]
            cells += [
                _percent(row["difference"], "+"), f"{row['held']}", f"{row['cache_bytes'] / 1e6:.1f} MB",
                *(f"{value * 1e3:.1f} ms" for value in (push["median"], push["p99"], row["answer_seconds"])),
            ]  # fmt: skip
        table.add_row(*map(Text, cells))
    return table


def _percent(interval: dict[str, float], sign: str) -> str:
    value, low, high = (100 * interval[name] for name in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.0f}, {high:{sign}.0f}]"


def _remark(rows: list[dict[str, Any]]) -> str:
    turned, rebuilt = rows[1:]
    cost = rebuilt["push_seconds"]["median"] / turned["push_seconds"]["median"]
    return (
        f"Rebuilding reads what is left anew for each frame, in {cost:.1f} times the time of turning its keys; what "
        "turned keys still know of earlier clips is what their accuracy differs by."
    )

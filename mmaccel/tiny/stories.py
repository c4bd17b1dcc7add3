"""The prompt language of the tiny world: one or two sentences, the clips that show them, and what can be asked.

A prompt is one clause or two: `a red ring moves left`, `a red ring moves left and a blue cross stays still` (both are
there from the start), `a red ring moves left , then a blue cross moves up` (the second appears later). The clip of a
story is a clip of `mmaccel.tiny.world` whose objects stay in the middle `WINDOW` x `WINDOW` pixels, on a calm ground.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmaccel.errors import VocabularyError
from mmaccel.tiny.world import (
    COLORS,
    DIRECTIONS,
    SHAPES,
    SIZE,
    Clip,
    Thing,
    apart,
    coverage,
    frame_times,
    shade_of,
    texture,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "FRAMES",
    "LINKS",
    "PROMPT_WORDS",
    "SPLITS",
    "WINDOW",
    "Clause",
    "Story",
    "framed",
    "parse",
    "render_story",
    "sample_story",
    "stage",
    "unseen",
]

WINDOW = 64
FRAMES = 21
GROUND = 105
LINKS = ("and", "then")
SPLITS: dict[str, int] = {"train": 11, "held-out": 12}
PROMPT_WORDS = ("a", "moves", "stays", ",", *LINKS, *COLORS, *SHAPES, *DIRECTIONS)
_CLAUSE = re.compile(
    rf"a ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) "
    rf"(?:moves ({'|'.join(way for way in DIRECTIONS if way != 'still')})|stays (still))"
)


@dataclass(frozen=True)
class Clause:
    """One object and what it does."""

    color: str
    shape: str
    direction: str

    def __str__(self) -> str:
        verb = "stays" if self.direction == "still" else "moves"
        return f"a {self.color} {self.shape} {verb} {self.direction}"


@dataclass(frozen=True)
class Story:
    """One clause, or two with a link: `and` (together) or `then` (the second object appears later)."""

    clauses: tuple[Clause, ...]
    link: str = "and"

    def __str__(self) -> str:
        return (" , then " if self.link == "then" else " and ").join(map(str, self.clauses))


def parse(prompt: str) -> Story:
    """Read a prompt of the language; case and spaces around the comma do not matter.

    Raises `VocabularyError` for anything that the trained text-to-video model was never shown.
    """
    text = " ".join(prompt.lower().replace(",", " , ").split())
    pieces = re.split(r" (and|, then) ", text)
    matches = [_CLAUSE.fullmatch(piece) for piece in pieces[::2]]
    found = tuple(Clause(m[1], m[2], m[3] or m[4]) for m in matches if m)
    if len(found) < len(matches) or len(found) > 2 or len({clause.color for clause in found}) < len(found):
        raise VocabularyError(
            f"the embedded text-to-video model was not taught {prompt!r}; write one or two clauses of different colors,"
            " such as 'a red ring moves left and a blue cross stays still' or 'a white square moves up , then a green"
            f" triangle moves right' ({', '.join(COLORS)}; {', '.join(SHAPES)}; {', '.join(DIRECTIONS)})"
        )
    return Story(found, "then" if len(pieces) > 1 and pieces[1] != "and" else "and")


def unseen(clause: Clause) -> bool:
    """Whether a combination of color, shape and direction is kept out of training: 24 of the 120.

    Every color with every shape is among them once, and is trained with the four other directions.
    """
    places = (list(COLORS).index(clause.color), SHAPES.index(clause.shape), list(DIRECTIONS).index(clause.direction))
    return sum(places) % len(DIRECTIONS) == 0


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.random() * len(options))]


def sample_story(index: int, split: str = "held-out") -> Story:
    """Draw story number `index` of a split: a third one clause, a third `and`, a third `then`.

    No clause of the split `train` is `unseen`; every story of the split `held-out` has at least one that is.
    Raises `ValueError` for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    rng = np.random.Generator(np.random.PCG64([index, SPLITS[split]]))
    while True:
        kind = _choose(rng, ("one", *LINKS))
        clauses = tuple(
            Clause(_choose(rng, tuple(COLORS)), _choose(rng, SHAPES), _choose(rng, tuple(DIRECTIONS)))
            for _ in range(1 if kind == "one" else 2)
        )
        if len({clause.color for clause in clauses}) < len(clauses):
            continue
        if any(map(unseen, clauses)) == (split == "held-out"):
            return Story(clauses, "and" if kind == "one" else kind)


def _cast(rng: np.random.Generator, clause: Clause, start: float) -> Thing:
    radius = _uniform(rng, 8.0, 9.5)
    dx, dy = DIRECTIONS[clause.direction]
    lasting = 1.0 - max(start, 0.0)
    room = WINDOW - 2 * (radius + 1.0)
    path = _uniform(rng, 28.0, room) if start < 0 else _uniform(rng, 34.0, 46.0) * lasting
    low = (SIZE - WINDOW) / 2 + radius + 1.0
    x = low + _uniform(rng, 0.0, room - abs(dx) * path)
    y = low + _uniform(rng, 0.0, room - abs(dy) * path)
    speed = path / lasting
    return Thing(
        color=clause.color,
        shape=clause.shape,
        direction=clause.direction,
        rgb=shade_of(rng, clause.color),
        radius=radius,
        center=(x + path if dx < 0 else x, y + path if dy < 0 else y),
        velocity=(dx * speed, dy * speed),
        start=start,
        end=2.0,
    )


def stage(story: Story, seed: int) -> Clip:
    """A clip of the world that shows the story; another seed, other places, speeds, shades and ground.

    The second object of a `then` appears between two frames from the 8th to the 12th of the 21. Every question that
    `mmaccel.tiny.world.questions` finds in the clip is answered by the prompt, whatever the seed.
    """
    rng = np.random.Generator(np.random.PCG64([seed, 13]))
    while True:
        late = (7 + int(rng.random() * 5) - 0.5) / (FRAMES - 1)
        starts = (-1.0, late if story.link == "then" else -1.0)
        things = tuple(_cast(rng, clause, start) for clause, start in zip(story.clauses, starts, strict=False))
        if len(things) == 1 or apart(*things):
            return Clip(seed, things, (0, 0), False, 0.0)


def render_story(clip: Clip, frames: int = FRAMES) -> np.ndarray:
    """Draw `frames` evenly spaced frames of the window of a clip from `stage`: uint8 [frames, WINDOW, WINDOW, 3]."""
    rng = np.random.Generator(np.random.PCG64([clip.seed, 14]))
    edge = (SIZE - WINDOW) // 2
    window = slice(edge, edge + WINDOW)
    pictures = np.repeat((GROUND + texture(rng, (9, 9), 40.0))[None, window, window], frames, axis=0)
    for picture, time in zip(pictures, frame_times(frames), strict=True):
        for thing in clip.things:
            share = coverage(thing, time)[window, window, None]
            picture[:] = picture * (1.0 - share) + np.array(thing.rgb, dtype=np.float64) * share
    return np.clip(np.floor(pictures + 0.5), 0, 255).astype(np.uint8)


def framed(frames: np.ndarray) -> np.ndarray:
    """What the video-QA model is shown of a clip uint8 [T, WINDOW, WINDOW, 3]: uint8 [ceil(T / 4), SIZE, SIZE, 3].

    Every fourth frame (it was taught 4 to 8 frames of fast motion), in the middle of a gray picture: objects keep the
    size in pixels that it knows.
    """
    edge = (SIZE - WINDOW) // 2
    return np.pad(frames[::4], ((0, 0), (edge, edge), (edge, edge), (0, 0)), constant_values=GROUND)

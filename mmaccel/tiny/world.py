"""The tiny world: clips of small coloured shapes on a busy, partly drifting background, with questions about them.

A clip is a function of continuous time in [0, 1]: `render(clip, times)` draws any number of frames of it. Only
additions, multiplications and comparisons are used, so the same seed gives the same pixels on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = [
    "COLORS",
    "DIRECTIONS",
    "FRAMES",
    "KINDS",
    "SHAPES",
    "SIZE",
    "SPLITS",
    "Clip",
    "Question",
    "Thing",
    "apart",
    "coverage",
    "encode",
    "frame_times",
    "questions",
    "render",
    "sample_clip",
    "sample_crowd",
    "sample_questions",
    "shade_of",
    "texture",
]

SIZE = 128
FRAMES = 8
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (35, 165, 50),
    "blue": (45, 70, 225),
    "yellow": (235, 215, 40),
    "purple": (175, 45, 195),
    "white": (245, 245, 245),
}
SHAPES = ("ring", "square", "triangle", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
}
KINDS = ("color", "shape", "direction", "count", "order", "last")
SPLITS: dict[str, range] = {
    "train": range(1_000_000),
    "validation": range(1_000_000, 2_000_000),
    "held-out": range(2_000_000, 3_000_000),
}
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Thing:
    """One object: visible for `start <= t < end`, its centre on a straight line through `center` (pixels, at `start`).

    `velocity` is in pixels per unit of time (the clip lasts 1), `radius` in pixels, `rgb` its exact shade.
    """

    color: str
    shape: str
    direction: str
    rgb: tuple[int, int, int]
    radius: float
    center: tuple[float, float]
    velocity: tuple[float, float]
    start: float
    end: float

    def visible(self, time: float) -> bool:
        """Whether the object is drawn at this time."""
        return self.start <= time < self.end

    def at(self, time: float) -> tuple[float, float]:
        """The centre (x, y) in pixels at this time."""
        elapsed = time - max(self.start, 0.0)
        return self.center[0] + self.velocity[0] * elapsed, self.center[1] + self.velocity[1] * elapsed


@dataclass(frozen=True)
class Clip:
    """A clip: seed, objects, and a band `[low, high)` of rows or columns whose texture drifts by `drift` pixels."""

    seed: int
    things: tuple[Thing, ...]
    band: tuple[int, int]
    band_vertical: bool
    drift: float


@dataclass(frozen=True)
class Question:
    """A question with its one-word answer; `kind` is one of `KINDS`."""

    kind: str
    text: str
    answer: str


def frame_times(frames: int = FRAMES) -> tuple[float, ...]:
    """Evenly spaced times over the clip, the first 0 and the last 1 (a single frame is the first)."""
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    return tuple(k / (frames - 1) if frames > 1 else 0.0 for k in range(frames))


def _pick(rng: np.random.Generator, options: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
    # Generator.choice may change its stream between numpy versions; one uniform number does not.
    u = rng.random()
    if weights is None:
        return options[int(u * len(options))]
    total = sum(weights)
    for option, weight in zip(options, weights, strict=True):
        u -= weight / total
        if u < 0:
            return option
    return options[-1]


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def shade_of(rng: np.random.Generator, color: str) -> tuple[int, int, int]:
    """Draw an exact shade, RGB in 0..255, of a named color."""
    red, green, blue = (min(255, max(0, c + int(_between(rng, -10, 11)))) for c in COLORS[color])
    return red, green, blue


def _sample_thing(rng: np.random.Generator, color: str) -> Thing:
    last = FRAMES - 1
    # Half of the objects are seen in three or four of the eight frames: what is brief is what careless reduction loses.
    life = _pick(rng, ("brief", "late", "always"), (0.55, 0.25, 0.2))
    if life == "brief":
        length = _pick(rng, (3, 4))
        first = int(rng.random() * (FRAMES - length + 1))
    else:
        first = 0 if life == "always" else 1 + int(rng.random() * (FRAMES - 3))
        length = FRAMES - first
    # Half a frame before the first and after the last one: any sampling of about eight frames sees the same story.
    start = -1.0 if first == 0 else (first - 0.5) / last
    end = 2.0 if first + length == FRAMES else (first + length - 0.5) / last
    radius = _between(rng, 8.0, 10.0)
    direction = _pick(rng, tuple(DIRECTIONS), (1, 1, 1, 1, 1))
    dx, dy = DIRECTIONS[direction]
    margin = radius + 1.0
    room = SIZE - 2 * margin
    travelled = (min(end, 1.0) - max(start, 0.0)) * last
    step = _between(rng, 8.0, min(15.0, room / travelled))
    path = step * travelled
    x = _between(rng, margin, SIZE - margin - abs(dx) * path)
    y = _between(rng, margin, SIZE - margin - abs(dy) * path)
    center = (x + path if dx < 0 else x, y + path if dy < 0 else y)
    shade = shade_of(rng, color)
    return Thing(
        color=color,
        shape=_pick(rng, SHAPES),
        direction=direction,
        rgb=shade,
        radius=radius,
        center=center,
        velocity=(dx * step * last, dy * step * last),
        start=start,
        end=end,
    )


def apart(a: Thing, b: Thing) -> bool:
    """Whether two objects keep at least 4 pixels between their bounding boxes while both are visible."""
    for time in frame_times(2 * FRAMES - 1):
        if a.visible(time) and b.visible(time):
            (ax, ay), (bx, by) = a.at(time), b.at(time)
            gap = a.radius + b.radius + 4.0
            if abs(ax - bx) < gap and abs(ay - by) < gap:
                return False
    return True


def sample_clip(index: int, split: str = "held-out") -> Clip:
    """Draw clip number `index` of a split; the splits share no seed.

    Raises `ValueError` for an unknown split and `IndexError` for an index outside it.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    seed = SPLITS[split][index]
    rng = np.random.Generator(np.random.PCG64(seed))
    wanted = _pick(rng, (1, 2, 3, 4), (0.15, 0.25, 0.3, 0.3))
    palette = list(COLORS)
    things: list[Thing] = []
    while len(things) < wanted:
        color = palette[int(rng.random() * len(palette))]
        for _ in range(40):
            thing = _sample_thing(rng, color)
            if all(apart(thing, other) for other in things):
                things.append(thing)
                palette.remove(color)
                break
    width = 24 + int(rng.random() * 17)
    low = int(rng.random() * (SIZE - width))
    drift = _between(rng, 30.0, 90.0) * _pick(rng, (-1, 1))
    return Clip(seed, tuple(things), (low, low + width), bool(rng.random() < 0.5), drift)


def sample_crowd(index: int, wanted: int = 10) -> Clip:
    """Draw a still scene of up to `wanted` objects, colors and shapes repeated: many training examples a frame."""
    rng = np.random.Generator(np.random.PCG64([SPLITS["train"][index], 3]))
    things: list[Thing] = []
    for _ in range(6 * wanted):
        thing = replace(_sample_thing(rng, _pick(rng, tuple(COLORS))), velocity=(0.0, 0.0), start=-1.0, end=2.0)
        if len(things) < wanted and all(apart(thing, other) for other in things):
            things.append(thing)
    width = 24 + int(rng.random() * 17)
    low = int(rng.random() * (SIZE - width))
    return Clip(SPLITS["train"][index], tuple(things), (low, low + width), bool(rng.random() < 0.5), 60.0)


def _upsample(grid: np.ndarray, axis: int, wrap: bool) -> np.ndarray:
    """Linear interpolation of a grid of knots to SIZE samples along one axis."""
    grid = np.moveaxis(grid, axis, 0)
    knots = grid.shape[0]
    position = np.arange(SIZE) * ((knots if wrap else knots - 1) / SIZE)
    low = position.astype(np.int64)
    weight = (position - low).reshape((-1,) + (1,) * (grid.ndim - 1))
    out = grid[low] * (1.0 - weight) + grid[(low + 1) % knots] * weight
    return np.moveaxis(out, 0, axis)


def texture(rng: np.random.Generator, knots: tuple[int, int], amplitude: float, wrap: bool = False) -> np.ndarray:
    """Smooth noise around 0, float64 [SIZE, SIZE, 3], from a random grid of `knots`; mostly gray."""
    grid = (rng.random((*knots, 3)) + 3.0 * rng.random((*knots, 1)) - 2.0) * (0.5 * amplitude)
    return _upsample(_upsample(grid, 0, wrap), 1, wrap)


def _backgrounds(clip: Clip, times: Sequence[float]) -> np.ndarray:
    """Background frames float64 [T, SIZE, SIZE, 3]."""
    rng = np.random.Generator(np.random.PCG64([clip.seed, 1]))
    still = 105.0 + texture(rng, (5, 5), 34.0) + texture(rng, (33, 33), 26.0)
    moving = 105.0 + texture(rng, (16, 16), 46.0, wrap=True)
    low, high = clip.band
    frames = np.repeat(still[None], len(times), axis=0)
    for frame, time in zip(frames, times, strict=True):
        offset = clip.drift * time
        whole = math.floor(offset)
        part = offset - whole
        axis = 0 if clip.band_vertical else 1
        drifted = np.roll(moving, whole, axis) * (1.0 - part) + np.roll(moving, whole + 1, axis) * part
        window = (slice(None), slice(low, high)) if clip.band_vertical else slice(low, high)
        frame[window] = drifted[window]
    return frames


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points (in units of the radius, y downwards) are inside the shape."""
    if shape == "ring":
        squared = x * x + y * y
        return (squared <= 1.0) & (squared >= 0.2)
    if shape == "square":
        return (np.abs(x) <= 0.92) & (np.abs(y) <= 0.92)
    if shape == "triangle":
        return (y <= 0.85) & (y >= -1.0) & (np.abs(x) * 1.85 <= y + 1.0)
    return ((np.abs(x) <= 0.34) & (np.abs(y) <= 1.0)) | ((np.abs(y) <= 0.34) & (np.abs(x) <= 1.0))


def coverage(thing: Thing, time: float) -> np.ndarray:
    """The share of each pixel that an object covers, float64 [SIZE, SIZE]; all zero while it is hidden."""
    mask = np.zeros((SIZE, SIZE))
    if not thing.visible(time):
        return mask
    cx, cy = thing.at(time)
    left, top = max(0, int(cx - thing.radius) - 1), max(0, int(cy - thing.radius) - 1)
    right, bottom = min(SIZE, int(cx + thing.radius) + 2), min(SIZE, int(cy + thing.radius) + 2)
    if left >= right or top >= bottom:
        return mask
    n = _SUPERSAMPLE
    xs = ((np.arange(left * n, right * n) + 0.5) / n - cx) / thing.radius
    ys = ((np.arange(top * n, bottom * n) + 0.5) / n - cy) / thing.radius
    hit = _inside(thing.shape, xs[None, :], ys[:, None])
    counts = hit.reshape(bottom - top, n, right - left, n).sum(axis=(1, 3))
    mask[top:bottom, left:right] = counts / (n * n)
    return mask


def render(clip: Clip, times: Sequence[float] | None = None, *, things: bool = True) -> np.ndarray:
    """Draw a clip at the given times (default: 8 even ones) as uint8 [T, SIZE, SIZE, 3].

    `things=False` draws the background alone.
    """
    times = frame_times() if times is None else times
    frames = _backgrounds(clip, times)
    if things:
        for frame, time in zip(frames, times, strict=True):
            for thing in clip.things:
                if thing.visible(time):
                    share = coverage(thing, time)[..., None]
                    frame[:] = frame * (1.0 - share) + np.array(thing.rgb, dtype=np.float64) * share
    return np.clip(np.floor(frames + 0.5), 0, 255).astype(np.uint8)


def questions(clip: Clip) -> list[Question]:
    """Every question that has exactly one right answer in this clip, in a fixed order."""
    things = clip.things
    found: list[Question] = []
    shapes = [thing.shape for thing in things]
    for thing in things:
        if shapes.count(thing.shape) == 1:
            found.append(Question("color", f"what color is the {thing.shape} ?", thing.color))
        found.append(Question("shape", f"what shape is the {thing.color} object ?", thing.shape))
        found.append(Question("direction", f"which way does the {thing.color} object move ?", thing.direction))
    found.append(Question("count", "how many objects are there ?", str(len(things))))
    found += [
        Question(
            "order",
            f"which came first , the {a.color} or the {b.color} object ?",
            a.color if a.start < b.start else b.color,
        )
        for a in things
        for b in things
        if a.start != b.start
    ]
    latest = max(thing.start for thing in things)
    newest = [thing for thing in things if thing.start == latest]
    if len(newest) == 1 and latest > 0:
        found.append(Question("last", "what color is the object that appeared last ?", newest[0].color))
    return found


def sample_questions(clip: Clip, per_kind: int = 1) -> list[Question]:
    """At most `per_kind` questions of each kind, drawn with the clip's own seed: the set that scores are taken on."""
    rng = np.random.Generator(np.random.PCG64([clip.seed, 2]))
    chosen: list[Question] = []
    for kind in KINDS:
        pool = [question for question in questions(clip) if question.kind == kind]
        chosen += [pool.pop(int(rng.random() * len(pool))) for _ in range(min(per_kind, len(pool)))]
    return chosen


def encode(clip: Clip, path: str | Path, frames: int = 32, fps: float = 8.0) -> None:
    """Render `frames` evenly spaced frames of a clip and write them as an H.264 file."""
    from mmaccel.codecs import write_video

    write_video(path, render(clip, frame_times(frames)), fps=fps)

"""What the bitstream of a video says about its frames, as signals on a grid of tokens; and how a method is given it."""

from __future__ import annotations

import heapq
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from mmaccel.errors import NotApplicableError, VideoError
from mmaccel.tokens.allocate import resolve_keep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmaccel.core.prefill import VisualTokens

__all__ = [
    "CodecSignals",
    "change_between",
    "changes_of",
    "changes_on_grid",
    "overlap",
    "pixel_change",
    "select_frames",
    "using_signals",
]

# The displacement in pixels at which a patch counts as 1 - 1/e changed.
_MOVED = 4.0
# Levels of difference at which a cell counts as 1 - 1/e changed.
_LEVELS = 16.0


def overlap(edges: torch.Tensor, cells: int) -> torch.Tensor:
    """Which share of each of `cells` equal parts of an axis lies in which interval: float32 [cells, intervals].

    edges: ascending, [intervals + 1], from one end of the axis to the other. Rows sum to 1.
    """
    start, end = float(edges[0]), float(edges[-1])
    parts = torch.linspace(start, end, cells + 1, dtype=torch.float64)
    edges = edges.double()
    low = torch.maximum(parts[:-1, None], edges[None, :-1])
    high = torch.minimum(parts[1:, None], edges[None, 1:])
    return ((high - low).clamp_min(0) * (cells / (end - start))).float()


@dataclass(frozen=True, eq=False)
class CodecSignals:
    """What changed from each of N frames to the next, as the encoder of the file saw it, on a grid of cells.

    The grid covers the whole upright picture in equal parts. Entry n compares frame `indices[n]` with frame
    `indices[n - 1]`; the first frame has nothing before it and is all new.

    indices: int64 [N], ascending. motion: float32 [N, rows, columns], how far what the cell shows has moved, in pixels
    of the file, mean over the cell. fresh: the share of the cell that was not predicted from what was shown before.
    still: the share that every frame in between copied from its own place. bits: an upper bound of the residual, in
    bits a pixel: the packets of the frames in between, spread over the blocks that are not still (FFmpeg exports no
    residuals, and the quantiser of a block, which it does export, says nothing of them). packet_bytes: int64 [N], the
    packets after frame n - 1 (at first: from the start of the file) up to frame n. types: "I", "P", "B" or "?" of each
    frame. cuts: bool [N], whether a scene cut lies in between. pixels: pixels of a frame. vectors: False if the codec
    gives no motion vectors: then motion is 0, fresh and still are unknown (NaN), and bits are the same all over a
    frame.
    """

    indices: torch.Tensor
    motion: torch.Tensor
    fresh: torch.Tensor
    still: torch.Tensor
    bits: torch.Tensor
    packet_bytes: torch.Tensor
    types: tuple[str, ...]
    cuts: torch.Tensor
    pixels: int
    vectors: bool = True

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.motion.shape[1], self.motion.shape[2]

    @property
    def change(self) -> torch.Tensor:
        """float32 [N, rows, columns] in [0, 1]: 0 for a copy of the frame before, 1 for what is new.

        fresh + (1 - fresh - still) * (1 - exp(-motion / (4 * moving share))): what moves counts by how far. Without
        vectors 1 - exp(-bits / 0.05) of the frame.
        """
        if not self.vectors:
            out = 1 - torch.exp(-self.bits / 0.05)
        else:
            moving = (1 - self.fresh - self.still).clamp(0, 1)
            out = self.fresh + moving * (1 - torch.exp(-self.motion / (_MOVED * moving.clamp_min(1e-3))))
        out[:1] = 1
        return out.clamp(0, 1)

    def on_grid(self, rows: int, columns: int) -> CodecSignals:
        """The same signals on another grid, by the area that cells share.

        Raises:
            VideoError: a side below 1.
        """
        if min(rows, columns) < 1:
            raise VideoError(f"a grid has at least 1 x 1 cells, not {rows} x {columns}")
        maps = {name: _pooled(getattr(self, name), rows, columns) for name in ("motion", "fresh", "still", "bits")}
        return replace(self, **maps)


_given: ContextVar[tuple[torch.Tensor, ...]] = ContextVar("mmaccel_codec_signals", default=())


@contextmanager
def using_signals(*signals: CodecSignals | torch.Tensor) -> Iterator[None]:
    """Give the methods at work inside of this block the changes in the videos of a call, in the order of the videos.

    One for each video of the batch, for exactly the frames that the model is given: codec signals, or changes [N, rows,
    columns] in [0, 1] found in another way (`pixel_change`). They belong to a call and not to a model, so they are no
    knob. Seen in this thread or task only: a `generate` in another thread needs the block around it there. The picture
    must reach the model whole: a processor that crops it moves it under the grid.

        with mmaccel.accelerate(model, "evs:keep=0.25;temporal=codec"), using_signals(codec_signals(path, frames=8)):
            model.generate(**inputs)

    Raises:
        VideoError: something else than that.
    """
    token = _given.set(tuple(map(_changes, signals)))
    try:
        yield
    finally:
        _given.reset(token)


def _changes(signals: CodecSignals | torch.Tensor) -> torch.Tensor:
    if isinstance(signals, CodecSignals):
        return signals.change
    if not (isinstance(signals, torch.Tensor) and signals.ndim == 3 and signals.numel()):
        raise VideoError(f"signals are what codec_signals returns or a tensor [N, rows, columns], not {signals!r:.80}")
    if not bool(((signals >= 0) & (signals <= 1)).all()):
        raise VideoError("changes must lie in [0, 1]: 0 for a copy of the frame before, 1 for what is new")
    return signals.float()


def changes_of(method: str, video: int, frames: int) -> torch.Tensor:
    """The changes in one video of the call that is running, float32 [frames, rows, columns] on the grid they came on.

    frames: how many frames the model tells apart. Where it encodes them in groups, an entry is the change from one
    group to the next: the sum over the group's frames, 1 at most.

    Raises:
        NotApplicableError: none were given for this video, or they are for another number of frames.
    """
    given = _given.get()
    if video >= len(given):
        raise NotApplicableError(
            f"{method} needs the codec's signals of video {video + 1} of this call, and {len(given)} were given; make "
            "the call inside `with mmaccel.codecs.using_signals(...)`, with one mmaccel.codecs.codec_signals(path, "
            "indices=video.indices) for each video."
        )
    changes = given[video]
    size = -(-len(changes) // frames)
    if -(-len(changes) // size) != frames:
        raise NotApplicableError(
            f"{method} was given signals of {len(changes)} frames for a video that the model sees as {frames}; take "
            "them for the frames that the model is given: codec_signals(path, indices=video.indices)."
        )
    return torch.stack([run.sum(0) for run in changes.split(size)]).clamp_max(1)


def changes_on_grid(method: str, video: int, frames: int, rows: int, columns: int) -> torch.Tensor:
    """The same on a grid of the model's: float32 [frames, rows * columns].

    Raises:
        NotApplicableError: as `changes_of`.
    """
    return _pooled(changes_of(method, video, frames), rows, columns).flatten(1)


def change_between(method: str, tokens: VisualTokens) -> torch.Tensor:
    """How far each living token of a video changed since the living frame before: float32 [frames, tokens a frame].

    A weak signal to select tokens by: `benchmarks/codecs/signals.toml` finds it to go along with the change of features
    (rank correlation 0.3 to 0.8), yet at equal `keep` EVS answers hardly more with it than random tokens do, and fewer
    than with features or with `pixel_change`. It tells what stayed from what changed, not what matters of the latter.

    Changes over frames that an earlier method has dropped add up, to 1 at most; the first frame is 1.

    Raises:
        NotApplicableError: as `changes_of`, or frames hold different numbers of tokens.
    """
    T, H, W = tokens.shape
    frames, per_frame = tokens.frames()
    change = changes_on_grid(method, tokens.video, T, H, W)
    total = change.to(tokens.features.device).cumsum(0)
    cell = tokens.cell.view(frames, per_frame)
    time, place = cell // (H * W), cell % (H * W)
    before = torch.cat([time[:1], time[:-1]])
    moved = (total[time, place] - total[before, place]).clamp(0, 1)
    moved[0] = 1
    return moved


def _pooled(maps: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Bring maps [N, r, c] to another grid, by the area that cells share."""
    if maps.shape[1:] == (rows, columns):
        return maps
    down, across = (overlap(torch.arange(n + 1), m) for n, m in zip(maps.shape[1:], (rows, columns), strict=True))
    return down @ maps @ across.T


def pixel_change(frames: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Change of the raw pixels from frame to frame: float32 [N, rows, columns] in [0, 1], the first frame 1.

    frames: uint8 [N, C, H, W], as `load_video` returns them. 1 - exp(-d / 16), d the mean absolute difference over a
    cell in levels of 255.
    """
    moved = (frames[1:].float() - frames[:-1].float()).abs().mean(1)
    return torch.cat([torch.ones(min(1, len(frames)), *grid), 1 - torch.exp(-_pooled(moved, *grid) / _LEVELS)])


def select_frames(signals: CodecSignals | torch.Tensor, keep: float | int) -> list[int]:
    """The places 0 .. N - 1 of the frames worth keeping, ascending: `keep` of them, as a fraction or a number.

    signals: as `using_signals` takes them. A frame's worth is its mean change from the kept frame before. The frame of
    least worth is dropped and leaves its worth to the next, until `keep` are left; the first is always kept. So copies
    go first, and a video that moves evenly, or not at all, is thinned evenly. A single frame is the one half way
    through all change.

    Raises:
        MethodError: `keep` is no fraction in (0, 1], or more than there are.
    """
    change = _changes(signals)
    n = len(change)
    left = resolve_keep(keep, n)
    # what does not move at all is thinned evenly as well
    worth = (change.double().mean((1, 2)) + 1e-6).tolist()
    if left == 1:
        passed = torch.tensor([0.0, *worth[1:]], dtype=torch.float64).cumsum(0)
        return [int(torch.searchsorted(passed, passed[-1] / 2))]
    following, previous = list(range(1, n + 1)), list(range(-1, n - 1))
    heap = [(worth[place], place) for place in range(1, n)]
    heapq.heapify(heap)
    dropped: set[int] = set()
    while n - len(dropped) > left:
        value, place = heapq.heappop(heap)
        if place in dropped or value != worth[place]:
            continue
        dropped.add(place)
        before, after = previous[place], following[place]
        following[before] = after
        if after < n:
            previous[after] = before
            worth[after] += value
            heapq.heappush(heap, (worth[after], after))
    return [place for place in range(n) if place not in dropped]

"""Whole frames of a video: how alike they are, where one shot ends, which of them become one.

The rules are those of EarlyTom ("Early Token Compression Completes Fast Video Understanding", 2026); similarities are a
matrix c [T, T], the decisions plain Python, for a video has few frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmaccel.errors import MethodError

__all__ = ["FrameGroups", "MergedFrames", "frame_similarity", "merge_middles", "segments", "threshold_for"]

# Each new frame as (old frame, weight) pairs, ascending; the weights of a frame sum to one.
FrameGroups = list[list[tuple[int, float]]]

_BYTES = 1 << 26
_EPSILON = 1e-6  # a cosine of equal vectors in float32 is 1 but for this
_ROUNDING = 1e-4  # similarities of copies differ by this much in low precision
_CANDIDATES = 128


@dataclass(frozen=True)
class MergedFrames:
    """What is left of the T frames of a video.

    groups: each living frame as (original frame, weight) pairs. cuts: (start, stop) of each segment, in living frames.
    """

    T: int
    groups: FrameGroups
    cuts: list[tuple[int, int]]

    @classmethod
    def none(cls, T: int) -> MergedFrames:
        """All of T frames, in one segment."""
        return cls(T, [[(t, 1.0)] for t in range(T)], [(0, T)])

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def times(self) -> list[float]:
        """The mean time of each living frame, in original frames."""
        return [sum(t * weight for t, weight in group) for group in self.groups]

    @property
    def places(self) -> list[int]:
        """The original frame at whose place each living frame stands: of those in it the one nearest its mean time."""
        return [
            min((abs(t - time), t) for t, _ in group)[1] for group, time in zip(self.groups, self.times, strict=True)
        ]

    def then(self, groups: FrameGroups, cuts: list[tuple[int, int]]) -> MergedFrames:
        """What is left after one more round, whose `groups` name frames that live now."""
        joined = [[(t, weight * inner) for old, weight in group for t, inner in self.groups[old]] for group in groups]
        return MergedFrames(self.T, [sorted(group) for group in joined], cuts)


def frame_similarity(x: torch.Tensor, reach: int | None = None) -> torch.Tensor:
    """Return the mean cosine of the same positions of two frames, float32 (T, T), x (T, S, C).

    Pairs more than `reach` frames apart may be left at zero.
    """
    if x.ndim != 3:
        raise MethodError(f"frames must be (T, S, C); got {tuple(x.shape)}")
    T, S, C = x.shape
    reach = T if reach is None else max(1, min(reach, T))
    c = torch.zeros(T, T, device=x.device)
    step = max(1, _BYTES // max(1, 4 * T * C))
    for start in range(0, S, step):
        part = x[:, start : start + step].float()
        part = (part / torch.linalg.vector_norm(part, dim=-1, keepdim=True).clamp_min(1e-12)).flatten(1)
        for first in range(0, T, reach):
            rows, near = slice(first, first + reach), slice(first, first + 2 * reach)
            c[rows, near] += part[rows] @ part[near].mT
    c = (c / max(1, S)).triu()
    return c + c.triu(1).mT


def segments(c: Sequence[Sequence[float]], threshold: float, *, ema: float = 0.9, longest: int | None = None) -> list:
    """Return the segments of a video as (start, stop).

    c: frame similarities. A frame is compared with the first one of its segment; the running mean of that, in which the
    new value weighs `ema`, has to stay at `threshold` at least, but for rounding. A segment holds at most `longest`
    frames.
    """
    cuts, start, mean = [], 0, 1.0
    for i in range(1, len(c)):
        mean = ema * c[start][i] + (1 - ema) * mean
        if mean < threshold - _EPSILON or (longest is not None and i - start + 1 > longest):
            cuts.append((start, i))
            start, mean = i, 1.0
    return [*cuts, (start, len(c))]


def merge_middles(c: Sequence[Sequence[float]], cuts: list[tuple[int, int]], *, strict: bool = False) -> FrameGroups:
    """Merge neighbours among the middle frames of every segment; first and last frame of each stay as they are.

    A pair merges if it is at least as alike as first and last frame of the segment, and as the pair behind it. `strict`
    asks for more than as alike, as the paper does: frames that are all the same then stay apart.
    """

    def above(a: float, b: float) -> bool:
        return a > b if strict else a >= b - _ROUNDING

    groups: FrameGroups = []
    for start, stop in cuts:
        first, last = start, stop - 1
        groups.append([(first, 1.0)])
        k = first + 1
        while k < last:
            pair = c[k][k + 1] if k + 1 < last else None
            behind = c[k + 1][k + 2] if k + 2 < last else None
            if pair is None or not above(pair, c[first][last]) or not (behind is None or above(pair, behind)):
                groups.append([(k, 1.0)])
                k += 1
                continue
            weight = 1.0 if behind is None else _share(pair, behind)
            groups.append([(k, weight), (k + 1, 1 - weight)] if weight < 1 else [(k, 1.0)])
            k += 2
        if last > first:
            groups.append([(last, 1.0)])
    return groups


def _share(pair: float, behind: float) -> float:
    pair, behind = max(pair, 0.0), max(behind, 0.0)
    return pair / (pair + behind) if pair > 0 else 1.0


def threshold_for(
    c: Sequence[Sequence[float]], frames: int, *, ema: float = 0.9, longest: int | None = None, strict: bool = False
) -> float:
    """Return the threshold of `segments` under which `merge_middles` leaves as nearly `frames` frames as any does.

    Of thresholds that come equally near, the highest, which mixes the fewest moments.
    """
    T = len(c)
    found = sorted({c[i][j] for i in range(T) for j in range(i + 1, T)})
    step = max(1, len(found) // _CANDIDATES)
    best = (abs(T - frames), -2.0)  # above every similarity each frame is a segment
    for value in (-1.0, *found[::step]):
        left = len(merge_middles(c, segments(c, value, ema=ema, longest=longest), strict=strict))
        best = min(best, (abs(left - frames), -value))
    return -best[1]

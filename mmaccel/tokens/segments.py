"""Segments: a video cut into stretches of frames, each (start, stop), that cover it in order without a gap."""

from __future__ import annotations

import itertools

import torch

from mmaccel.errors import MethodError

__all__ = ["contiguous", "cut_where_unlike", "mean_pairwise_cosine"]


def cut_where_unlike(similarity: torch.Tensor, least: int, below: float) -> list[tuple[int, int]]:
    """Cut T frames at the `least` - 1 smallest similarities, and wherever the similarity is less than `below`.

    similarity: (T - 1,), entry t compares frames t and t + 1; ties go to the earlier cut. A video of fewer than `least`
    frames is cut everywhere. Dynamic segmentation of FastVID, "Dynamic Density Pruning for Fast Video Large Language
    Models" (2025).
    """
    if similarity.ndim != 1 or least < 1:
        raise MethodError(f"similarity must be (T - 1,) and least at least 1; got {tuple(similarity.shape)}, {least}")
    smallest = similarity.sort(stable=True).indices[: least - 1]
    cut = similarity < below
    cut[smallest] = True
    edges = [0, *(cut.nonzero().squeeze(1) + 1).tolist(), len(similarity) + 1]
    return list(itertools.pairwise(edges))


def contiguous(labels: torch.Tensor) -> list[tuple[int, int]]:
    """Turn clusters of frames into as many segments: labels (T,), the cluster of each frame.

    Every cluster keeps its longest run of neighbouring frames (of equals the first); a frame outside of all of these
    joins the one nearest in time (of equals the earlier).
    """
    if labels.ndim != 1:
        raise MethodError(f"labels must be (T,), one cluster a frame; got {tuple(labels.shape)}")
    longest: dict[int, tuple[int, int]] = {}
    start = 0
    for label, run in itertools.groupby(labels.tolist()):
        stop = start + len(list(run))
        before = longest.get(label)
        if before is None or stop - start > before[1] - before[0]:
            longest[label] = (start, stop)
        start = stop
    runs = sorted(longest.values())
    # of g frames between two runs, the earlier takes the middle one
    edges = [(a[1] + b[0] + 1) // 2 for a, b in itertools.pairwise(runs)]
    return list(itertools.pairwise([0, *edges, start])) if runs else []


def mean_pairwise_cosine(x: torch.Tensor) -> torch.Tensor:
    """Return, for each position, the mean cosine of all pairs of different frames, as float32 (S,).

    x (T, S, D) with T > 1; a token of length 0 is like nothing. Stillness of PruneVid (2024), linear in T.
    """
    if x.ndim != 3 or x.shape[0] < 2:
        raise MethodError(f"x must be (T, S, D) with at least two frames; got {tuple(x.shape)}")
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    pairs = unit.sum(0).square().sum(-1) - unit.square().sum((0, 2))
    return pairs / (x.shape[0] * (x.shape[0] - 1))

"""`frame_dp` with all gains from histograms of run lengths, and one vectorised step a frame.

A window of d steps that ends at frame j gains d for each position whose run of static steps up to j is at least d, so
the run lengths of one frame, counted, give the gains of all windows that end there. Memory: T * min(T, longest) counts
an item. On another device than the CPU the data is copied over and back.
"""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["backtrack", "frame_dp"]


def backtrack(starts: list[int]) -> list[tuple[int, int]]:
    """Windows (start, stop) in order of time, from the start of the best window that ends at each frame."""
    found, j = [], len(starts) - 1
    while j >= 0:
        found.append((starts[j], j + 1))
        j = starts[j] - 1
    return found[::-1]


def _gains(static: np.ndarray, longest: int) -> np.ndarray:
    """int64 (T, W), W = min(T, longest): tokens saved by the window that ends at a frame and has w + 1 of them."""
    steps, S = static.shape
    W = min(steps + 1, longest)
    gains = np.zeros((steps + 1, W), dtype=np.int64)
    if W == 1 or S == 0:
        return gains
    step = np.arange(1, steps + 1, dtype=np.int64)[:, None]
    runs = step - np.maximum.accumulate(np.where(static, 0, step), axis=0)
    cells = np.minimum(runs, W - 1) + (step - 1) * W
    counts = np.bincount(cells.ravel(), minlength=steps * W).reshape(steps, W)
    # at least d: all runs of d or more
    gains[1:] = counts[:, ::-1].cumsum(axis=1)[:, ::-1] * np.arange(W)
    return gains


def frame_dp(static: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equal to reference.py; same arguments."""
    B, T = static.shape[0], static.shape[1] + 1
    starts = np.empty((B, T), dtype=np.int64)
    window = np.empty((B, T), dtype=np.int64)
    saved = np.empty(B, dtype=np.int64)
    for b, item in enumerate(static.cpu().numpy()):
        gains = _gains(item, longest)
        # the best of the first frames, backwards: those before windows of 1, 2, ... frames lie side by side
        best = np.zeros(T + 1, dtype=np.int64)
        for j in range(T):
            totals = best[T - j : T - j + min(j + 1, longest)] + gains[j, : j + 1]
            w = totals.argmax()
            best[T - j - 1] = totals[w]
            starts[b, j] = j - w
        saved[b] = best[0]
        for number, (start, stop) in enumerate(backtrack(starts[b].tolist())):
            window[b, start:stop] = number
    first, most, number = (torch.from_numpy(x).to(static.device) for x in (starts, saved, window))
    return first, most, number

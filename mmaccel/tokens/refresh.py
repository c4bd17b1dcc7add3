"""Refresh: which tokens of a cached module output are worth computing again."""

from __future__ import annotations

import torch

from mmaccel.errors import MethodError
from mmaccel.tokens.signals import change

__all__ = ["cell_bonus", "refresh_scores"]


def cell_bonus(scores: torch.Tensor, grid: tuple[int, ...], cell: int, bonus: float) -> torch.Tensor:
    """Raise the best token of every `cell` x `cell` square by `bonus` times its score, so that choices spread out.

    scores: (B, N), not negative. grid: tokens along (..., height, width), N in all; a grid of one axis has cells of
    `cell` tokens in a row. Cells at the far border may be smaller; of equal scores the first token has the bonus.
    Idea: ToCa, "Accelerating Diffusion Transformers with Token-wise Feature Caching" (2024).

    Raises MethodError for a grid that does not hold N tokens.
    """
    if scores.ndim != 2 or scores.shape[1] != torch.Size(grid).numel():
        raise MethodError(f"scores {tuple(scores.shape)} do not fill a grid of {grid}")
    height, width = (1, *grid)[-2:]
    planes = scores.reshape(-1, 1, height, width)
    tall = cell if len(grid) > 1 else 1
    padding = (0, -width % cell, 0, -height % tall)
    padded = torch.nn.functional.pad(planes, padding, value=-torch.inf)
    where = torch.nn.functional.max_pool2d(padded, (tall, cell), return_indices=True)[1].flatten(1)
    raised = padded.flatten(1).scatter(1, where, padded.flatten(1).gather(1, where) * (1.0 + bonus))
    return raised.view(padded.shape)[..., :height, :width].reshape(scores.shape)


def refresh_scores(
    now: torch.Tensor, reference: torch.Tensor, age: torch.Tensor, *, staleness: float = 0.0
) -> torch.Tensor:
    """How much each token asks for being computed again, float32 (B, N), not negative.

    now, reference: what a module is given, and what it was given when each token was last computed, (B, N, D): the
    length of the difference over that of the reference, divided by its mean over the tokens. age: calls since then,
    (B or 1, N), counts `staleness` a call on top. Our own signal: it needs no map of attention.
    """
    moved = change(now, reference, measure="l2").clamp(max=1e6)
    mean = moved.mean(1, keepdim=True)
    moved = moved / torch.where(mean > 0, mean, torch.ones_like(mean))
    return moved + staleness * age.to(moved.dtype) if staleness else moved

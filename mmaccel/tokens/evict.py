"""Evict: which tokens a full budget lets go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

__all__ = ["excess", "least", "oldest", "unlike_mean"]


def excess(held: int, new: int, budget: int, slack: float) -> int:
    """How many of `held` tokens have to go so that `new` more fit into `budget`.

    0 while they fit. Else so many that after them only (1 - slack) * budget is full, or `held` if it is less: to let go
    of many at once, rarely, is cheaper than of a few each time.
    """
    if held + new <= budget:
        return 0
    return min(held, held + new - int(budget * (1 - slack)))


def oldest(sizes: Sequence[int], excess: int) -> int:
    """How many of the first groups, of `sizes` tokens, have to go so that at least `excess` tokens do."""
    gone = number = 0
    while gone < excess and number < len(sizes):
        gone, number = gone + sizes[number], number + 1
    return number


def least(scores: torch.Tensor, excess: int) -> torch.Tensor:
    """bool [N]: all but the `excess` tokens with the lowest of `scores` [N]; of equal ones the earlier go first."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    keep[torch.sort(scores, stable=True).indices[:excess]] = False
    return keep


def unlike_mean(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """float32 [N]: 1 - cosine of each token x [N, D] to `mean` [D]: what says something that has not been said."""
    return 1 - F.cosine_similarity(x.float(), mean.float()[None], dim=-1)

"""The specification of `greedy_diverse`, and its path where nothing faster exists: a loop over picks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["greedy_diverse"]

# Largest matrix of similarities (elements) that is held at once.
_BLOCK = 1 << 24


@torch.no_grad()
def greedy_diverse(
    x: torch.Tensor,
    scores: torch.Tensor,
    eligible: torch.Tensor,
    counts: torch.Tensor,
    K: int,
    method: str,
    balance: float,
    per_round: int,
) -> torch.Tensor:
    """Positions int64 [B, K] in the order chosen, -1 from counts[b] on.

    scores [B, N]: relevance (mmr), quality (dpp), or minus the cosine with the nearest neighbour (farthest); counts is
    at most K and at most the number of eligible tokens. Finite in all that is eligible.
    """
    unit = torch.nn.functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
    if method == "dpp":
        picks = _dpp(unit, scores.masked_fill(~eligible, 0), eligible, K)
    else:
        weight = balance if method == "mmr" else 0.0
        penalty = 1 - balance if method == "mmr" else 1.0
        picks = _marginal(unit, scores, eligible, K, weight, penalty, per_round)
    return picks.masked_fill(torch.arange(K, device=x.device) >= counts[:, None], -1)


def _marginal(
    unit: torch.Tensor,
    scores: torch.Tensor,
    eligible: torch.Tensor,
    K: int,
    weight: float,
    penalty: float,
    per_round: int,
) -> torch.Tensor:
    columns = _columns(unit)
    # the scores of farthest may be infinite, and weigh nothing after the first pick
    relevance = weight * scores.masked_fill(~eligible, 0) if weight else scores.new_zeros(())
    picked, taken = [unit.new_empty((len(unit), 0), dtype=torch.int64)], ~eligible
    nearest = unit.new_full(unit.shape[:2], -torch.inf)
    for start in range(0, K, per_round):
        worth = (scores if start == 0 else relevance - penalty * nearest).masked_fill(taken, -torch.inf)
        if per_round == 1:
            best = worth.argmax(1, keepdim=True)
        else:
            best = worth.sort(dim=1, descending=True, stable=True).indices[:, :per_round]
        picked.append(best)
        taken = taken.scatter(1, best, True)
        nearest = torch.maximum(nearest, columns(best).amax(-1))
    return torch.cat(picked, 1)[:, :K]


def _dpp(unit: torch.Tensor, scores: torch.Tensor, eligible: torch.Tensor, K: int) -> torch.Tensor:
    # A square taken from the rounded unit vector would make equal tokens differ in the last bit.
    quality = unit.any(-1).to(unit.dtype) * scores
    unit = unit * scores[..., None]
    B, N, _ = unit.shape
    columns = _columns(unit)
    volume = quality * quality
    floor = 1e-5 * volume
    factor = unit.new_zeros(B, K, N)
    picks = torch.empty(B, K, dtype=torch.int64, device=unit.device)
    taken = ~eligible
    for step in range(K):
        pick = volume.masked_fill(taken, -torch.inf).argmax(1, keepdim=True)
        picks[:, step : step + 1] = pick
        taken.scatter_(1, pick, True)
        left = volume.gather(1, pick)
        before = factor[:, :step].gather(2, pick[:, None].expand(-1, step, 1))
        row = columns(pick)[..., 0] - (factor[:, :step] * before).sum(1)
        row = torch.where(left > 0, row / left.clamp_min(torch.finfo(unit.dtype).tiny).sqrt(), 0)
        factor[:, step] = row
        volume = volume - row * row
        volume = volume.masked_fill(volume <= floor, 0)
    return picks


def _columns(unit: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from picks (B, P) to the columns (B, N, P) of the Gram matrix, held whole where it is small."""
    B, N, D = unit.shape
    if B * N * N <= _BLOCK:
        gram = unit @ unit.mT
        return lambda picks: gram.gather(1, picks[..., None].expand(-1, -1, N)).mT
    return lambda picks: unit @ unit.gather(1, picks[..., None].expand(-1, -1, D)).mT

"""Marginal relevance and farthest points on a CPU: similarities of tokens that are likely to be chosen, many at once.

One pick needs the similarities of one token with all others, a product of a matrix and a vector, which reads all
features for every pick. Those of several tokens are one product of two matrices and read them once. The tokens that are
worth most now are the likeliest next picks, so theirs are computed together and kept; where the choice falls on another
token, its own and those of the best of that moment follow. What is chosen never depends on that. Correct on any device.
"""

from __future__ import annotations

import torch

__all__ = ["alone", "marginal"]

# Similarities that are held at once, 64 MB of float32, and those in a block of `alone`.
_HELD = 1 << 24
_BLOCK = 1 << 22
# Most tokens whose similarities are computed ahead of their choice.
_AHEAD = 64


@torch.no_grad()
def alone(x: torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
    """Minus the cosine of each token with the eligible one most like it, itself left out: x [B, N, D] to [B, N].

    Every pair is looked at once, so the two of a pair get the same number. Infinite without another token.
    """
    B, N, _ = x.shape
    unit = _unit(x)
    out = unit.new_full((B, N), -torch.inf)
    step = max(1, _BLOCK // max(1, N))
    for b in range(B):
        rows = eligible[b].nonzero().squeeze(1)
        found, vectors = unit.new_full((len(rows),), -torch.inf), unit[b, rows]
        for start in range(0, len(rows), step):
            like = vectors[start : start + step] @ vectors[start:].mT
            like.diagonal().fill_(-torch.inf)
            here = found[start : start + step]
            torch.maximum(here, like.amax(1), out=here)
            torch.maximum(found[start:], like.amax(0), out=found[start:])
        out[b, rows] = found
    return -out


@torch.no_grad()
def marginal(
    x: torch.Tensor,
    scores: torch.Tensor,
    eligible: torch.Tensor,
    counts: torch.Tensor,
    K: int,
    method: str,
    balance: float,
) -> torch.Tensor:
    """Equal to reference.py up to rounding, for "mmr" with one pick a round and "farthest"; same arguments."""
    weight, penalty = (balance, 1 - balance) if method == "mmr" else (0.0, 1.0)
    unit = _unit(x)
    picks = torch.full((x.shape[0], K), -1, dtype=torch.int64, device=x.device)
    for b, count in enumerate(counts.tolist()):
        if count:
            chosen = _item(unit[b], scores[b], eligible[b], count, weight, penalty)
            picks[b, :count] = torch.tensor(chosen, device=x.device)
    return picks


def _item(
    unit: torch.Tensor, scores: torch.Tensor, eligible: torch.Tensor, count: int, weight: float, penalty: float
) -> list[int]:
    relevance = weight * scores.masked_fill(~eligible, 0) if weight else None
    nearest = unit.new_full((len(unit),), -torch.inf)
    gone = ~eligible
    worth = scores.masked_fill(gone, -torch.inf)
    columns: dict[int, torch.Tensor] = {}
    known = gone.clone()
    picks: list[int] = []
    ahead, used = 8, 4
    while True:
        pick = int(worth.argmax())
        picks.append(pick)
        if len(picks) == count:
            return picks
        gone[pick] = True
        if pick not in columns:
            if columns:
                ahead = (
                    min(_AHEAD, 2 * ahead) if 2 * used > ahead else max(1, ahead // 2) if 4 * used < ahead else ahead
                )
            if (len(columns) + ahead) * len(unit) > _HELD:
                columns.clear()
                known.copy_(gone)
            known[pick] = True
            free = worth.masked_fill(known, -torch.inf)
            likely = (
                free.topk(min(ahead, count - len(picks), len(unit)) - 1).indices if ahead > 1 else free.new_empty(0)
            )
            tokens = [pick, *(token for token in likely.tolist() if not known[token])]
            columns.update(zip(tokens, unit[tokens] @ unit.mT, strict=True))
            known[tokens] = True
            used = 0
        used += 1
        torch.maximum(nearest, columns[pick], out=nearest)
        worth = nearest.mul(-penalty) if relevance is None else torch.add(relevance, nearest, alpha=-penalty)
        worth.masked_fill_(gone, -torch.inf)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)

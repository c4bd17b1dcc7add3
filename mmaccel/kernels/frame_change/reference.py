"""The specification of `frame_change`: one frame after the other, whole frames in float32."""

from __future__ import annotations

import torch

__all__ = ["frame_change", "measured"]


def measured(now: torch.Tensor, before: torch.Tensor, measure: int) -> torch.Tensor:
    """Distance of `now` from `before`, both (..., D): 0 is 1 - cosine, 1 the cosine, 2 and 3 relative L1 and L2."""
    if measure < 2:
        norms = torch.linalg.vector_norm(now, dim=-1) * torch.linalg.vector_norm(before, dim=-1)
        cosine = ((now * before).sum(-1) / norms.clamp_min(torch.finfo(now.dtype).tiny)).clamp(-1, 1)
        return cosine if measure == 1 else 1 - cosine
    order = measure - 1
    moved = torch.linalg.vector_norm(now - before, ord=order, dim=-1)
    base = torch.linalg.vector_norm(before, ord=order, dim=-1)
    return moved / base.clamp_min(torch.finfo(now.dtype).eps)


def frame_change(
    x: torch.Tensor,
    reference: torch.Tensor | None,
    seen: torch.Tensor | None,
    mask: torch.Tensor | None,
    measure: int,
    threshold: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change float32 (B, T, S), and the frame int64 (B, S) that is the reference at the end: -1 the given one, -2 none.

    `measure` as in `measured`; the other arguments as in the public function.
    """
    B, T, S, _ = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    change = x.new_empty((B, T, S), dtype=torch.float32)
    at = torch.full((B, S), -2 if reference is None else -1, device=x.device)
    if seen is not None:
        at = at.masked_fill(~seen, -2)
    before = x.new_zeros(B, S, x.shape[3]) if reference is None else reference
    for t in range(T):
        moved = measured(x[:, t].to(wide), before.to(wide), measure).float()
        moved = moved.masked_fill(at == -2, -torch.inf if measure == 1 else torch.inf)
        valid = torch.ones_like(at, dtype=torch.bool) if mask is None else mask[:, t]
        change[:, t] = moved.masked_fill(~valid, -torch.inf)
        taken = valid if threshold is None else valid & ~(moved <= threshold)
        # a frame that is not valid is no predecessor, but a running reference outlives it
        at = torch.where(taken, t, at if threshold is not None else -2)
        before = torch.where(taken[..., None], x[:, t], before)
    return change, at

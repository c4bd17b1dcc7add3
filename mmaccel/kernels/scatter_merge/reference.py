"""The specification of `scatter_merge` and `unmerge`: one more output takes what goes nowhere. Differentiable."""

from __future__ import annotations

import torch

__all__ = ["scatter_merge", "unmerge"]


def scatter_merge(x: torch.Tensor, assignment: torch.Tensor, weight: torch.Tensor, n_out: int) -> torch.Tensor:
    """x [B, N, D], assignment and weight [B, N] -> [B, n_out, D]; summed in float32 or wider, in the order of N."""
    B, _, D = x.shape
    values = x if x.dtype == torch.float64 else x.float()
    inside = (assignment >= 0) & (assignment < n_out)
    first = torch.arange(B, device=x.device)[:, None] * n_out
    slot = torch.where(inside, assignment + first, B * n_out)
    out = values.new_zeros(B * n_out + 1, D).index_add(0, slot.flatten(), (values * weight[..., None]).flatten(0, 1))
    return out[:-1].view(B, n_out, D).to(x.dtype)


def unmerge(y: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """y [B, K, D] at assignment [B, N] -> [B, N, D], 0 where it is outside [0, K)."""
    K = y.shape[1]
    slot = torch.where((assignment >= 0) & (assignment < K), assignment, K)
    padded = torch.cat([y, y.new_zeros(y.shape[0], 1, y.shape[2])], 1)
    return padded.gather(1, slot[..., None].expand(*slot.shape, y.shape[2]))

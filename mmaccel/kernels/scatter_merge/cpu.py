"""`scatter_merge` in blocks of tokens, and `unmerge` by whole rows: products that stay in the cache of one core."""

from __future__ import annotations

import torch

__all__ = ["scatter_merge", "unmerge"]

# 2 MB of float32: weighted tokens on their way into the sums, in memory that is used again and again
_BLOCK = 1 << 19


def scatter_merge(x: torch.Tensor, assignment: torch.Tensor, weight: torch.Tensor, n_out: int) -> torch.Tensor:
    """Equal to reference.py, sums in the same order; same arguments."""
    B, N, D = x.shape
    out = x.new_zeros(B * n_out + 1, D, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    inside = (assignment >= 0) & (assignment < n_out)
    if B > 1:
        assignment = assignment + torch.arange(B, device=x.device)[:, None] * n_out
    slot = torch.where(inside, assignment, B * n_out).flatten()
    tokens, share = x.flatten(0, 1), weight.flatten()[:, None]
    step = max(1, _BLOCK // max(1, D))
    for start in range(0, B * N, step):
        block = slice(start, start + step)
        # the product of a half-precision token and its float32 weight is float32
        out.index_add_(0, slot[block], tokens[block] * share[block])
    return out[:-1].view(B, n_out, D).to(x.dtype)


def unmerge(y: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """Equal to reference.py bit for bit; same arguments."""
    B, K, D = y.shape
    out = y.new_empty(B, assignment.shape[1], D)
    if K == 0:
        return out.zero_()
    outside = (assignment < 0) | (assignment >= K)
    slot = assignment.masked_fill(outside, 0)
    for b in range(B):
        torch.index_select(y[b], 0, slot[b], out=out[b])
    return out.masked_fill_(outside[..., None], 0)

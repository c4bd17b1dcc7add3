"""The specification of `pairwise_match`: short, and free to hold the whole matrix of similarities."""

from __future__ import annotations

import torch

__all__ = ["pairwise_match"]


def pairwise_match(
    a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None, euclidean: bool, exclude_self: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of b and similarity for each row of a, in float32 or wider; arguments as in the registered op."""
    B, N, M = a.shape[0], a.shape[1], b.shape[1]
    if 0 in (B, N, M):
        return a.new_full((B, N), -1, dtype=torch.int64), a.new_full((B, N), -torch.inf, dtype=torch.float32)
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    a, b = a.to(wide), b.to(wide)
    allowed = torch.ones(B, N, M, dtype=torch.bool, device=a.device)
    if mask is not None:
        allowed &= mask[:, None]
    if exclude_self:
        allowed.diagonal(0, 1, 2).fill_(False)

    if euclidean:
        similarity = -torch.linalg.vector_norm(a[:, :, None] - b[:, None], dim=-1)
    else:
        similarity = torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).mT
    similarity = similarity.masked_fill(~allowed, -torch.inf)
    index, value = similarity.argmax(-1), similarity.amax(-1)
    return index.masked_fill(value == -torch.inf, -1), value.float()

"""The specification of `gather_compact`: one `torch.gather` a tensor. It is differentiable."""

from __future__ import annotations

import torch

__all__ = ["gather_compact"]


def gather_compact(
    index: torch.Tensor,
    valid: torch.Tensor | None,
    rows: list[torch.Tensor],
    columns: list[torch.Tensor],
    masks: list[torch.Tensor],
) -> list[torch.Tensor]:
    """rows [B|1, S, ...], columns and masks [..., B|1, S] at index [B, L]; masks are 0 where not valid."""
    B, L = index.shape
    moved = []
    for x in rows:
        wide = index.view(B, L, *[1] * (x.ndim - 2)).expand(B, L, *x.shape[2:])
        moved.append(x.expand(B, *x.shape[1:]).gather(1, wide))
    for x in columns + masks:
        wide = x.expand(*x.shape[:-2], B, x.shape[-1])
        moved.append(wide.gather(-1, index.expand(*x.shape[:-2], B, L)))
    if valid is not None:
        first = len(moved) - len(masks)
        moved[first:] = [x.masked_fill(~valid, 0) for x in moved[first:]]
    return moved

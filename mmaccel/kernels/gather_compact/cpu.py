"""`gather_compact` with whole rows copied at once, where `torch.gather` looks every single number up."""

from __future__ import annotations

import torch

from mmaccel.kernels.gather_compact import reference

__all__ = ["gather_compact"]


def gather_compact(
    index: torch.Tensor,
    valid: torch.Tensor | None,
    rows: list[torch.Tensor],
    columns: list[torch.Tensor],
    masks: list[torch.Tensor],
) -> list[torch.Tensor]:
    """Equal to reference.py bit for bit; same arguments, rows [B|1, S, C]. Correct on any device."""
    return [_rows(x, index) for x in rows] + reference.gather_compact(index, valid, [], columns, masks)


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    B, L = index.shape
    if x.shape[0] == 1:
        return x[0].index_select(0, index.flatten()).view(B, L, x.shape[2])
    moved = x.new_empty(B, L, x.shape[2])
    for b in range(B):
        torch.index_select(x[b], 0, index[b], out=moved[b])
    return moved

"""How far the rows of a vision encoder have changed, from what is told of a picture's patches."""

from __future__ import annotations

import torch

from mmaccel.core.encoder import Encoder
from mmaccel.errors import NotApplicableError

__all__ = ["in_block_order", "patch_grid"]


def patch_grid(size: tuple[int, ...], patches: int) -> tuple[int, int]:
    """(rows, columns) of the patches of a picture of `size`, which ends in its height and width.

    Raises:
        NotApplicableError: that many patches make no grid of the picture's shape.
    """
    height, width = size[-2:] if len(size) > 2 else (1, 1)
    rows = round((patches * height / width) ** 0.5)
    if rows < 1 or rows * (patches // rows) != patches:
        raise NotApplicableError(
            f"{patches} patches are no grid of a picture of {height} x {width} pixels, so changes cannot be laid over "
            "them; use temporal=features."
        )
    return rows, patches // rows


def in_block_order(
    encoder: Encoder, maps: torch.Tensor, grid: tuple[int, int], grids: torch.Tensor | None, number: int
) -> torch.Tensor:
    """Maps [frames, rows * columns] of patches as [frames, tokens] of what the blocks see; class tokens get 0.

    grids: of a packed call, int64 [items, 3], and `number` is the item that the maps are of.
    """
    if not encoder.packed:
        return torch.nn.functional.pad(maps, (encoder.prefix, 0))
    assert grids is not None
    side, (h, w) = encoder.merge, grid
    units = maps.view(-1, h // side, side, w // side, side).transpose(2, 3).reshape(-1, side**2)
    if encoder.order is not None:
        order = encoder.order(grids).to(units.device)
        start = int(grids[:number].prod(1).sum()) // side**2
        units = units[order[start : start + len(units)] - start]
    return units.reshape(len(maps), -1)

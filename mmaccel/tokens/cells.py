"""Tokens on a grid, a few of which stand for their neighbourhoods."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmaccel.errors import MethodError

__all__ = ["one_a_cell"]


def one_a_cell(grid: tuple[int, ...], cell: int, seed: int | None = None) -> Tensor:
    """Mark one token in each square of `cell` x `cell` tokens of each frame: bool [N], row by row.

    grid: tokens along (time,) height and width; (N,) is a sequence, with runs of cell * cell tokens as cells. Squares
    at the lower and right edges may be smaller. seed: None marks the first token of each, a number draws the place
    inside each at random, always the same for it. "Token Merging for Fast Stable Diffusion" (2023) draws anew at each
    call.

    Raises:
        MethodError: a cell of less than one token, or a grid without axes.
    """
    if cell < 1 or not grid:
        raise MethodError(f"a grid {grid} cannot be cut into cells of {cell} x {cell} tokens")
    sizes = (cell * cell,) if len(grid) == 1 else (1,) * (len(grid) - 2) + (cell, cell)
    counts = [math.ceil(length / size) for length, size in zip(grid, sizes, strict=True)]
    cells = torch.meshgrid(*(torch.arange(count) for count in counts), indexing="ij")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    index = torch.zeros(counts, dtype=torch.int64)
    for corner, length, size in zip(cells, grid, sizes, strict=True):
        room = (length - corner * size).clamp_max(size)
        inside = 0 if generator is None else (torch.rand(counts, generator=generator) * room).long()
        index = index * length + corner * size + inside
    marked = torch.zeros(math.prod(grid), dtype=torch.bool)
    marked[index.flatten()] = True
    return marked

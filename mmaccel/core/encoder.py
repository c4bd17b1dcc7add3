"""A vision encoder as methods see it: its blocks, and how its tokens are laid out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mmaccel.core.block import Block

__all__ = ["Encoder"]


@dataclass(frozen=True, eq=False)
class Encoder:
    """Where a vision encoder computes.

    module: what is called once for a batch of images. path: its name as seen from the user's object. blocks: all its
    blocks, in order. last: the block whose output the rest of the model reads; those behind it compute nothing that is
    used. prefix: class and register tokens ahead of the patches. packed: whether the patches of all images lie in one
    row [patches, C] that `cu_seqlens` cuts, instead of [images, prefix + patches, C]. merge: how many patches along
    each side a later module joins, which therefore stay or go together. read: blocks before `last` whose output is
    read as well. order(grids int64 [items, 3]) -> int64 [merge groups]: which of the merge groups, counted in raster
    order, stands at each place in the blocks of a packed encoder; None where they stand in raster order.
    """

    module: nn.Module
    path: str
    blocks: Sequence[Block]
    last: int
    prefix: int = 0
    packed: bool = False
    merge: int = 1
    read: tuple[int, ...] = ()
    order: Callable[[torch.Tensor], torch.Tensor] | None = None

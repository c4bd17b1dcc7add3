"""A vision encoder as methods see it: its blocks, and how its tokens are laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    read as well.
    """

    module: nn.Module
    path: str
    blocks: Sequence[Block]
    last: int
    prefix: int = 0
    packed: bool = False
    merge: int = 1
    read: tuple[int, ...] = ()

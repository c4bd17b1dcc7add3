"""A block of a vision encoder taken apart, so that a method can compute it on some tokens, or merge tokens inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Block", "heads_of", "tokens_of"]

Map = Callable[[torch.Tensor], torch.Tensor]
Rotary = tuple[torch.Tensor, torch.Tensor]


def heads_of(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[..., N, H * D] to [..., H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def tokens_of(x: torch.Tensor) -> torch.Tensor:
    """[..., H, N, D] to [..., N, H * D]."""
    return x.transpose(-3, -2).flatten(-2)


@dataclass(frozen=True, eq=False)
class Block:
    """A pre-norm transformer block: h + attention(norm1(h)), then h + mlp(norm2(h)).

    query, key, value: of normed tokens [..., N, C], as [..., H, N, D], norms of q and k included. out: of what the
    heads saw [..., N, H * D], projection and layer scale included, as `mlp` includes its own. rotate(x, (cos, sin))
    turns queries or keys [..., H, N, D] to their positions, cos and sin [N, D]; None without rotary positions.
    attention: the module that computes it in the model. taps: modules whose output, through the map beside it, is what
    a block is made of, so that the block's own forward shows it: "key" and "value" [..., N, H * D] (norms of k
    included), "attention" and "mlp" [..., N, C], what the two branches add.
    """

    module: nn.Module
    attention: nn.Module
    norm1: Map
    norm2: Map
    query: Map
    key: Map
    value: Map
    out: Map
    mlp: Map
    scale: float
    rotate: Callable[[torch.Tensor, Rotary], torch.Tensor] | None = None
    taps: Mapping[str, tuple[nn.Module, Callable[[Any], torch.Tensor]]] = field(default_factory=dict)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The attention branch's output for some queries: [..., Hq, M, D], [..., H, N, D] to [..., M, C].

        bias: added to the scores, or a bool mask of what is seen; anything that broadcasts to [..., H, M, N].
        """
        if bias is not None and bias.dtype != torch.bool:
            bias = bias.to(query.dtype)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)
        return self.out(seen.transpose(-3, -2).flatten(-2))

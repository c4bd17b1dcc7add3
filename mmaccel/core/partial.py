"""A block of a vision encoder on some rows: the rest of its output is what an earlier frame has left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mmaccel.core.block import Block, Rotary, heads_of, tokens_of
from mmaccel.kernels.partial_row_attention import partial_row_attention
from mmaccel.tokens.select import indices_of

__all__ = ["Seen", "renew"]


@dataclass(frozen=True, eq=False)
class Seen:
    """What the queries of a frame see of its tokens.

    windows: int64 [N], a query sees the tokens of its own window. mask: [B or 1, H or 1, N, N], bool or added to the
    scores.
    """

    windows: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def at(self, rows: torch.Tensor) -> torch.Tensor:
        """The mask [B, H or 1, m, N] of queries at rows [B, m]."""
        if self.windows is not None:
            return (self.windows[rows][:, :, None] == self.windows)[:, None]
        assert self.mask is not None
        mask = self.mask.expand(len(rows), -1, -1, -1)
        return mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))


def renew(
    block: Block,
    hidden: torch.Tensor,
    reference: Mapping[str, torch.Tensor],
    choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rotary: Rotary | None = None,
    seen: Seen | None = None,
) -> tuple[torch.Tensor, int]:
    """The output [B, N, C] of a block for frames hidden [B, N, C], and how many rows were computed.

    reference: "key", "value" [B or 1, N, H * D], "attention" and "mlp" [B or 1, N, C] of the frames whose results are
    reused. choose(keys, reference keys) -> bool [B, N] says which rows are computed; keys are those before rotary
    embedding, which turns both alike. All keys are computed anew, values, queries and both branches at the chosen rows
    only. rotary: cos and sin [B, N, D].
    """
    B = hidden.shape[0]
    x = block.norm1(hidden)
    key = block.key(x)
    chosen = choose(tokens_of(key), reference["key"])
    flat = chosen.flatten().nonzero().squeeze(1)
    out = hidden + reference["attention"]
    if len(flat):
        rows = x.flatten(0, 1)[flat]
        value = reference["value"].expand(B, -1, -1).clone(memory_format=torch.contiguous_format)
        value.flatten(0, 1)[flat] = tokens_of(block.value(rows))
        query = block.query(rows)
        if rotary is not None:
            assert block.rotate is not None
            cos, sin = (table.flatten(0, 1)[flat] for table in rotary)
            query, key = block.rotate(query, (cos, sin)), block.rotate(key, rotary)
        attended = _attend(block, query, key, heads_of(value, key.shape[-3]), chosen, seen)
        between = hidden.flatten(0, 1)[flat] + block.out(attended)
        out.flatten(0, 1)[flat] = between
        out += reference["mlp"]
        out.flatten(0, 1)[flat] = between + block.mlp(block.norm2(between))
    else:
        out += reference["mlp"]
    return out, len(flat)


def _attend(
    block: Block, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chosen: torch.Tensor, seen: Seen | None
) -> torch.Tensor:
    """What the chosen rows see of their frames: query [H, M, D] and chosen bool [B, N], M of them, to [M, H * D]."""
    B = len(chosen)
    rows = indices_of(chosen)
    there = rows >= 0
    even = rows.numel() == query.shape[1]
    if even:
        q = query.unflatten(1, (B, -1)).transpose(0, 1)
    else:
        q = query.new_zeros(B, rows.shape[1], query.shape[0], query.shape[2])
        q[there] = query.transpose(0, 1)
        q = q.transpose(1, 2)
    # norms of q and k may leave them wider than the values under autocast
    q, key = q.to(value.dtype), key.to(value.dtype)
    if seen is None:
        out = partial_row_attention(q, None, None, rows, key, value, scale=block.scale)
    else:
        mask = seen.at(rows.clamp_min(0))
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        out = F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=block.scale)
    out = tokens_of(out)
    return out.flatten(0, 1) if even else out[there]

"""`partial_row_attention` through the dense library path: copy the new rows, then one SDPA call of m queries.

SDPA holds no map, takes fewer key heads than query heads as they are, and its time is proportional to m. Correct on any
device.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["partial_row_attention", "write_rows"]


def write_rows(cache: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Copy values (B, h, m, d) to the rows (B, m) of cache (B, h, N, d), none where the row is -1."""
    for b, at in enumerate(rows):
        kept = at >= 0
        if bool(kept.all()):
            cache[b].index_copy_(1, at, values[b])
        else:
            cache[b].index_copy_(1, at[kept], values[b][:, kept])


@torch.no_grad()
def partial_row_attention(
    q: torch.Tensor,
    k_new: torch.Tensor | None,
    v_new: torch.Tensor | None,
    rows: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    key_padding: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """Equal to reference.py up to rounding; same arguments."""
    B, H, m, _ = q.shape
    Hkv, N, Dv = v_cache.shape[1:]
    if k_new is not None:
        write_rows(k_cache, rows, k_new)
    if v_new is not None:
        write_rows(v_cache, rows, v_new)
    if 0 in (B, H, m, N):
        return q.new_zeros(B, m, H, Dv).transpose(1, 2)

    k, v, mask, dead = k_cache, v_cache, None, rows < 0
    if key_padding is not None:
        hidden = ~key_padding
        # SDPA adds -inf to the logits of a hidden key and multiplies its value by 0, which NaN and infinity survive.
        k, v = (x if _finite(x, hidden) else x.masked_fill(hidden[:, None, :, None], 0) for x in (k, v))
        mask = key_padding[:, None, None]
        dead = dead | ~key_padding.any(1, keepdim=True)
    if causal:
        past = torch.arange(N, device=q.device) <= rows[:, None, :, None]
        mask = past if mask is None else past & mask
        dead = dead | ~mask.any(-1)[:, 0]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=Hkv < H)
    # The CPU's kernel takes a row of NaN logits for one that sees nothing; a sum finds NaN faster than isnan does.
    broken = q.sum(-1, keepdim=True).isnan()
    for rows_of, value in ((broken, torch.nan), (dead[:, None, :, None], 0)):
        if bool(rows_of.any()):
            out.masked_fill_(rows_of, value)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _finite(x: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether the rows (B, N) `hidden` of x (B, h, N, d) are finite; usually few, so that a copy of x is avoided."""
    return bool(x.transpose(1, 2)[hidden].sum((1, 2)).isfinite().all())

"""The specification of `partial_row_attention`: short, and free to hold the whole attention map."""

from __future__ import annotations

import torch

__all__ = ["partial_row_attention"]


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
    """Write the new rows, then attend in float32 or wider; arguments as in the registered op."""
    N, G = k_cache.shape[2], q.shape[1] // k_cache.shape[1]
    for new, cache in ((k_new, k_cache), (v_new, v_cache)):
        if new is None:
            continue
        for b, place in (rows >= 0).nonzero().tolist():
            cache[b, :, rows[b, place]] = new[b, :, place]

    visible = (rows >= 0)[:, :, None].expand(-1, -1, N)
    if causal:
        visible = visible & (torch.arange(N, device=q.device) <= rows[:, :, None])
    if key_padding is not None:
        visible = visible & key_padding[:, None]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = scale * q.to(wide) @ k_cache.to(wide).repeat_interleave(G, dim=1).mT
    # A row that sees nothing has no softmax, and zero times a NaN that stands in padding is no zero.
    shares = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    shares = shares.masked_fill(~visible.any(-1)[:, None, :, None], 0)
    v = v_cache if key_padding is None else v_cache.masked_fill(~key_padding[:, None, :, None], 0)
    out = (shares @ v.to(wide).repeat_interleave(G, dim=1)).masked_fill((rows < 0)[:, None, :, None], 0)
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)

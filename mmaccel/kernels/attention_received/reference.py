"""The specification of `attention_received`: short, and free to hold the whole attention map."""

from __future__ import annotations

import torch

__all__ = ["attention_received"]


def attention_received(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor | None,
    key_padding: torch.Tensor | None,
    causal: bool,
    heads: bool,
    scale: float,
    diagonal: bool = False,
) -> torch.Tensor:
    """Column (or diagonal) means of `softmax(q k^T * scale)` in float32 or wider; arguments as in the registered op."""
    B, H, Sq, _ = q.shape
    Sk = k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = scale * q.to(wide) @ k.to(wide).repeat_interleave(H // max(k.shape[1], 1), dim=1).mT

    visible = torch.ones(B, Sq, Sk, dtype=torch.bool, device=q.device)
    if causal:
        visible &= visible.new_ones(Sq, Sk).tril(Sk - Sq)
    if key_padding is not None:
        visible &= key_padding[:, None]
    probabilities = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)

    # How often each query row was chosen; -1 in `rows` chooses none, and a row that sees no key has no softmax.
    chosen = torch.ones(B, Sq, dtype=wide, device=q.device)
    if rows is not None:
        chosen = torch.zeros(B, Sq + 1, dtype=wide, device=q.device)
        chosen = chosen.scatter_add(1, rows + 1, chosen.new_ones(rows.shape))[:, 1:]
    chosen = chosen * visible.any(-1)

    probabilities = probabilities.masked_fill(chosen[:, None, :, None] == 0, 0)
    probabilities = probabilities * chosen[:, None, :, None]
    if diagonal:  # turn every row around its own query: key j of query i comes to place i + Sk - Sq - j
        distance = torch.arange(Sq, device=q.device)[:, None] + (Sk - Sq) - torch.arange(Sk, device=q.device)
        turned = probabilities.gather(3, distance.clamp_min(0).expand(B, H, Sq, Sk))
        probabilities = turned.masked_fill(distance < 0, 0)
    received = probabilities.sum(2) / chosen.sum(1).clamp(min=1)[:, None, None]
    return (received if heads else received.mean(1)).float()

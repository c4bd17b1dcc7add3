"""Move cached keys to other positions: rotary embeddings compose, so a key is turned on by the difference alone."""

from __future__ import annotations

from typing import Any

import torch

from mmaccel.errors import NotApplicableError

__all__ = ["check_rotary", "turn", "turn_angles"]

# frequencies that depend on the length of the sequence: a key cannot be turned from one length to another
_MOVING = ("dynamic", "longrope")


def check_rotary(rotary: Any, axes: int = 1) -> None:
    """Refuse rotary embeddings whose rotations do not compose, or that pair other channels than `turn`.

    Raises:
        NotApplicableError: there are none, their frequencies change with the length of the sequence, they turn
        neighbouring channels, or keep the `axes` of their positions apart.
    """
    kind = getattr(rotary, "rope_type", "default")
    if not hasattr(rotary, "inv_freq") or kind in _MOVING:
        what = f"rotary embeddings of type {kind!r}" if hasattr(rotary, "inv_freq") else "no rotary embeddings"
        raise NotApplicableError(
            f'cached keys of a model with {what} cannot be moved to other positions; use on_evict="rebuild".'
        )
    step = torch.ones(axes, 1, dtype=torch.int64, device=rotary.inv_freq.device)
    first, second = turn_angles(rotary, step)[0].chunk(2, -1)
    if not torch.equal(first, second):
        raise NotApplicableError(
            'this rotary embedding turns neighbouring channels, which is not known here; use on_evict="rebuild".'
        )


def turn_angles(rotary: Any, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [1, N, d], of what turns keys on by `shift`, int64 [axes, N], in the model's own layout.

    rotary: the `rotary_emb` of a language model. The sections of M-RoPE are dealt out by it.

    Raises:
        NotApplicableError: it gives a table for each axis (transformers before 5.20), which is not known here.
    """
    ids = shift if len(shift) == 1 else shift[:, None]
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32, device=shift.device), ids)
    if cos.dim() != 3:
        raise NotApplicableError('this rotary embedding keeps its axes apart; use on_evict="rebuild".')
    scale = getattr(rotary, "attention_scaling", 1.0)  # it is in the keys already
    return cos / scale, sin / scale


def turn(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Keys [1, heads, N, D] turned by the angles [1, N, d] (d <= D, the rest is left); computed in float32.

    Pairs of channels are (i, i + d / 2), as in the decoders of transformers for which there are adapters. Source:
    RoFormer: Enhanced Transformer with Rotary Position Embedding (2021); R(a) R(b) = R(a + b).
    """
    d = cos.shape[-1]
    x = keys[..., :d].float()
    first, second = x.chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    turned = (x * c + torch.cat([-second, first], -1) * s).to(keys.dtype)
    return turned if d == keys.shape[-1] else torch.cat([turned, keys[..., d:]], -1)

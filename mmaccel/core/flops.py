"""Closed-form FLOPs of decoder layers, 2 a multiply-accumulate, read off the model's own matrices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

__all__ = ["attention_width", "decoder_flops", "linear_weights", "matrix_weights"]


def linear_weights(block: nn.Module) -> int:
    """Number of weights in the linear layers of a block: each token costs twice as many FLOPs."""
    return sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))


def matrix_weights(module: nn.Module) -> int:
    """Number of weights in all matrices of a module, those that are no linear layer's included."""
    return sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)


def attention_width(config: Any) -> int:
    """Query heads times head size."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head


def decoder_flops(weights: Iterable[int], width: int, tokens: Sequence[float], *, causal: bool = False) -> float:
    """FLOPs of one prompt's prefill.

    weights: `linear_weights` of each layer. tokens: length of the sequence at each layer. Attention counts as a whole
    square, or with `causal` the triangle of it that is used. The output head is not included.
    """
    total = 0.0
    for weight, n in zip(weights, tokens, strict=True):
        pairs = n * (n + 1) / 2 if causal else n * n
        total += 2 * n * weight + 4 * pairs * width
    return total

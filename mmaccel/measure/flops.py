"""FLOPs by torch's counter, and by the closed forms that papers use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["count_flops", "encoder_flops", "paper_prefill_macs", "prefill_flops"]


def count_flops(model: Any, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Count the FLOPs of one call to the first token by torch's counter: "encode", "project", "prefill", "rest", "total".

    A multiply-accumulate counts 2. Counted: matrix products, convolutions, fused attention and the attention-received
    op ("overhead", contained in the stages). Not counted: norms, activations, softmax, sorting, gathering. Attention
    counts whole squares, also where it is causal.
    """
    raise NotImplementedError


def paper_prefill_macs(tokens: Sequence[float], width: int, inner: int) -> float:
    """Sum of `4 n d^2 + 2 n^2 d + 2 n d m` over the decoder layers, `tokens` giving n of each.

    This is what HoliTom and its peers print as FLOPs. It counts multiply-accumulates, keys and values of full width
    and an MLP of two matrices. Seven billion parameters of LLaVA-OneVision (28 layers, n = 6272, d = 3584, m = 18944)
    give 40.8e12.
    """
    raise NotImplementedError


def prefill_flops(config: Any, tokens: Sequence[float], *, causal: bool = False) -> float:
    """FLOPs (2 a multiply-accumulate) of a prefill of a model with this config, `tokens` giving n of each layer.

    Grouped keys and values and the gated MLP are counted as they are; the output head is counted for one token.
    `causal` counts the lower triangle of attention only.
    """
    raise NotImplementedError


def encoder_flops(config: Any, sequences: Sequence[Sequence[float]]) -> float:
    """FLOPs (2 a multiply-accumulate) of a vision tower: `sequences[layer]` holds the lengths that attend together.

    Patch embedding is counted, the projector is not.
    """
    raise NotImplementedError

"""FLOPs by torch's counter, by exact closed forms, and by the closed form that papers print."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmaccel.adapters import video_lm
from mmaccel.core.flops import attention_width, decoder_flops, linear_weights
from mmaccel.errors import MMAccelError
from mmaccel.measure.boundaries import split, watch
from mmaccel.measure.stages import first_token

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mmaccel.measure.boundaries import Spans

__all__ = [
    "OwnFlops",
    "count_flops",
    "counted_flops",
    "encoder_flops",
    "own_flops",
    "paper_prefill_macs",
    "prefill_flops",
]


def _attention_received(q: Any, k: Any, rows: Any, *_: Any, **__: Any) -> int:
    B, H, Sq, D = q
    return 2 * B * H * (Sq if rows is None else rows[1]) * k[2] * D


def _pairwise_match(a: Any, b: Any, *_: Any, **__: Any) -> int:
    B, N, D = a
    return 2 * B * N * b[1] * D


def _greedy_diverse(x: Any, *_: Any, **__: Any) -> int:
    B, N, D = x
    return 2 * B * N * N * D


def _partial_row_attention(q: Any, _k_new: Any, _v_new: Any, _rows: Any, _k: Any, v: Any, *_: Any, **__: Any) -> int:
    B, H, m, D = q
    return 2 * B * H * m * v[2] * (D + v[3])


def count_flops(model: Any, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Count the FLOPs of one call to the first token: encode, project, prefill, rest, their total, and overhead.

    A multiply-accumulate counts 2. Counted are matrix products, convolutions, fused attention (also on a CPU) and the
    similarities, each once, of mmaccel's attention-received, pairwise-match and greedy-diverse ops; "overhead" is what
    mmaccel does of this, contained in the stages. Not counted are norms, activations, softmax, sorting and gathering.
    Attention counts as a whole square, also where it is causal.

    Raises:
        AdapterError: the model is no vision-language model that has an adapter.
    """
    counter = counted_flops()
    with watch(model, counter.get_total_flops) as spans, counter:
        first_token(model, inputs)
    total = counter.get_total_flops()
    stages, own = split(spans.totals(lambda start, end: end - start), total)
    return {**{name: int(value) for name, value in stages.items()}, "total": total, "overhead": int(own)}


class OwnFlops:
    """What of a block's FLOPs, as `count_flops` counts them, is mmaccel's: `scored` in listeners and hooks so far."""

    def __init__(self, spans: Spans, counter: FlopCounterMode) -> None:
        self._spans, self._counter = spans, counter

    @property
    def scored(self) -> int:
        """FLOPs of hooks and listeners up to now; may be read while an encoder runs."""
        return sum(end - start for start, end in self._spans.pairs["own"])

    @property
    def all(self) -> int:
        """FLOPs of the model and mmaccel together up to now; may be read while an encoder runs."""
        return int(self._counter.get_total_flops())

    @property
    def total(self) -> int:
        """FLOPs of hooks, listeners and wrappers; to be read when the call is over."""
        totals = self._spans.totals(lambda start, end: end - start)
        return int(split(totals, self._counter.get_total_flops())[1])


@contextmanager
def own_flops(model: Any) -> Iterator[OwnFlops]:
    """Count mmaccel's own FLOPs in the calls of a block; put on behind all handles.

    Raises:
        AdapterError: the model is no vision-language model that has an adapter.
    """
    counter = counted_flops()
    with watch(model, counter.get_total_flops) as spans, counter:
        yield OwnFlops(spans, counter)


def counted_flops() -> FlopCounterMode:
    """torch's FLOP counter, as a context manager, that knows mmaccel's ops."""
    import mmaccel.kernels.attention_received
    import mmaccel.kernels.greedy_diverse
    import mmaccel.kernels.pairwise_match
    import mmaccel.kernels.partial_row_attention  # noqa: F401 - registers the op, as those above do

    ours = torch.ops.mmaccel
    mapping = {
        ours.attention_received: _attention_received,
        ours.pairwise_match: _pairwise_match,
        ours.greedy_diverse: _greedy_diverse,
        ours.partial_row_attention: _partial_row_attention,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def paper_prefill_macs(tokens: Sequence[float], width: int, inner: int) -> float:
    """Sum of `4 n d^2 + 2 n^2 d + 2 n d m` over the decoder layers: `tokens` gives n of each, d = width, m = inner.

    This is what HoliTom (2025) and its peers print as FLOPs. It counts multiply-accumulates, keys and values of full
    width and an MLP of two matrices. LLaVA-OneVision-7B (28 layers, n = 6272, d = 3584, m = 18944) gives 40.8e12.
    """
    return float(sum(4 * n * width**2 + 2 * n**2 * width + 2 * n * width * inner for n in tokens))


def prefill_flops(model: Any, tokens: Sequence[float], *, causal: bool = False) -> float:
    """FLOPs (2 a multiply-accumulate) of the prefill of one prompt, `tokens` giving its length at each decoder layer.

    Read off the model's own matrices, so grouped keys and values and gated MLPs count as what they are. `causal` counts
    the triangle of attention that is used, where torch's counter has the square. The output head is not included.

    Raises:
        MMAccelError: `tokens` has not one entry a decoder layer.
    """
    site = video_lm(model)
    if len(tokens) != len(site.layers):
        raise MMAccelError(
            f"tokens must have one entry for each of {len(site.layers)} decoder layers, not {len(tokens)}."
        )
    weights = [linear_weights(layer) for layer in site.layers]
    return decoder_flops(weights, attention_width(site.language_model.config), tokens, causal=causal)


def encoder_flops(model: Any, sequences: Sequence[Sequence[float]]) -> float:
    """FLOPs (2 a multiply-accumulate) of the blocks of a vision tower.

    `sequences[layer]` holds the lengths that attend together, as `Shapes.vision` does. Patch embedding, merger and
    projector are not included.

    Raises:
        MMAccelError: `sequences` has not one entry a vision layer.
    """
    blocks = video_lm(model).vision_blocks()
    if len(sequences) != len(blocks):
        raise MMAccelError(f"sequences must have one entry for each of {len(blocks)} layers, not {len(sequences)}.")
    total = 0.0
    for block, lengths in zip(blocks, sequences, strict=True):
        width = _attention_width(block)
        total += 2 * sum(lengths) * linear_weights(block) + 4 * sum(n * n for n in lengths) * width
    return total


def _attention_width(block: nn.Module) -> int:
    # a vision block attends at its own width, which is that of its norms
    weights = (getattr(module, "weight", None) for module in block.modules())
    return next(w.numel() for w in weights if isinstance(w, torch.Tensor) and w.ndim == 1)

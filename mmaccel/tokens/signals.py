"""Signals: how much a token deserves to be kept, as float32 (B, N), higher keeps, -inf where `mask` is False.

`cosine_to_*` are similarities as they stand; where the like is redundant and the unlike is to be kept, take `unlike` of
them (a minus sign would make ineligible tokens the best). NaN features give NaN signals, which `select` refuses.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch

from mmaccel.errors import MethodError
from mmaccel.kernels import attention_received as _op
from mmaccel.kernels.frame_change import frame_change

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "attention_received",
    "change",
    "cosine_to_neighbours",
    "cosine_to_previous_frame",
    "cosine_to_text",
    "gaussian_similarity",
    "last_token_attention",
    "low_variance_channels",
    "min_max",
    "norm",
    "random",
    "temporal_change",
    "uniform",
    "unlike",
]

Measure = Literal["cosine", "l1", "l2"]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _floating(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_floating_point() else x.float()


def _check_measure(measure: str) -> None:
    if measure not in get_args(Measure):
        raise MethodError(f"measure={measure!r} is not known; choose cosine, l1 or l2")


def _check_mask(mask: torch.Tensor | None, shape: torch.Size) -> None:
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        raise MethodError(f"the mask must be bool of shape {tuple(shape)}; got {mask.dtype} {tuple(mask.shape)}")


def _eligible(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    _check_mask(mask, scores.shape)
    return scores.float() if mask is None else scores.float().masked_fill(~mask, -torch.inf)


def _ndim(name: str, x: torch.Tensor, layout: str) -> None:
    if x.ndim != layout.count(",") + 1:
        raise MethodError(f"{name} must have the layout {layout}; got shape {tuple(x.shape)}")


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = _wide(a), _wide(b)
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return ((a * b).sum(-1) / norms.clamp_min(torch.finfo(a.dtype).tiny)).clamp(-1, 1)


def _rank(shape: tuple[int, int], mask: torch.Tensor | None, device: torch.device | str | None) -> torch.Tensor:
    """Number the valid tokens of each item from 0, so that padding and neighbours in the batch change nothing."""
    if mask is None:
        return torch.arange(shape[1], device=device).expand(shape)
    return (mask.cumsum(1) - 1).clamp_min(0)


def attention_received(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    queries: _op.Queries = "all",
    causal: bool = False,
    key_padding: torch.Tensor | None = None,
    query_padding: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Return the attention that each key receives, mean over heads and chosen query rows, as (B, Sk).

    q (B, H, Sq, D), k (B, Hkv, Sk, D). `key_padding` (B, Sk) says which keys take part in the softmax; `mask` (B, Sk)
    which of them are eligible (for instance the visual ones), by default all that take part. The other arguments are
    those of `mmaccel.kernels.attention_received`.
    """
    received = _op.attention_received(
        q, k, queries=queries, causal=causal, key_padding=key_padding, query_padding=query_padding, scale=scale
    )
    return _eligible(_eligible(received, key_padding), mask)


def last_token_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    key_padding: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Return the attention of each item's last valid token to every key, mean over heads, as (B, Sk).

    q (B, H, Sq, D) with Sq = Sk, or Sq = 1 when the caller projected that token alone; k (B, Hkv, Sk, D). Left and
    right padding are both fine: the last valid token sees every valid key. Rank signal of FastV ("An Image is Worth 1/2
    Tokens After Layer 2", 2024) and of HoliTom's inner part.
    """
    _ndim("q", q, "(B, H, Sq, D)")
    if q.shape[2] not in (1, k.shape[2]):
        raise MethodError(f"q must hold the last token alone or every token of the {k.shape[2]} keys; got {q.shape[2]}")
    rows = key_padding if q.shape[2] == k.shape[2] else None
    return attention_received(q, k, queries=1, key_padding=key_padding, query_padding=rows, mask=mask, scale=scale)


def cosine_to_previous_frame(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the cosine of each token with the same position one frame earlier, as (B, T-1, S).

    x (B, T, S, D); mask (B, T, S). Entry t compares frames t and t+1; it is -inf where either token is not valid. This
    is HoliTom's s[t, p]; the signal to keep by is `temporal_change`.
    """
    _ndim("x", x, "(B, T, S, D)")
    _check_mask(mask, x.shape[:3])
    both = None if mask is None else mask[:, 1:] & mask[:, :-1]
    return _eligible(frame_change(_floating(x), measure="similarity").change[:, 1:], both)


def change(
    current: torch.Tensor, previous: torch.Tensor, *, measure: Measure = "l1", mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return how far each token moved from its previous value (frame, step or reference), as (B, N) or (B, T, S).

    current and previous (..., D), equal in shape. "cosine" is 1 - cos, in [0, 2]; "l1" and "l2" are the norm of the
    difference over the norm of `previous`.
    """
    if current.shape != previous.shape:
        raise MethodError(f"current {tuple(current.shape)} and previous {tuple(previous.shape)} must have one shape")
    _check_measure(measure)
    wide = torch.promote_types(current.dtype, previous.dtype)
    now, before = (_floating(x.to(wide)) for x in (current, previous))
    if now.ndim != 3:  # to (items, tokens, channels)
        now, before = (x.flatten(0, -3) if x.ndim > 3 else x[(None,) * (3 - x.ndim)] for x in (now, before))
    moved = frame_change(now[:, None], reference=before, measure=measure).change
    return _eligible(moved.view(current.shape[:-1]), mask)


def temporal_change(
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    measure: Measure = "cosine",
    first: float = torch.inf,
) -> torch.Tensor:
    """Return how far each token moved from the same position one frame earlier, as (B, T, S).

    x (B, T, S, D); mask (B, T, S). A token without a valid predecessor, such as the whole first frame, gets `first`;
    inf keeps it before all others. With the default measure this is the signal of EVS (efficient video sampling, vLLM).
    """
    _ndim("x", x, "(B, T, S, D)")
    _check_mask(mask, x.shape[:3])
    _check_measure(measure)
    moved = frame_change(_floating(x), measure=measure).change
    moved[:, :1] = first
    if mask is not None:
        moved[:, 1:].masked_fill_(~mask[:, :-1], first)
    return _eligible(moved, mask)


def cosine_to_neighbours(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean cosine of each token with its valid neighbours above, below, left and right, as (B, T, H, W).

    x (B, T, H, W, D); mask (B, T, H, W). A token without a valid neighbour gets 0.
    """
    _ndim("x", x, "(B, T, H, W, D)")
    _check_mask(mask, x.shape[:4])
    total = torch.zeros(x.shape[:4], dtype=torch.float32, device=x.device)
    count = torch.zeros_like(total)
    for axis in (2, 3):
        n = x.shape[axis]
        if n < 2:
            continue
        sides = [(0, n - 1), (1, n - 1)]
        valid = torch.ones_like(total.narrow(axis, 0, n - 1), dtype=torch.bool)
        if mask is not None:
            valid = mask.narrow(axis, *sides[0]) & mask.narrow(axis, *sides[1])
        cosine = _cosine(x.narrow(axis, *sides[0]), x.narrow(axis, *sides[1])).float().masked_fill(~valid, 0)
        for side in sides:
            total.narrow(axis, *side).add_(cosine)
            count.narrow(axis, *side).add_(valid)
    return _eligible(total / count.clamp_min(1), mask)


def cosine_to_text(
    x: torch.Tensor,
    text: torch.Tensor,
    mask: torch.Tensor | None = None,
    text_mask: torch.Tensor | None = None,
    *,
    reduce: Literal["max", "mean"] = "max",
) -> torch.Tensor:
    """Return the cosine of each token with the text, the best or the mean over the text tokens, as (B, N).

    x (B, N, D) and text (B, M, D) in one embedding space; mask (B, N), text_mask (B, M). An item without a valid text
    token prefers nothing: 0 for every token.
    """
    _ndim("x", x, "(B, N, D)")
    _ndim("text", text, "(B, M, D)")
    if reduce not in ("max", "mean"):
        raise MethodError(f"reduce={reduce!r} is not known; choose max or mean")
    x, text = _wide(x), _wide(text).to(torch.promote_types(x.dtype, torch.float32))
    cosine = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).mT
    if text_mask is None:
        text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    if text.shape[1] == 0:
        return _eligible(cosine.new_zeros(cosine.shape[:2]), mask)
    valid, there = text_mask[:, None], text_mask.any(1)[:, None]
    if reduce == "max":
        relevance = cosine.masked_fill(~valid, -torch.inf).amax(-1).where(there, cosine.new_zeros(()))
    else:
        relevance = cosine.masked_fill(~valid, 0).sum(-1) / valid.sum(-1).clamp_min(1)
    return _eligible(relevance, mask)


def low_variance_channels(x: torch.Tensor, share: float = 0.5, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the `share` of the channels that vary least over the valid tokens of each item, as int64 (B, C).

    x (B, N, D); C is share * D rounded down, but at least 1; ascending, ties to the lower channel. What hardly varies
    is what the background has in common. VidCom2 (2025) and STC-Pruner compare tokens in these channels.
    """
    _ndim("x", x, "(B, N, D)")
    _check_mask(mask, x.shape[:2])
    if not 0 < share <= 1:
        raise MethodError(f"share={share} of the channels must be in (0, 1]")
    C = max(1, math.floor(share * x.shape[2] + 1e-9))
    valid = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    wide, count = _wide(x).masked_fill(~valid[..., None], 0), valid.sum(1).clamp_min(1)[:, None]
    mean = wide.sum(1) / count
    variance = (wide - mean[:, None]).masked_fill(~valid[..., None], 0).square().sum(1) / count
    return variance.sort(dim=1, stable=True).indices[:, :C].sort(1).values


def gaussian_similarity(
    x: torch.Tensor,
    anchor: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    widths: Sequence[float] = (0.125, 0.25, 0.5, 1.0, 2.0),
) -> torch.Tensor:
    """Return the similarity of each token to an anchor, `sum over widths a of exp(-|x - anchor|^2 / (2 a))`.

    x (..., N, D) and anchor, which broadcasts to it: (D,) is one for all, (..., 1, D) one for each group of tokens.
    Returns (..., N), at most the number of widths. Meant for unit vectors in `low_variance_channels`; the anchor of
    VidCom2 (2025) is the mean of a frame or video, that of STC-Pruner the mean of a frame or of all that has been seen.
    """
    pairs = zip(reversed(anchor.shape[:-1]), reversed(x.shape[:-1]), strict=False)
    if anchor.ndim > x.ndim or anchor.shape[-1:] != x.shape[-1:] or any(a not in (1, n) for a, n in pairs):
        raise MethodError(f"an anchor must broadcast to the tokens {tuple(x.shape)}; got {tuple(anchor.shape)}")
    if not widths or min(widths) <= 0:
        raise MethodError(f"widths={tuple(widths)} must be one or more numbers above 0")
    squared = (_wide(x) - _wide(anchor)).square().sum(-1)
    return _eligible(torch.stack([torch.exp(-squared / (2 * a)) for a in widths]).sum(0), mask)


def min_max(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return scores (B, N) brought to [0, 1], the lowest valid one of each item to 0 and the highest to 1.

    Where all are equal they say nothing: 0. This is the scale on which `select.mmr` weighs scores against cosines.
    """
    _ndim("scores", scores, "(B, N)")
    valid = _eligible(scores, mask) != -torch.inf
    low = scores.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = scores.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    scaled = torch.where(high == low, 0, (scores - low) / (high - low))
    return _eligible(scaled, valid)


def unlike(similarity: torch.Tensor) -> torch.Tensor:
    """Turn a similarity into the signal that keeps the unlike: 1 - similarity, with -inf left as it is."""
    return torch.where(similarity == -torch.inf, similarity, 1 - similarity)


def norm(x: torch.Tensor, mask: torch.Tensor | None = None, *, p: float = 2) -> torch.Tensor:
    """Return the p-norm of each token's features, x (..., D) to (...)."""
    return _eligible(torch.linalg.vector_norm(_wide(x), ord=p, dim=-1), mask)


def random(
    shape: tuple[int, int],
    mask: torch.Tensor | None = None,
    *,
    seed: int = 0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Return a random preference in [0, 1) of shape (B, N), the same on every device.

    The i-th valid token of every item gets the i-th number of the sequence, so that padding and the other items of a
    batch change nothing. `generator` (on the CPU) continues a sequence of its own instead of starting one from `seed`.
    """
    generator = torch.Generator().manual_seed(seed) if generator is None else generator
    device = mask.device if mask is not None else device
    numbers = torch.rand(shape[1], generator=generator).to(device or "cpu")
    return _eligible(numbers[_rank(shape, mask, device)], mask)


def uniform(
    shape: tuple[int, int],
    mask: torch.Tensor | None = None,
    *,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Return a preference of shape (B, N) of which the best k are spread over the valid tokens, for every k.

    The value is one minus the van der Corput sequence (binary digits mirrored at the point) of the token's rank: a half
    keeps every second token, a quarter every fourth. For one known k, `select.evenly_spaced` is even to the last token.
    """
    rank = _rank(shape, mask, mask.device if mask is not None else device)
    mirrored = torch.zeros(rank.shape, dtype=torch.float32, device=rank.device)
    for bit in range(max(1, shape[1] - 1).bit_length()):
        mirrored += ((rank >> bit) & 1) * 0.5 ** (bit + 1)
    return _eligible(1 - mirrored, mask)

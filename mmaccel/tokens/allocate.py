"""Allocation: one budget of tokens, split exactly over frames, segments or layers."""

from __future__ import annotations

import bisect
import math
import numbers
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING

import torch

from mmaccel.errors import MethodError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["merged_per_block", "per_frame", "per_layer", "per_segment", "resolve_keep", "split"]


def resolve_keep(keep: float, n: int) -> int:
    """Turn the knob `keep` into a number of the n tokens.

    A float in (0, 1] is a fraction, rounded half up in decimal (0.29 of 50 is 14.5, so 15) but never below one token;
    an int is the number itself, from 1 to n. With n = 0 there is nothing to keep: 0. Raises MethodError for anything
    else and names the nearest number that can be kept.
    """
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise MethodError(f"keep={keep!r} must be a fraction in (0, 1] or a number of tokens")
    if isinstance(keep, numbers.Integral):
        if keep < 1:
            raise MethodError(f"keep={keep} tokens cannot be kept; the nearest number is 1")
        if keep > n > 0:
            raise MethodError(f"keep={keep} tokens cannot be kept of {n}; the nearest number is {n}")
        return int(keep) if n else 0
    if not 0 < float(keep) <= 1:
        raise MethodError(f"keep={keep} must be a fraction in (0, 1]; write an int for a number of tokens")
    kept = int((Decimal(repr(float(keep))) * n).to_integral_value(ROUND_HALF_UP))
    return min(n, max(1, kept))


def split(
    budget: int | Sequence[int] | torch.Tensor,
    weights: torch.Tensor,
    *,
    floor: int | torch.Tensor = 0,
    capacity: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Split `budget` over groups in proportion to `weights`, so that the shares sum to it exactly.

    weights (G,) or (B, G), finite and not negative (all zero: equal shares); budget one int, or one for each of the B
    items; floor and capacity, ints or tensors that broadcast to `weights`, bound every share. Shares are the weights
    times one factor, clamped to their bounds, then rounded by largest remainder, ties to the lower position. Groups of
    weight zero receive beyond their floor only what the others have no room for. Returns int64 like `weights`.

    Raises MethodError where no split exists, and names the nearest budget for which one does.
    """
    if weights.ndim not in (1, 2):
        raise MethodError(f"weights must be (G,) or (B, G); got {tuple(weights.shape)}")
    rows = weights.detach().to("cpu", torch.float64).reshape(1 if weights.ndim == 1 else len(weights), -1)
    if not bool((rows.isfinite() & (rows >= 0)).all()):
        raise MethodError("weights to split a budget by must be finite and not negative")
    if rows.numel():  # shares depend on ratios alone, and sums of the largest floats overflow
        rows = rows / rows.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)

    def bounds(value: int | torch.Tensor) -> list[list[int]]:
        whole = torch.as_tensor(value)
        if whole.is_floating_point():
            raise MethodError(f"floors and capacities are whole numbers of tokens; got {value!r}")
        whole = whole.to("cpu", torch.int64)
        return whole.broadcast_to(weights.shape).reshape(rows.shape).tolist()

    totals = _totals(budget, len(rows))
    low = bounds(floor)
    high = bounds(capacity) if capacity is not None else [[max(0, total)] * rows.shape[1] for total in totals]
    shares = [_split(total, row, lo, hi) for total, row, lo, hi in zip(totals, rows.tolist(), low, high, strict=True)]
    return torch.tensor(shares, dtype=torch.int64, device=weights.device).reshape(weights.shape)


def per_frame(
    budget: int | Sequence[int] | torch.Tensor,
    weights: torch.Tensor,
    tokens: int | torch.Tensor,
    *,
    floor: int | torch.Tensor = 0,
) -> torch.Tensor:
    """Split a video's budget over its frames: weights (T,) or (B, T), at most `tokens` (int or tensor) a frame."""
    return split(budget, weights, floor=floor, capacity=tokens)


def per_segment(
    budget: int | Sequence[int] | torch.Tensor,
    tokens: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    floor: int | torch.Tensor = 0,
) -> torch.Tensor:
    """Split a budget over segments of `tokens` (G,) or (B, G) tokens each, in proportion to them unless weighted."""
    return split(budget, tokens if weights is None else weights, floor=floor, capacity=tokens)


def per_layer(
    mean: float,
    weights: torch.Tensor,
    tokens: int,
    *,
    floor: int | torch.Tensor = 0,
) -> torch.Tensor:
    """Split a budget over layers: `mean` tokens (or, as a float, that fraction of `tokens`) a layer on average.

    weights (L,), one a layer; a layer holds at most `tokens`. The shares sum to L times the mean, rounded half up.
    """
    layers = weights.shape[-1]
    total = resolve_keep(mean, tokens) * layers if isinstance(mean, int) else resolve_keep(mean, tokens * layers)
    return split(total, weights, floor=floor, capacity=tokens)


def merged_per_block(total: int, tokens: int, weights: torch.Tensor, *, exact: bool = True) -> list[int]:
    """How many of the `tokens` each block merges away, `total` in all, in proportion to `weights` (L,).

    A block merges at most half of what it has, rounded down, since one half is merged into the other. What this
    forbids one block the others make up for, later ones first, so that the sum is `total` wherever it can be, and as
    large as it can be elsewhere. With `exact=False` they do not.
    """
    counts: list[int] = []
    owed, target = 0, tokens - total
    shares = split(total, weights).tolist()
    for block, share in enumerate(shares, 1):
        owed += share
        # what the blocks behind this one can bring down to the target is twice the target for each of them
        count = max(0, owed, tokens - (target << (len(shares) - block))) if exact else share
        counts.append(min(count, tokens // 2))
        owed -= counts[-1]
        tokens -= counts[-1]
    return counts


def _totals(budget: int | Sequence[int] | torch.Tensor, items: int) -> list[int]:
    totals = torch.as_tensor(budget).reshape(-1)
    if totals.is_floating_point() or totals.numel() not in (1, items):
        raise MethodError(f"the budget must be one int or {items} ints, one an item; got {budget!r}")
    return totals.expand(items).tolist()


def _split(total: int, weights: list[float], low: list[int], high: list[int]) -> list[int]:
    if any(lo > hi or lo < 0 for lo, hi in zip(low, high, strict=True)):
        raise MethodError("a floor must not be negative or above its capacity; lower the floor or the number of groups")
    least, most = sum(low), sum(high)
    if not least <= total <= most:
        nearest = min(max(total, least), most)
        raise MethodError(f"a budget of {total} tokens cannot be split here; the nearest one that can is {nearest}")
    zero = [i for i, w in enumerate(weights) if w == 0]
    rest = [i for i, w in enumerate(weights) if w > 0]
    shares = list(low)
    for_rest = min(total - sum(low[i] for i in zero), sum(high[i] for i in rest))
    for part, groups, factors in (
        (for_rest, rest, [weights[i] for i in rest]),
        (total - for_rest, zero, [1.0] * len(zero)),
    ):
        lo, hi = [low[i] for i in groups], [high[i] for i in groups]
        for i, share in zip(groups, _rounded(part, _clamped_shares(part, factors, lo, hi), hi), strict=True):
            shares[i] = share
    return shares


def _clamped_shares(total: int, weights: list[float], low: list[int], high: list[int]) -> list[float]:
    """Real shares clamp(factor * weight, low, high) that sum to `total`; weights are positive, a solution exists."""

    def at(factor: float) -> list[float]:
        return [min(max(factor * w, lo), hi) for w, lo, hi in zip(weights, low, high, strict=True)]

    # The sum is piecewise linear in the factor, with corners where a group meets a bound.
    bounds = zip(weights, low, high, strict=True)
    corners = sorted({bound / w for w, lo, hi in bounds for bound in (lo, hi)})
    right = bisect.bisect_left(corners, total, key=lambda factor: math.fsum(at(factor)))
    if right in (0, len(corners)):
        return [float(lo) for lo in low] if right == 0 else [float(hi) for hi in high]
    left, right = corners[right - 1], corners[right]
    middle = (left + right) / 2
    free = [lo < middle * w < hi for w, lo, hi in zip(weights, low, high, strict=True)]
    held = math.fsum(share for share, is_free in zip(at(middle), free, strict=True) if not is_free)
    weight = math.fsum(w for w, is_free in zip(weights, free, strict=True) if is_free)
    return at((total - held) / weight) if weight else at(right)


def _rounded(total: int, shares: list[float], high: list[int]) -> list[int]:
    """Round down, then hand the missing units to the largest remainders; equal ones (to 1e-9) by position."""
    whole = [int(share) for share in shares]
    order = sorted(
        (i for i in range(len(shares)) if whole[i] < high[i]), key=lambda i: (-round((shares[i] - whole[i]) * 1e9), i)
    )
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return whole

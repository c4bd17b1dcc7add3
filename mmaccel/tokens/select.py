"""Selection: which tokens stay. Exact counts, ascending int64 indices, ties to the lower position, no randomness.

k is one int, or an int64 tensor (B,) with a number for each item; where items differ, indices (B, K) are filled up with
-1 behind the shorter rows. Asking for more tokens than an item has eligible ones is a MethodError that names the
nearest number; NaN is a NonFiniteError.
"""

from __future__ import annotations

from typing import Literal

import torch

from mmaccel.errors import MethodError, NonFiniteError
from mmaccel.kernels.greedy_diverse import greedy_diverse
from mmaccel.kernels.pairwise_match import pairwise_match

__all__ = [
    "best_partner",
    "density_peaks",
    "dpp",
    "evenly_spaced",
    "exact_counts",
    "farthest_point",
    "indices_of",
    "mask_of",
    "mmr",
    "outliers",
    "per_window_top_k",
    "threshold",
    "top_k",
    "top_k_mask",
]


def indices_of(mask: torch.Tensor) -> torch.Tensor:
    """Return the positions of True in each row of mask (B, N), ascending, as (B, K), K the largest count."""
    N = mask.shape[1]
    K = int(mask.sum(1).max()) if mask.numel() else 0
    positions = torch.arange(N, device=mask.device).expand(mask.shape).masked_fill(~mask, N).sort(1).values[:, :K]
    return positions.masked_fill(positions == N, -1)


def mask_of(indices: torch.Tensor, n: int) -> torch.Tensor:
    """Return the bool mask (B, n) of indices (B, K); -1 is skipped."""
    mask = torch.zeros(indices.shape[0], n + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(1, indices.masked_fill(indices < 0, n), True)[:, :n]


def top_k(scores: torch.Tensor, k: int | torch.Tensor) -> torch.Tensor:
    """Return the indices of the k highest scores of each item: scores (B, N) to (B, K). -inf is never chosen."""
    counts = exact_counts(k, _eligible(scores))
    best = scores.sort(dim=1, descending=True, stable=True).indices
    return _ascending(best[:, : _largest(counts)], counts)


def top_k_mask(scores: torch.Tensor, k: int | torch.Tensor) -> torch.Tensor:
    """Return the same choice as `top_k` as a bool mask (B, N)."""
    return mask_of(top_k(scores, k), scores.shape[1])


def per_window_top_k(scores: torch.Tensor, windows: int | torch.Tensor, k: int = 1) -> torch.Tensor:
    """Return the k best tokens of each of `windows` contiguous windows, as (B, windows * k).

    The eligible tokens of an item, in order, are cut into nearly equal windows, of which the first (n mod windows) hold
    one token more: spatially even coverage without clustering (EarlyTom, "Early Token Compression Completes Fast Video
    Understanding"). `windows` is an int or (B,).
    """
    eligible = _eligible(scores)
    if k < 1:
        raise MethodError(f"k={k} winners of a window were asked for; at least 1 is needed")
    counts = exact_counts(torch.as_tensor(windows) * k, eligible) // k
    n, m = eligible.sum(1, keepdim=True), counts[:, None].clamp_min(1)
    rank, size, longer = eligible.cumsum(1) - 1, n // m, n % m
    behind = longer * (size + 1)
    window = torch.where(rank < behind, rank // (size + 1), longer + (rank - behind) // size.clamp_min(1))
    window = window.masked_fill(~eligible | (counts[:, None] == 0), scores.shape[1])

    best = scores.sort(dim=1, descending=True, stable=True).indices
    grouped = window.gather(1, best).sort(dim=1, stable=True)
    place = torch.arange(scores.shape[1], device=scores.device) - torch.searchsorted(grouped.values, grouped.values)
    wins = (place < k) & (grouped.values < scores.shape[1])
    return indices_of(torch.zeros_like(wins).scatter_(1, best.gather(1, grouped.indices), wins))


def threshold(scores: torch.Tensor, value: float, *, minimum: int = 0) -> torch.Tensor:
    """Return the bool mask (B, N) of scores above `value`, and of the best `minimum` of each item in any case."""
    above = _eligible(scores) & (scores > value)
    return above | top_k_mask(scores, minimum) if minimum else above


def outliers(scores: torch.Tensor, *, factor: float = 1.5, minimum: int = 0) -> torch.Tensor:
    """Return the bool mask (B, N) of unusually high scores, and of the best `minimum` of each item in any case.

    High is above `Q3 + factor * (Q3 - Q1)`, the quartiles of an item's eligible scores, interpolated linearly: Tukey's
    fences, "Exploratory Data Analysis" (1977), by which LLaVA-PruMerge (2024) counts the tokens worth keeping.
    """
    eligible = _eligible(scores)
    if bool((scores == torch.inf).any()):
        raise NonFiniteError("scores that quartiles are taken of must be finite; got inf")
    if scores.shape[1] == 0:
        return eligible
    ordered = scores.masked_fill(~eligible, torch.inf).sort(1).values
    last = (eligible.sum(1, keepdim=True) - 1).clamp_min(0)

    def quantile(q: float) -> torch.Tensor:
        place = q * last
        below = place.floor().long()
        a, b = ordered.gather(1, below), ordered.gather(1, torch.minimum(below + 1, last))
        return a + (b - a) * (place - below)

    low, high = quantile(0.25), quantile(0.75)
    above = eligible & (scores > high + factor * (high - low))
    return above | top_k_mask(scores, minimum) if minimum else above


def evenly_spaced(n: int, k: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Return k of n positions, each in the middle of one of k equal parts, as (k,); k = n is every position."""
    if not 0 <= k <= n:
        raise MethodError(f"{k} of {n} positions were asked for; the nearest number is {min(max(k, 0), n)}")
    return ((2 * torch.arange(k, device=device) + 1) * n) // (2 * max(k, 1))


def best_partner(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    metric: Literal["cosine", "euclidean"] = "cosine",
    exclude_self: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for each row of `a`, its most similar row of `b` (ties: the first) and their similarity.

    a (B, N, D), b (B, M, D), mask (B, M) the rows of b that may be chosen. The similarity is the cosine, or minus the
    euclidean distance. Both results are (B, N), int64 and float32; -1 and -inf where b has no valid row. `exclude_self`
    forbids equal row numbers. Never holds the full matrix of many tokens.
    """
    return pairwise_match(a, b, mask=mask, metric=metric, exclude_self=exclude_self)


def farthest_point(x: torch.Tensor, k: int | torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Choose k tokens greedily so that each next one is farthest from all chosen: x (B, N, D) to (B, K).

    Distance is 1 - cosine; the first is the token whose nearest neighbour is farthest. Max-min diversity as in DivPrune
    ("Diversity-based Visual Token Pruning for Large Multimodal Models", 2025).
    """
    return _chosen(_floating(x), k, _valid(x, mask), "farthest")


def mmr(
    scores: torch.Tensor,
    x: torch.Tensor,
    k: int | torch.Tensor,
    *,
    balance: float = 0.5,
    per_round: int = 1,
) -> torch.Tensor:
    """Choose k tokens by maximal marginal relevance: scores (B, N), x (B, N, D) to (B, K).

    The first is the best score; each next one maximises `balance * score - (1 - balance) * s`, s its largest cosine
    with a chosen token. balance 1 is `top_k`. per_round > 1 picks that many at once between two updates of s: faster,
    approximate. Scores should lie in [0, 1], the scale of the cosines. Carbonell and Goldstein, "The Use of MMR,
    Diversity-Based Reranking for Reordering Documents and Producing Summaries" (1998); for visual tokens "IDPruner:
    Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs".
    """
    if not 0 <= balance <= 1 or per_round < 1:
        raise MethodError(f"balance={balance} must be in [0, 1] and per_round={per_round} at least 1")
    eligible = _valid(x, _eligible(scores))
    if bool((scores == torch.inf).any()):
        raise NonFiniteError("scores that are weighed against similarities must be finite; got inf")
    scores = _floating(scores)
    return _chosen(_floating(x), k, eligible, "mmr", scores=scores, balance=balance, per_round=per_round)


def dpp(
    x: torch.Tensor,
    k: int | torch.Tensor,
    *,
    scores: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose k tokens that greedily maximise the determinant of their kernel matrix: x (B, N, D) to (B, K).

    The kernel is `scores_i * cos(x_i, x_j) * scores_j`; scores (B, N) are qualities, at least 0 (none: 1), and -inf
    where not eligible. Once the chosen tokens span the rest up to rounding, the lowest positions follow. Incremental
    Cholesky factor, O(K^2 N) beside the similarities: Chen et al., "Fast Greedy MAP Inference for Determinantal Point
    Process to Improve Recommendation Diversity" (2018).
    """
    if scores is not None:
        mask = _eligible(scores) if mask is None else _eligible(scores) & mask
    eligible = _valid(x, mask)
    if scores is not None:
        if bool(((scores < 0) & eligible).any()) or bool((scores == torch.inf).any()):
            raise MethodError("the qualities of a determinantal process must be finite and not negative")
        scores = _floating(scores)
    return _chosen(_floating(x), k, eligible, "dpp", scores=scores)


def density_peaks(
    x: torch.Tensor, k: int | torch.Tensor, *, mask: torch.Tensor | None = None, neighbours: int = 7
) -> torch.Tensor:
    """Choose k cluster centres: tokens in dense places, far from any denser token. x (B, N, D) to (B, K).

    With d the euclidean distance over sqrt(D): density = exp(-mean of d^2 to the min(neighbours, k) nearest, itself
    included); the score is the density times the distance to the nearest denser token (the largest distance of all for
    the densest). Equal densities count as falling with the position, where HoliTom's code adds random noise. Distances
    below 0.3 % of the features' length are taken as 0. Holds a matrix (B, N, N). Du et al., "Study on Density Peaks
    Clustering Based on k-Nearest Neighbors" (2016), as used by HoliTom (2025).
    """
    if neighbours < 1:
        raise MethodError(f"neighbours={neighbours} must be at least 1")
    eligible = _valid(x, mask)
    counts = exact_counts(k, eligible)
    N, D = x.shape[1:]
    if _largest(counts) == 0:
        return torch.empty(x.shape[0], 0, dtype=torch.int64, device=x.device)
    squared = _squared_distances(x, eligible) / D
    both = eligible[:, :, None] & eligible[:, None]

    near = squared.masked_fill(~both, torch.inf).topk(min(neighbours, N), largest=False, sorted=True).values
    # Rows may ask for different k, and near rows may run out of valid tokens.
    taken = torch.minimum(counts, eligible.sum(1)).clamp(1, neighbours)[:, None, None]
    counted = torch.arange(near.shape[-1], device=x.device) < taken
    log_density = -near.masked_fill(~counted, 0).sum(-1) / taken[..., 0]

    earlier = torch.ones(N, N, dtype=torch.bool, device=x.device).tril(-1)
    mine, other = log_density[:, :, None], log_density[:, None]
    denser = ((other > mine) | ((other == mine) & earlier)) & both
    gap = squared.masked_fill(~denser, torch.inf).amin(-1)
    gap = torch.where(gap == torch.inf, squared.masked_fill(~both, 0).amax((1, 2))[:, None], gap)
    # The logarithm of the product: an exponential that underflows to 0 would make all far tokens equal.
    lowest = torch.finfo(squared.dtype).min / 2
    score = log_density + gap.log().clamp_min(lowest) / 2
    return top_k(score.masked_fill(~eligible, -torch.inf), counts)


def _squared_distances(x: torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
    x = _wide(x).masked_fill(~eligible[..., None], 0)
    x = x - x.sum(1, keepdim=True) / eligible.sum(1).clamp_min(1)[:, None, None]
    square = (x * x).sum(-1)
    sums = square[:, :, None] + square[:, None]
    squared = (sums - 2 * (x @ x.mT)).clamp_min(0)
    # Differences below the rounding of the product are noise, and noise must not order equal tokens.
    squared = squared.masked_fill(squared <= 32 * torch.finfo(x.dtype).eps * sums, 0)
    return torch.minimum(squared, squared.mT)


def _chosen(
    x: torch.Tensor,
    k: int | torch.Tensor,
    eligible: torch.Tensor,
    method: Literal["mmr", "dpp", "farthest"],
    *,
    scores: torch.Tensor | None = None,
    balance: float = 0.5,
    per_round: int = 1,
) -> torch.Tensor:
    counts = exact_counts(k, eligible)
    picks, _ = greedy_diverse(
        x,
        counts,
        method=method,
        scores=scores,
        mask=eligible,
        balance=balance,
        per_round=per_round,
        limit=_largest(counts),
    )
    return _ascending(picks, counts)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _floating(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_floating_point() else x.float()


def _eligible(scores: torch.Tensor) -> torch.Tensor:
    if scores.ndim != 2:
        raise MethodError(f"scores must be (B, N); got {tuple(scores.shape)}")
    if bool(scores.isnan().any()):
        raise NonFiniteError("the scores to select by hold NaN; look for the module that they were computed from")
    return scores > -torch.inf


def _valid(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if x.ndim != 3:
        raise MethodError(f"features must be (B, N, D); got {tuple(x.shape)}")
    if mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    elif mask.shape != x.shape[:2] or mask.dtype != torch.bool:
        raise MethodError(f"the mask must be bool of shape {tuple(x.shape[:2])}; got {mask.dtype} {tuple(mask.shape)}")
    # many times faster than isfinite().all(), and exact: NaN and infinity times 0 are NaN
    finite = (x * 0).sum(-1) == 0
    if not bool(finite.masked_fill(~mask, True).all()):
        raise NonFiniteError("the features to select by hold NaN or infinity; look for the module that produced them")
    return mask


def exact_counts(k: int | torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
    """Return k as int64 (B,), one number an item, checked against what is eligible (B, N)."""
    counts = torch.as_tensor(k, device=eligible.device)
    if counts.is_floating_point() or counts.dtype == torch.bool or counts.ndim > 1:
        raise MethodError(f"k must be an int or an int tensor (B,); got {k!r}")
    available = eligible.sum(1)
    if counts.ndim == 1 and counts.shape != available.shape:
        raise MethodError(f"k must hold one number for each of {len(available)} items; got {len(counts)}")
    counts = counts.to(torch.int64).expand(len(available))
    wrong = (counts < 0) | (counts > available)
    if bool(wrong.any()):
        item = int(wrong.nonzero()[0])
        wanted, n = int(counts[item]), int(available[item])
        raise MethodError(
            f"{wanted} tokens cannot be chosen of the {n} eligible ones of item {item}; "
            f"the nearest number is {min(max(wanted, 0), n)}"
        )
    return counts


def _largest(counts: torch.Tensor) -> int:
    return int(counts.max()) if counts.numel() else 0


def _ascending(picks: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Keep the first counts[b] picks of each row, sorted, -1 behind."""
    behind = torch.iinfo(torch.int64).max
    live = torch.arange(picks.shape[1], device=picks.device) < counts[:, None]
    picks = picks.masked_fill(~live, behind).sort(1).values
    return picks.masked_fill(picks == behind, -1)

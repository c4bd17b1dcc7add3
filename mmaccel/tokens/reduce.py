"""Reduction: drop tokens, or merge them into fewer, each with a size, so that the merge can be undone in shape.

Every merge here is a `Merge`: which output each token goes to and with which weight. It is built once from whatever the
tokens are compared by, and applied to as many tensors as needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from mmaccel.errors import MethodError, NonFiniteError
from mmaccel.kernels.pairwise_match import pairwise_match
from mmaccel.kernels.scatter_merge import scatter_merge, unmerge
from mmaccel.tokens.place import Mix, Reduction
from mmaccel.tokens.select import exact_counts, indices_of, mask_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Merge",
    "absorb_nearest",
    "bipartite",
    "drop",
    "joined",
    "merge_as_weighted",
    "merge_by_assignment",
    "merge_dropped_into_kept",
    "merge_to_centres",
    "nearest_centre",
    "side_by_side",
]


def drop(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the tokens at indices (B, K): x (B, N, ...) to (B, K, ...); -1 gives a row of zeros."""
    _fits(x, indices, "indices")
    shape = (*indices.shape, *x.shape[2:])
    if 0 in shape or x.shape[1] == 0:
        return x.new_zeros(shape)
    wide = indices.reshape(*indices.shape, *[1] * (x.ndim - 2))
    return x.gather(1, wide.clamp_min(0).expand(shape)).masked_fill(wide < 0, 0)


@dataclass(frozen=True, eq=False)
class Merge:
    """N tokens become K: token n goes to output `assignment[b, n]` with weight `weight[b, n]`.

    kept: int64 (B, K), the token that each output stands for (its position, its place in the sequence), -1 for outputs
    without any. assignment: int64 (B, N), -1 for tokens that go nowhere (padding, or vanished). weight: float32 (B, N),
    summing to 1 over the tokens of an output. sizes: float32 (B, K), how many original tokens each output holds; they
    sum to the sizes of all assigned tokens.
    """

    kept: torch.Tensor
    assignment: torch.Tensor
    weight: torch.Tensor
    sizes: torch.Tensor

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the merge: x (B, N, ...) to (B, K, ...), summed in float32 or wider, in the dtype of x.

        A token that is alone in its output passes through bit for bit. On CUDA the order of the sum, and so its last
        bit, may vary from run to run unless torch.use_deterministic_algorithms is on.
        """
        _fits(x, self.assignment, "tokens to merge", same=True)
        if not x.is_floating_point():
            raise MethodError(f"only floating-point tokens can be merged; got {x.dtype}")
        merged = scatter_merge(_rows(x), self.assignment, self.weight, self.kept.shape[1])
        return merged.view(*self.kept.shape, *x.shape[2:])

    def unmerge(self, y: torch.Tensor) -> torch.Tensor:
        """Give every token the value of its output: y (B, K, ...) to (B, N, ...); zeros where it has none."""
        _fits(y, self.kept, "tokens to unmerge", same=True)
        return unmerge(_rows(y), self.assignment).view(*self.assignment.shape, *y.shape[2:])

    def then(self, later: Merge) -> Merge:
        """This merge and then `later`, which takes this one's outputs, as one; `later`'s own sizes are not read."""
        _fits(self.kept, later.assignment, "outputs to merge further", same=True)
        there, gone = self.assignment.clamp_min(0), self.assignment < 0
        if not self.kept.shape[1]:
            return Merge(later.kept, self.assignment, self.weight, later.sizes)
        kept = self.kept.gather(1, later.kept.clamp_min(0)).masked_fill(later.kept < 0, -1)
        assignment = later.assignment.gather(1, there).masked_fill(gone, -1)
        weight = (self.weight * later.weight.gather(1, there)).masked_fill(gone, 0)
        B, K = later.kept.shape
        sizes = self.sizes.new_zeros(B * (K + 1)).index_add_(0, _flat(later.assignment, K), self.sizes.flatten())
        return Merge(kept, assignment, weight, sizes.view(B, K + 1)[:, :K])

    def reduction(self, item: int) -> Reduction:
        """Return the merge of one item in the form that `place` puts into a sequence."""
        slots = (self.kept[item] >= 0).nonzero().squeeze(1)
        assignment = self.assignment[item]
        members = torch.bincount(assignment[assignment >= 0], minlength=self.kept.shape[1])
        cols = ((assignment >= 0) & (members[assignment.clamp_min(0)] > 1)).nonzero().squeeze(1)
        number = torch.full_like(self.kept[item], -1)
        number[slots] = torch.arange(len(slots), device=slots.device)
        mix = Mix(number[assignment[cols]], cols, self.weight[item, cols]) if len(cols) else None
        return Reduction(self.kept[item, slots], mix)


def merge_by_assignment(assignment: torch.Tensor, n_out: int, size: torch.Tensor | None = None) -> Merge:
    """Merge the tokens that share an output into their mean, weighted by size.

    assignment: int64 (B, N) in [0, n_out), or -1 for none; size: (B, N), how many original tokens each one holds, above
    0 (none: 1). Each output stands at its first token. An output without tokens is zero, with size 0 and kept -1.
    """
    if assignment.ndim != 2 or assignment.dtype != torch.int64:
        raise MethodError(f"the assignment must be int64 (B, N); got {assignment.dtype} {tuple(assignment.shape)}")
    if assignment.numel() and not -1 <= int(assignment.min()) <= int(assignment.max()) < n_out:
        raise MethodError(f"the assignment holds outputs outside [-1, {n_out})")
    B, N = assignment.shape
    first = torch.full((B * (n_out + 1),), N, dtype=torch.int64, device=assignment.device)
    positions = torch.arange(N, device=assignment.device).expand(B, N).reshape(-1)
    first = first.scatter_reduce(0, _flat(assignment, n_out), positions, "amin").view(B, n_out + 1)[:, :n_out]
    return _mean(first.masked_fill(first == N, -1), assignment, size)


def merge_as_weighted(kept: torch.Tensor, assignment: torch.Tensor, weight: torch.Tensor) -> Merge:
    """Put the outputs of one item, found group by group in any order, into the order of the tokens that they stand at.

    kept: int64 (K,), distinct; assignment: int64 (N,), numbers of entries of `kept`, -1 for tokens that vanish; weight:
    float32 (N,), summing to 1 over the tokens of an output. The merge has one item, its `kept` ascends.
    """
    kept, order = kept.sort()
    number = torch.cat([order.argsort(), order.new_full((1,), -1)])
    assignment = number[assignment]
    sizes = torch.bincount(assignment[assignment >= 0], minlength=len(kept)).float()
    return Merge(kept[None], assignment[None], weight.float().masked_fill(assignment < 0, 0)[None], sizes[None])


def nearest_centre(
    x: torch.Tensor,
    centres: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    metric: Literal["cosine", "euclidean"] = "euclidean",
) -> torch.Tensor:
    """Assign each token to its nearest centre (ties: the first), as (B, N) numbers of centres.

    x (B, N, D); centres (B, K), positions in x, -1 for none. A centre is assigned to itself; where mask (B, N) is
    False, or an item has no centre, the assignment is -1.
    """
    _fits(x, centres, "centres")
    assignment, similarity = pairwise_match(x, drop(x, centres), mask=centres >= 0, metric=metric)
    there = (centres >= 0).any(1)[:, None]
    if mask is not None:
        assignment, similarity, there = (
            assignment.masked_fill(~mask, -1),
            similarity.masked_fill(~mask, 0),
            there & mask,
        )
    # a token without a nearest centre is so large that its distances overflow
    _comparable(similarity.masked_fill((assignment < 0) & there, torch.nan))
    B, K = centres.shape
    own = torch.arange(K, device=x.device).expand(B, K)
    padded = torch.cat([assignment, assignment.new_full((B, 1), -1)], 1)
    return padded.scatter(1, centres.masked_fill(centres < 0, x.shape[1]), own)[:, :-1]


def merge_to_centres(
    x: torch.Tensor,
    centres: torch.Tensor,
    *,
    beta: float = 0.6,
    mask: torch.Tensor | None = None,
    size: torch.Tensor | None = None,
    metric: Literal["cosine", "euclidean"] = "euclidean",
    with_centre: bool = False,
) -> Merge:
    """Merge every token into its nearest centre: `beta * centre + (1 - beta) * mean(members)`.

    x (B, N, D) is what nearness is measured in; centres (B, K) are positions, -1 for none; members are the tokens of a
    centre without itself, weighted alike; a centre without members stays as it is. Where an item has no centre, its
    tokens vanish. Sizes are counted, not used as weights. Cluster merge of HoliTom (2025). `with_centre` counts the
    centre among its n members, and beta is then at least 1 / (n + 1), as in FastVID (2025).
    """
    if not 0 <= beta <= 1:
        raise MethodError(f"beta={beta} must be in [0, 1]")
    assignment = nearest_centre(x, centres, mask=mask, metric=metric)
    plain = _mean(centres, assignment, None)
    centre = mask_of(centres, x.shape[1])
    members = plain.sizes.gather(1, assignment.clamp_min(0)) - 1 if centres.shape[1] else plain.weight
    if with_centre:
        members = members + 1
        own = (1 / (members + 1)).clamp_min(beta)
        weight = torch.where(members == 1, 1.0, (1 - own) / members.clamp_min(1) + own * centre)
    else:
        weight = torch.where(centre, beta, (1 - beta) / members.clamp_min(1))
        weight = torch.where(centre & (members == 0), 1.0, weight)
    weight = weight.masked_fill(assignment < 0, 0)
    return Merge(centres, assignment, weight, _mean(centres, assignment, size).sizes)


def merge_dropped_into_kept(
    metric: torch.Tensor,
    kept: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    size: torch.Tensor | None = None,
) -> Merge:
    """Merge every token that is not kept into the kept one most like it, as one mean of all, weighted by size.

    metric (B, N, D), compared by cosine; kept (B, K), positions, -1 for none; mask, size (B, N). HoliTom's inner merge
    (2025); its code halves `kept <- (kept + dropped) / 2` token after token instead, which depends on the order.
    """
    return _mean(kept, nearest_centre(metric, kept, mask=mask, metric="cosine"), size)


def absorb_nearest(x: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor, neighbours: int) -> Reduction:
    """Let every kept token of one item take in the tokens most like it: `(kept + sum w_j x_j) / (1 + sum w_j)`.

    x (N, D), compared by cosine, ties to the lower position; kept int64 (K,); weight (N,), finite and at least 0.
    `neighbours` others of all N are taken in, or as many as there are; the same one may be taken in by several, and
    counts in the size of each. Cluster update of LLaVA-PruMerge (2024), whose code does not divide; here a field
    of equal tokens stays what it is.
    """
    if weight.shape != x.shape[:1] or not bool((weight.isfinite() & (weight >= 0)).all()):
        raise MethodError(f"the weights of {len(x)} tokens must be finite and not negative, one a token")
    count = min(neighbours, len(x) - 1)
    if count < 1 or len(kept) == 0:
        return Reduction(kept)
    unit = torch.nn.functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
    similarity = unit[kept] @ unit.mT
    _comparable(similarity)
    similarity.scatter_(1, kept[:, None], -torch.inf)
    near = similarity.sort(dim=1, descending=True, stable=True).indices[:, :count]
    shares = torch.cat([weight.new_ones(len(kept), 1), weight[near]], 1).float()
    shares = shares / shares.sum(1, keepdim=True)
    rows = torch.arange(len(kept), device=x.device).repeat_interleave(count + 1)
    return Reduction(kept, Mix(rows, torch.cat([kept[:, None], near], 1).flatten(), shares.flatten()))


def joined(parts: Sequence[Reduction], sizes: Sequence[int]) -> Reduction:
    """Return the reductions of consecutive groups, such as frames, of `sizes` tokens each as one of all of them."""
    if len(parts) != len(sizes):
        raise MethodError(f"{len(parts)} reductions were given for {len(sizes)} groups; give one for each group")
    indices, mixes, done, start = [], [], 0, 0
    for part, size in zip(parts, sizes, strict=True):
        indices.append(part.index + start)
        if part.mix is not None:
            mixes.append(Mix(part.mix.rows + done, part.mix.cols + start, part.mix.weights))
        done, start = done + len(part.index), start + size
    whole = torch.cat(indices)
    if not mixes:
        return Reduction(whole)
    names = ("rows", "cols", "weights")
    return Reduction(whole, Mix(*(torch.cat([getattr(mix, name) for mix in mixes]) for name in names)))


def side_by_side(merge: Merge, groups: int) -> Merge:
    """Return the merges of `groups` consecutive groups of tokens an item, (B * groups, N) to (B * groups, K), as one.

    The result is from (B, groups * N) to (B, groups * K), group after group.
    """
    (G, K), N = merge.kept.shape, merge.assignment.shape[1]
    if groups == 1:
        return merge
    number = torch.arange(G, device=merge.kept.device)[:, None] % groups
    kept = torch.where(merge.kept < 0, -1, merge.kept + number * N)
    assignment = torch.where(merge.assignment < 0, -1, merge.assignment + number * K)
    parts = (kept, assignment, merge.weight, merge.sizes)
    return Merge(*(part.unflatten(0, (-1, groups)).flatten(1) for part in parts))


def bipartite(
    metric: torch.Tensor,
    r: int | torch.Tensor,
    *,
    destinations: torch.Tensor | None = None,
    protect: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    size: torch.Tensor | None = None,
) -> Merge:
    """Merge the r tokens that are most like their best partner in a disjoint set into that partner.

    metric (B, N, D), compared by cosine. destinations: bool (B, N), the tokens that may receive others; the rest are
    sources. Without it sources and destinations alternate over the valid tokens, as in ToMe ("Token Merging: Your ViT
    But Faster", 2023), and protected tokens take no part at all. protect: bool (B, N), never merged away. r: an int or
    (B,); more than there are unprotected sources is an error. Means are weighted by size (B, N), if given. Outputs, all
    but r of the valid tokens, stay in order; ties between pairs go to the lower source.
    """
    B, N = metric.shape[:2]
    valid = torch.ones(B, N, dtype=torch.bool, device=metric.device) if mask is None else mask
    free = valid if protect is None else valid & ~protect
    if destinations is None:
        odd = (valid.cumsum(1) - 1) % 2 == 1
        sources, receivers = free & ~odd, free & odd
    else:
        sources, receivers = free & ~destinations, valid & destinations
    receivers_at, sources_at = indices_of(receivers), indices_of(sources)
    partner, similarity = pairwise_match(drop(metric, sources_at), drop(metric, receivers_at), mask=receivers_at >= 0)
    similarity = similarity.masked_fill(sources_at < 0, -torch.inf)
    _comparable(similarity)
    counts = exact_counts(r, similarity > -torch.inf)

    rank = similarity.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    merged = rank < counts[:, None]
    goes_to = torch.full((B, N + 1), -1, dtype=torch.int64, device=metric.device)
    if receivers_at.shape[1]:
        target = receivers_at.gather(1, partner.clamp_min(0)).masked_fill(~merged, -1)
        goes_to.scatter_(1, sources_at.masked_fill(sources_at < 0, N), target)
    goes_to = goes_to[:, :N]
    survives = valid & (goes_to < 0)
    slot = (survives.cumsum(1) - 1).masked_fill(~survives, -1)
    assignment = torch.where(goes_to >= 0, slot.gather(1, goes_to.clamp_min(0)), slot)
    return _mean(indices_of(survives), assignment, size)


def _mean(kept: torch.Tensor, assignment: torch.Tensor, size: torch.Tensor | None) -> Merge:
    """The size-weighted mean of the tokens of each output."""
    B, K = kept.shape
    ones = torch.ones(assignment.shape, dtype=torch.float32, device=assignment.device)
    if size is not None and size.shape != assignment.shape:
        raise MethodError(f"the sizes must be {tuple(assignment.shape)}; got {tuple(size.shape)}")
    if size is not None and bool(((size <= 0) & (assignment >= 0)).any()):
        raise MethodError("a token holds at least one original token; sizes must be above 0")
    weight = (ones if size is None else size.float()).masked_fill(assignment < 0, 0)
    sizes = weight.new_zeros(B * (K + 1)).index_add_(0, _flat(assignment, K), weight.flatten()).view(B, K + 1)
    total = sizes.gather(1, assignment.masked_fill(assignment < 0, K))
    return Merge(kept, assignment, torch.where(assignment < 0, 0, weight / total), sizes[:, :K])


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))


def _flat(assignment: torch.Tensor, K: int) -> torch.Tensor:
    """Number the outputs through all items, K + 1 an item, the last one for tokens that go nowhere."""
    offset = torch.arange(assignment.shape[0], device=assignment.device)[:, None] * (K + 1)
    return (assignment.masked_fill(assignment < 0, K) + offset).flatten()


def _comparable(similarity: torch.Tensor) -> None:
    if bool(similarity.isnan().any()):
        raise NonFiniteError(
            "the features to merge by hold NaN or infinity, or numbers whose products overflow; look for the module "
            "that produced them"
        )


def _fits(x: torch.Tensor, index: torch.Tensor, name: str, same: bool = False) -> None:
    wrong = x.ndim < 2 or index.ndim != 2 or index.dtype != torch.int64 or x.shape[0] != index.shape[0]
    if wrong or (same and x.shape[1] != index.shape[1]):
        raise MethodError(f"the {name} do not fit: tensor {tuple(x.shape)}, index {index.dtype} {tuple(index.shape)}")

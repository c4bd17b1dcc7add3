"""Greedy choice of diverse tokens, one after another, each weighed against those chosen before.

Max-min diversity (DivPrune), maximal marginal relevance (IDPruner) and the greedy determinantal process (CDPruner)
choose this way. Each step is tiny, so on a GPU a loop in Python waits for launches; there, one kernel runs all steps.
It is the torch custom op `mmaccel::greedy_diverse`; `mmaccel.kernels` says which backend runs.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from mmaccel.errors import MethodError
from mmaccel.kernels.dispatch import backend, choose, no_triton
from mmaccel.kernels.greedy_diverse import cpu, reference
from mmaccel.kernels.pairwise_match import pairwise_match

__all__ = ["greedy_diverse"]

Rule = Literal["mmr", "dpp", "farthest"]

# Similarities of one item that the Triton path holds: 2 GB of float32, 23170 tokens.
_LARGEST = 1 << 29


def greedy_diverse(
    x: torch.Tensor,
    k: int | torch.Tensor,
    *,
    method: Rule = "mmr",
    scores: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    balance: float = 0.5,
    per_round: int = 1,
    limit: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose k tokens of each item one after another; ties go to the lower position.

    x (B, N, D), floating. k: an int, or an int tensor (B,). mask: bool (B, N), the tokens that may be chosen; scores
    (B, N), floating, -inf where a token may not be. With s_i the largest cosine of token i with a chosen one:

    "mmr": the first is the best score; each next one maximises `balance * score_i - (1 - balance) * s_i`. per_round > 1
    chooses that many at once between two updates of s. Carbonell and Goldstein, "The Use of MMR, Diversity-Based
    Reranking for Reordering Documents and Producing Summaries" (1998).
    "farthest": without scores; the first is the token whose nearest neighbour is farthest, each next one minimises s_i.
    Max-min diversity as in DivPrune, "Diversity-based Visual Token Pruning for Large Multimodal Models" (2025).
    "dpp": each next one maximises the determinant of the kernel `scores_i * cos(x_i, x_j) * scores_j` of the chosen;
    scores are qualities, at least 0 (none: 1). What is left of a token's own square counts as 0 below 1e-5 of it, and
    tokens with 0 left follow by position. Chen et al., "Fast Greedy MAP Inference for Determinantal Point Process to
    Improve Recommendation Diversity" (2018).

    Returns picks, int64 (B, K), in the order chosen and -1 behind, and counts, int64 (B,), how many each item has: k,
    or as many tokens as may be chosen if that is less, or 0 if the features or the score of such a token are NaN or
    infinite, or a quality is negative. K is the largest k, at most N. A tensor k on a GPU is waited for to know K,
    unless `limit` bounds it (then K is min(limit, N), and so is each count); under torch.compile K is then N.
    Cosines are float32, float64 for float64. Raises MethodError for arguments that do not fit.
    """
    _check(x, k, method, scores, mask, balance, per_round, limit)
    B, N, _ = x.shape
    eligible = torch.ones((B, N), dtype=torch.bool, device=x.device) if mask is None else mask
    # many times faster than isfinite().all(), and exact: NaN and infinity times 0 are NaN
    sound = (x * 0).sum(-1) == 0
    if scores is not None:
        eligible = eligible & (scores != -torch.inf)
        sound = sound & scores.isfinite()
        if method == "dpp":
            sound = sound & (scores >= 0)
    counts = eligible.sum(1).masked_fill((eligible & ~sound).any(1), 0)
    if isinstance(k, int):
        K = k
    elif limit is not None:
        K = limit
    else:
        K = N if torch.compiler.is_compiling() or N == 0 or B == 0 else int(k.max())
    K = max(0, min(K, N))
    counts = counts.clamp(max=K)
    if not isinstance(k, int):
        counts = torch.minimum(counts, k.to(device=x.device, dtype=torch.int64)).clamp_min(0)

    if method == "farthest":
        if x.device.type == "cpu" and backend() != "triton" and not torch.compiler.is_compiling():
            scores = cpu.alone(x, eligible)
        else:
            scores = -pairwise_match(x, x, mask=eligible, exclude_self=True)[1]
    elif scores is None:
        scores = torch.ones((B, N), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    picks = torch.ops.mmaccel.greedy_diverse(x, scores, eligible, counts, K, method, float(balance), per_round)
    return picks, counts


def _check(
    x: torch.Tensor,
    k: int | torch.Tensor,
    method: str,
    scores: torch.Tensor | None,
    mask: torch.Tensor | None,
    balance: float,
    per_round: int,
    limit: int | None,
) -> None:
    if method not in get_args(Rule):
        raise MethodError(f"method={method!r} is not known; choose one of {', '.join(get_args(Rule))}")
    if x.ndim != 3 or not x.is_floating_point():
        raise MethodError(f"features must be floating (B, N, D); got {x.dtype} {tuple(x.shape)}")
    if isinstance(k, torch.Tensor):
        if k.is_floating_point() or k.dtype == torch.bool or k.shape != x.shape[:1]:
            raise MethodError(
                f"a tensor k must hold one integer for each of {len(x)} items; got {k.dtype} {tuple(k.shape)}"
            )
    elif not isinstance(k, int) or isinstance(k, bool) or k < 0:
        raise MethodError(f"k={k!r} must be an int of at least 0, or an int tensor (B,)")
    if limit is not None and limit < 0:
        raise MethodError(f"limit={limit} picks of an item cannot be; give at least 0")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2] or mask.device != x.device):
        raise MethodError(
            f"the mask must be bool of shape {tuple(x.shape[:2])} on {x.device}; got {mask.dtype} {tuple(mask.shape)} "
            f"on {mask.device}"
        )
    if scores is None and method == "mmr":
        raise MethodError("mmr weighs similarity against relevance; give scores")
    if scores is not None and method == "farthest":
        raise MethodError("farthest looks at distances only; give no scores, or choose mmr")
    if scores is not None and (
        scores.shape != x.shape[:2] or not scores.is_floating_point() or scores.device != x.device
    ):
        raise MethodError(
            f"scores must be floating, of shape {tuple(x.shape[:2])}, on {x.device}; got {scores.dtype} "
            f"{tuple(scores.shape)} on {scores.device}"
        )
    if not 0 <= balance <= 1 or per_round < 1 or (per_round > 1 and method != "mmr"):
        raise MethodError(
            f"balance={balance} must be in [0, 1], and per_round={per_round} at least 1, and 1 but for mmr"
        )


def _run(
    x: torch.Tensor,
    scores: torch.Tensor,
    eligible: torch.Tensor,
    counts: torch.Tensor,
    K: int,
    method: str,
    balance: float,
    per_round: int,
) -> torch.Tensor:
    reason = no_triton(x, scores)
    if reason is None and per_round > 1:
        reason = f"per_round={per_round} needs a sort of all tokens in every round"
    if reason is None and x.shape[1] ** 2 > _LARGEST:
        reason = f"the similarities of {x.shape[1]} tokens are more than {_LARGEST} numbers"
    if choose("greedy_diverse", x.device, triton_missing=reason) == "triton":
        from mmaccel.kernels.greedy_diverse import triton

        return triton.greedy_diverse(x, scores, eligible, counts, K, method, balance, _LARGEST)
    if x.device.type == "cpu" and method != "dpp" and per_round == 1:
        return cpu.marginal(x, scores, eligible, counts, K, method, balance)
    return reference.greedy_diverse(x, scores, eligible, counts, K, method, balance, per_round)


def _fake(
    x: torch.Tensor,
    scores: torch.Tensor,  # noqa: ARG001
    eligible: torch.Tensor,  # noqa: ARG001
    counts: torch.Tensor,  # noqa: ARG001
    K: int,
    method: str,  # noqa: ARG001
    balance: float,  # noqa: ARG001
    per_round: int,  # noqa: ARG001
) -> torch.Tensor:
    return x.new_empty((x.shape[0], K), dtype=torch.int64)


# torch.library.custom_op would import torch._dynamo at the first eager call.
_library = torch.library.Library("mmaccel", "FRAGMENT")
_library.define(
    "greedy_diverse(Tensor x, Tensor scores, Tensor eligible, Tensor counts, SymInt K, str method, float balance,"
    " int per_round) -> Tensor"
)
_library.impl("greedy_diverse", _run, "CompositeExplicitAutograd")
torch.library.register_fake("mmaccel::greedy_diverse", _fake, lib=_library)

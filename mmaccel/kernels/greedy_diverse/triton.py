"""`greedy_diverse` on a GPU: the similarities in one matrix product, then one launch, a program an item.

A program walks through all tokens of its item once a pick: it enters the last pick into the state of every token and
finds the next best in the same pass. The state, and one row of similarities a pick, come from the L2 cache, so an item
takes microseconds a pick, however many items there are. The determinantal process also reads the rows of its Cholesky
factor so far: K^2 N / 2 numbers through one multiprocessor, which is slow beyond some hundreds of picks of some
thousands of tokens.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# Triton reads annotations while it compiles, so they must not become strings here.
import torch
import triton
import triton.language as tl

__all__ = ["greedy_diverse"]


@triton.jit
def _greedy_kernel(
    gram, scores, state, floor, factor, taken, counts, picks, N, K, weight, penalty,
    DPP: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    gram += item * N * N
    scores += item * N
    state += item * N
    floor += item * N
    taken += item * N
    factor += item * K * N
    count = tl.load(counts + item).to(tl.int32)
    pick = tl.full([], 0, tl.int64)
    left = tl.full([], 0.0, tl.float32)
    for step in range(count):
        best = tl.full([BN], float("-inf"), tl.float32)
        place = tl.zeros([BN], tl.int64)
        later = step > 0
        last = tl.full([], -1, tl.int64) + step
        for start in range(0, N, BN):
            n = start + tl.arange(0, BN).to(tl.int64)
            inside = n < N
            update = inside & later
            gone = tl.load(taken + n, mask=inside, other=1) != 0
            gone = gone | ((n == pick) & later)
            tl.store(taken + n, gone.to(tl.int8), mask=update)
            similar = tl.load(gram + pick * N + n, mask=update, other=0.0)
            known = tl.load(state + n, mask=inside, other=0.0)
            if DPP:
                for before in range(0, step - 1, BS):
                    s = before + tl.arange(0, BS).to(tl.int64)
                    done = s < last
                    mine = tl.load(factor + s * N + pick, mask=done, other=0.0)
                    others = tl.load(factor + s[:, None] * N + n[None], mask=done[:, None] & inside[None], other=0.0)
                    similar -= tl.sum(mine[:, None] * others, 0)
                row = tl.where(left > 0.0, similar / tl.sqrt(tl.maximum(left, 1.1754943508222875e-38)), 0.0)
                tl.store(factor + last * N + n, row, mask=update)
                rest = known - row * row
                rest = tl.where(rest <= tl.load(floor + n, mask=inside, other=0.0), 0.0, rest)
                worth = tl.where(later, rest, known)
                tl.store(state + n, worth, mask=update)
            else:
                nearest = tl.maximum(known, similar)
                tl.store(state + n, nearest, mask=update)
                score = tl.load(scores + n, mask=inside, other=0.0)
                worth = tl.where(later, weight * score - penalty * nearest, score)
            worth = tl.where(gone, float("-inf"), worth)
            better = worth > best
            place = tl.where(better, n, place)
            best = tl.where(better, worth, best)
        left = tl.max(best, 0)
        pick = tl.min(tl.where(best == left, place, N - 1), 0)
        tl.store(picks + item * K + step, pick)
        # rows of the factor are read by other threads than those that wrote them
        tl.debug_barrier()


def greedy_diverse(
    x: torch.Tensor,
    scores: torch.Tensor,
    eligible: torch.Tensor,
    counts: torch.Tensor,
    K: int,
    method: str,
    balance: float,
    largest: int,
) -> torch.Tensor:
    """Equal to reference.py but for choices between tokens whose worth differs by rounding; same arguments.

    `largest`: how many similarities are held at once; items that do not fit run in groups, one after another.
    """
    B, N, _ = x.shape
    picks = torch.full((B, K), -1, dtype=torch.int64, device=x.device)
    if 0 in (B, N, K):
        return picks
    together = max(1, largest // (N * N))
    for start in range(0, B, together):
        items = slice(start, start + together)
        _choose(x[items], scores[items].float(), eligible[items], counts[items], picks[items], method, balance)
    return picks


def _choose(
    x: torch.Tensor,
    scores: torch.Tensor,
    eligible: torch.Tensor,
    counts: torch.Tensor,
    picks: torch.Tensor,
    method: str,
    balance: float,
) -> None:
    """Write the picks of one group of items."""
    B, N, _ = x.shape
    K = picks.shape[1]
    dpp = method == "dpp"
    scores = scores.masked_fill(~eligible, 0)
    if method == "farthest":
        scores = scores.clamp(max=torch.finfo(torch.float32).max)  # an only token has no neighbour
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    if dpp:
        # A square taken from the rounded unit vector would make equal tokens differ in the last bit.
        state = (unit.any(-1) * scores).square()
        floor = 1e-5 * state
        unit = unit * scores[..., None]
        factor = unit.new_empty((B, K, N))
    else:
        state = unit.new_full((B, N), -torch.inf)
        floor = factor = state  # pointers that are not read
    BN = min(2048, max(128, triton.next_power_of_2(N)))
    _greedy_kernel[(B,)](
        unit @ unit.mT, scores.contiguous(), state, floor, factor, (~eligible).to(torch.int8).contiguous(),
        counts.contiguous(), picks, N, K, float(balance) if method == "mmr" else 0.0,
        1.0 - balance if method == "mmr" else 1.0, DPP=dpp, BN=BN, BS=8, num_warps=8,
    )  # fmt: skip

"""`pairwise_match` on a GPU: a program keeps the best row of b for a block of rows of a, while it walks through b.

float16 and bfloat16 are multiplied as they are, on tensor cores, with float32 sums; the lengths of the rows, which
cosines are divided by, are float32 factors after the product, so no normalised copy is made or rounded. Where few rows
of a meet many of b, the rows of b are divided among programs, whose winners are compared at the end.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# Triton reads annotations while it compiles, so they must not become strings here.
import torch
import triton
import triton.language as tl

from mmaccel.kernels.tiles import widen

__all__ = ["pairwise_match"]

_BLOCK_M, _BLOCK_N = 64, 128
# Programs that fill a large GPU twice over.
_ENOUGH = 264


@triton.jit
def _match_kernel(
    a, b, scale, half, mask, index, value, N, M, D, share, splits,
    a_b, a_n, a_d, b_b, b_n, b_d,
    EUCLIDEAN: tl.constexpr, HAS_MASK: tl.constexpr, EXCLUDE: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    rows = tl.cdiv(N, BM)
    item = tl.program_id(0).to(tl.int64) // rows
    split = tl.program_id(1).to(tl.int64)
    m = (tl.program_id(0) % rows).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    mine = a + item * a_b + m[:, None] * a_n
    theirs = b + item * b_b
    best = tl.full([BM], float("-inf"), tl.float32)
    place = tl.full([BM], -1, tl.int64)
    begin = (split * share).to(tl.int32)
    end = tl.minimum(begin + share, M)
    for start in range(begin, end, BN):
        n = start + tl.arange(0, BN).to(tl.int64)
        inside = n < end
        if HAS_MASK:
            inside = inside & (tl.load(mask + item * M + n, mask=inside, other=0) != 0)
        similarity = tl.zeros([BM, BN], tl.float32)
        for channel in range(0, D, BD):
            at = channel + d.to(tl.int64)
            rows_a = tl.load(mine + at[None] * a_d, mask=(m < N)[:, None] & (at < D)[None], other=0.0)
            rows_b = tl.load(
                theirs + n[:, None] * b_n + at[None] * b_d, mask=inside[:, None] & (at < D)[None], other=0.0
            )
            if WIDE:
                rows_a, rows_b = rows_a.to(tl.float32), rows_b.to(tl.float32)
            similarity = tl.dot(rows_a, tl.trans(rows_b), similarity, input_precision="ieee")
        if EUCLIDEAN:
            similarity = similarity - tl.load(half + item * M + n, mask=inside, other=0.0)[None]
        else:
            similarity = similarity * tl.load(scale + item * M + n, mask=inside, other=0.0)[None]
        # NaN is the largest of all, and finite rows never reach infinity
        similarity = tl.where(similarity != similarity, float("inf"), similarity)
        allowed = inside[None] & (m >= 0)[:, None]
        if EXCLUDE:
            allowed = allowed & (m[:, None] != n[None])
        similarity = tl.where(allowed, similarity, float("-inf"))
        top = tl.max(similarity, 1)
        first = tl.min(tl.where(similarity == top[:, None], n[None], M), 1)
        better = top > best
        place = tl.where(better, first, place)
        best = tl.where(better, top, best)
    out = (item * splits + split) * N + m
    tl.store(index + out, place, mask=m < N)
    tl.store(value + out, tl.where(best == float("inf"), float("nan"), best), mask=m < N)


def pairwise_match(
    a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None, euclidean: bool, exclude_self: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equal to reference.py up to rounding; same arguments."""
    (B, N, D), M = a.shape, b.shape[1]
    if 0 in (B, N, M):
        return a.new_full((B, N), -1, dtype=torch.int64), a.new_full((B, N), -torch.inf, dtype=torch.float32)
    scale = half = lengths = a  # a pointer that is not read
    if euclidean:
        a, b = a.float(), b.float()
        if mask is None:
            centre = b.mean(1, keepdim=True)
        else:
            number = mask.sum(1).clamp_min(1)[:, None, None]
            centre = b.masked_fill(~mask[..., None], 0).sum(1, keepdim=True) / number
        centre = centre.nan_to_num()
        a, b = a - centre, b - centre
        half = (b * b).sum(-1) / 2
    else:
        lengths, scale = (1 / torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp_min(1e-12) for x in (a, b))
    allowed = None if mask is None else mask.contiguous()

    programs = B * triton.cdiv(N, _BLOCK_M)
    splits = min(triton.cdiv(_ENOUGH, programs), triton.cdiv(M, 4 * _BLOCK_N))
    share = triton.cdiv(triton.cdiv(M, splits), _BLOCK_N) * _BLOCK_N
    splits = triton.cdiv(M, share)
    index = a.new_empty((B, splits, N), dtype=torch.int64)
    value = a.new_empty((B, splits, N), dtype=torch.float32)
    # products of float32 run without tensor cores, and wide tiles of it would not fit into registers
    BD = min(32 if a.dtype == torch.float32 else 64, max(16, triton.next_power_of_2(D)))
    _match_kernel[(programs, splits)](
        a, b, scale, half, allowed, index, value, N, M, D, share, splits, *a.stride(), *b.stride(),
        EUCLIDEAN=euclidean, HAS_MASK=mask is not None, EXCLUDE=exclude_self, WIDE=widen(a.dtype),
        BM=_BLOCK_M, BN=_BLOCK_N, BD=BD, num_warps=8,
    )  # fmt: skip
    if splits > 1:
        winner = value.argmax(1, keepdim=True)
        index, value = index.gather(1, winner), value.gather(1, winner)
    index, value = index[:, 0], value[:, 0]
    if euclidean:
        nearest = b.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, D))
        value = torch.where(value == -torch.inf, value, -torch.linalg.vector_norm(a - nearest, dim=-1))
        return index.masked_fill(value == -torch.inf, -1), value
    # a row without a match may have no finite length
    return index, torch.where(index < 0, value, value * lengths)

"""`attention_received` on a GPU: two sweeps over q k^T, neither of which writes the map.

The first sweep finds the softmax normaliser of every chosen row (as flash attention does), the second one recomputes
the logits of one block of keys against all rows and adds the probabilities up in registers. That is the work of one
flash attention forward: two matrix products. Column sums have one writer each, so they are the same in every run;
diagonal sums are added atomically, so their last bit may vary.
"""

# pyright: reportArgumentType=false
# Triton reads annotations while it compiles, so they must not become strings here.
import torch
import triton
import triton.language as tl

from mmaccel.kernels.tiles import head_tiles, widen

__all__ = ["MAX_HEAD", "attention_received"]

MAX_HEAD = 256

_BLOCK_M, _BLOCK_N = 64, 64


@triton.jit
def _logits(q1, q2, k1, k2, D2: tl.constexpr):
    scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    if D2 > 0:
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")
    return scores


@triton.jit
def _tile(base, at, keep, stride, stride_d, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, WIDE: tl.constexpr):
    """Rows `at` (0 where not `keep`) in two parts: the largest power of two of the head, and the rest."""
    d1 = tl.arange(0, D1)
    there = keep[:, None]
    if D1 > D:
        there = there & (d1 < D)[None]
    part1 = tl.load(base + at[:, None] * stride + d1[None] * stride_d, mask=there, other=0.0)
    part2 = part1
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        part2 = tl.load(
            base + at[:, None] * stride + d2[None] * stride_d, mask=keep[:, None] & (d2 < D)[None], other=0.0
        )
    if WIDE:
        part1, part2 = part1.to(tl.float32), part2.to(tl.float32)
    return part1, part2


@triton.jit
def _chosen(rows, b, m, M, HAS_ROWS: tl.constexpr):
    """The query row of each place `m`, -1 where there is none."""
    if HAS_ROWS:
        return tl.load(rows + b * M + m, mask=m < M, other=-1)
    return tl.where(m < M, m, -1).to(tl.int64)


@triton.jit
def _normaliser_kernel(
    q, k, rows, padding, lse, M, Sk, past, scale,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, HAS_ROWS: tl.constexpr,
    HAS_PADDING: tl.constexpr, CAUSAL: tl.constexpr,
    WIDE: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # strides come in units, for the compiler to see that every row starts at a whole 16 bytes
    q_b, q_h, q_s = q_b * UNIT, q_h * UNIT, q_s * UNIT
    k_b, k_h, k_s = k_b * UNIT, k_h * UNIT, k_s * UNIT
    blocks = tl.cdiv(M, BM)
    bh = tl.program_id(0).to(tl.int64) // blocks
    b, h = bh // H, bh % H
    m = (tl.program_id(0) % blocks).to(tl.int64) * BM + tl.arange(0, BM)
    at = _chosen(rows, b, m, M, HAS_ROWS)
    there = at >= 0
    q1, q2 = _tile(q + b * q_b + h * q_h, at, there, q_s, q_d, D, D1, D2, WIDE)
    keys = k + b * k_b + (h // G) * k_h
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    end = Sk
    if CAUSAL:
        end = tl.minimum(Sk, tl.max(at, 0) + past + 1).to(tl.int32)
    for start in range(0, end, BN):
        n = start + tl.arange(0, BN).to(tl.int64)
        valid = n < Sk
        if HAS_PADDING:
            valid = valid & (tl.load(padding + b * Sk + n, mask=valid, other=0) != 0)
        k1, k2 = _tile(keys, n, valid, k_s, k_d, D, D1, D2, WIDE)
        seen = there[:, None] & valid[None]
        if CAUSAL:
            seen = seen & (n[None] <= at[:, None] + past)
        scores = tl.where(seen, _logits(q1, q2, k1, k2, D2) * scale, float("-inf"))
        above = tl.maximum(top, tl.max(scores, 1))
        # a row that has seen no key yet has no maximum to subtract
        base = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        top = above
    # rows without a key weigh nothing; NaN goes through
    nothing = total == 0.0
    sum_of = tl.where(nothing, 1.0, total)
    normaliser = tl.where(nothing, float("inf"), tl.where(top == float("-inf"), 0.0, top) + tl.log2(sum_of))
    tl.store(lse + bh * M + m, normaliser, mask=m < M)


@triton.jit
def _columns_kernel(
    q, k, rows, padding, lse, out, M, Sk, past, scale,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, HAS_ROWS: tl.constexpr,
    HAS_PADDING: tl.constexpr, CAUSAL: tl.constexpr,
    DIAGONAL: tl.constexpr, WIDE: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    q_b, q_h, q_s = q_b * UNIT, q_h * UNIT, q_s * UNIT
    k_b, k_h, k_s = k_b * UNIT, k_h * UNIT, k_s * UNIT
    blocks = tl.cdiv(Sk, BN)
    bh = tl.program_id(0).to(tl.int64) // blocks
    b, h = bh // H, bh % H
    first = tl.program_id(0) % blocks * BN
    n = first.to(tl.int64) + tl.arange(0, BN)
    valid = n < Sk
    if HAS_PADDING:
        valid = valid & (tl.load(padding + b * Sk + n, mask=valid, other=0) != 0)
    k1, k2 = _tile(k + b * k_b + (h // G) * k_h, n, valid, k_s, k_d, D, D1, D2, WIDE)
    queries = q + b * q_b + h * q_h
    received = tl.zeros([BN], tl.float32)
    begin = 0
    if CAUSAL and not HAS_ROWS:
        begin = tl.maximum(0, first - past) // BM * BM
    for start in range(begin, M, BM):
        m = start + tl.arange(0, BM).to(tl.int64)
        at = _chosen(rows, b, m, M, HAS_ROWS)
        there = at >= 0
        q1, q2 = _tile(queries, at, there, q_s, q_d, D, D1, D2, WIDE)
        normaliser = tl.load(lse + bh * M + m, mask=m < M, other=float("inf"))
        seen = there[:, None] & valid[None]
        if CAUSAL:
            seen = seen & (n[None] <= at[:, None] + past)
        share = tl.where(seen, tl.exp2(_logits(q1, q2, k1, k2, D2) * scale - normaliser[:, None]), 0.0)
        if DIAGONAL:
            tl.atomic_add(out + bh * Sk + (at[:, None] + past - n[None]), share, mask=seen)
        else:
            received += tl.sum(share, 0)
    if not DIAGONAL:
        tl.store(out + bh * Sk + n, received, mask=n < Sk)


def attention_received(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor | None,
    key_padding: torch.Tensor | None,
    causal: bool,
    heads: bool,
    scale: float,
    diagonal: bool,
) -> torch.Tensor:
    """Equal to reference.py up to rounding; same arguments. Heads of at most `MAX_HEAD` channels."""
    B, H, Sq, D = q.shape
    Hkv, Sk = k.shape[1:3]
    M = Sq if rows is None else rows.shape[1]
    if 0 in (B, H, M, Sk):
        return q.new_zeros((B, H, Sk) if heads else (B, Sk), dtype=torch.float32)
    past = Sk - Sq
    rows = None if rows is None else rows.contiguous()
    padding = None if key_padding is None else key_padding.contiguous()
    lse = q.new_empty(B, H, M, dtype=torch.float32)
    make = q.new_zeros if diagonal else q.new_empty
    out = make(B, H, Sk, dtype=torch.float32)
    D1, D2 = head_tiles(D)
    unit = 16 // q.element_size()
    if any(stride % unit for x in (q, k) for stride in x.stride()[:3]) or q.stride(3) * k.stride(3) != 1:
        unit = 1
    shared = {
        "H": H, "G": H // Hkv, "D": D, "UNIT": unit, "HAS_ROWS": rows is not None,
        "HAS_PADDING": padding is not None, "CAUSAL": causal,
        "WIDE": widen(q.dtype), "D1": D1, "D2": D2, "BM": _BLOCK_M, "BN": _BLOCK_N,
    }  # fmt: skip
    # powers of two are cheaper than powers of e
    sizes = (M, Sk, past, scale * 1.4426950408889634, *_strides(q, unit), *_strides(k, unit))
    grid = (triton.cdiv(M, _BLOCK_M) * B * H,)
    _normaliser_kernel[grid](q, k, rows, padding, lse, *sizes, **shared)
    grid = (triton.cdiv(Sk, _BLOCK_N) * B * H,)
    _columns_kernel[grid](q, k, rows, padding, lse, out, *sizes, DIAGONAL=diagonal, **shared)
    out /= _counted(rows, padding, B, Sq, past, causal, q.device)[:, None, None]
    return out if heads else out.mean(1)


def _strides(x: torch.Tensor, unit: int) -> tuple[int, ...]:
    return *(stride // unit for stride in x.stride()[:3]), x.stride(3)


def _counted(
    rows: torch.Tensor | None, padding: torch.Tensor | None, B: int, Sq: int, past: int, causal: bool,
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """float32 [B]: how many chosen rows see a key, at least 1, without a wait for the GPU."""
    at = torch.arange(Sq, device=device).expand(B, Sq) if rows is None else rows
    counted = at >= 0
    if padding is not None:
        any_key = padding.any(1, keepdim=True)
        counted = counted & any_key
        if causal:
            counted = counted & (at + past >= padding.int().argmax(1, keepdim=True))
    return counted.sum(1).clamp_min(1).float()

"""`partial_row_attention` on a GPU: one launch writes the new rows, the next one is a flash attention of m queries.

Two launches, because every program of the second one reads all rows, and only the end of a launch makes the writes of
all programs visible. The attention keeps no map: each program goes over the keys once, with a running maximum.
"""

# pyright: reportArgumentType=false
# Triton reads annotations while it compiles, so they must not become strings here.
import torch
import triton
import triton.language as tl

from mmaccel.kernels.tiles import head_tiles, widen

__all__ = ["partial_row_attention"]

_COPIED = 32  # rows of one program that writes


@triton.jit
def _copy(new, cache, m, at, keep, new_m, new_d, cache_n, cache_d, D: tl.constexpr, WIDTH: tl.constexpr):
    d = tl.arange(0, WIDTH)
    mask = keep[:, None] & (d < D)[None]
    values = tl.load(new + m[:, None] * new_m + d[None] * new_d, mask=mask)
    tl.store(cache + at[:, None] * cache_n + d[None] * cache_d, values, mask=mask)


@triton.jit
def _write_kernel(
    k_new, v_new, rows, k, v, M, N,
    kn_b, kn_h, kn_m, kn_d, vn_b, vn_h, vn_m, vn_d, r_b, r_m, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    Hkv: tl.constexpr, HAS_K: tl.constexpr, HAS_V: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(M, BM)
    bh = pid // blocks
    b, h = bh // Hkv, bh % Hkv
    m = (pid % blocks) * BM + tl.arange(0, BM)
    at = tl.load(rows + b * r_b + m * r_m, mask=m < M, other=-1)
    keep = (at >= 0) & (at < N)
    if HAS_K:
        _copy(k_new + b * kn_b + h * kn_h, k + b * k_b + h * k_h, m, at, keep, kn_m, kn_d, k_n, k_d, D, WIDTH)
    if HAS_V:
        _copy(v_new + b * vn_b + h * vn_h, v + b * v_b + h * v_h, m, at, keep, vn_m, vn_d, v_n, v_d, Dv, WIDTH_V)


@triton.jit
def _part(
    base, at, keep, stride, stride_d,
    D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Channels from FIRST on of the rows `at`; 0 where not `keep` (if MASKED) and beyond the head."""
    d = FIRST + tl.arange(0, WIDTH)
    places = base + at[:, None] * stride + d[None] * stride_d
    # a mask that is always true would still cost predicates in the inner loop
    if MASKED:
        values = tl.load(places, mask=keep[:, None] & (d < D)[None], other=0.0)
    elif FIRST + WIDTH > D:
        values = tl.load(places, mask=(d < D)[None], other=0.0)
    else:
        values = tl.load(places)
    if WIDE:
        values = values.to(tl.float32)
    return values


@triton.jit
def _step(
    q1, q2, top, total, acc1, acc2, at, start, offsets, k, v, padding, N, scale, k_n, k_d, v_n, v_d, p_n,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_PADDING: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, Dv: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
):  # fmt: skip
    """Take in the keys from `start` on. Without MASKED all of them are there and every query sees them."""
    first = tl.cast(start, tl.int64)
    n = first + offsets
    valid = n < N
    if HAS_PADDING:
        valid = valid & (tl.load(padding + n * p_n, mask=valid, other=0) != 0)
    keys = k + first * k_n
    scores = tl.dot(q1, tl.trans(_part(keys, offsets, valid, k_n, k_d, D, 0, D1, MASKED, WIDE)), input_precision="ieee")
    if D2 > 0:
        k2 = _part(keys, offsets, valid, k_n, k_d, D, D1, D2, MASKED, WIDE)
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")
    scores = scores * scale
    if MASKED:
        seen = valid[None]
        if CAUSAL:
            seen = seen & (n.to(tl.int32)[None] <= at.to(tl.int32)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    above = tl.maximum(top, tl.max(scores, 1))
    # a row that has seen no key yet has no maximum to subtract
    base = tl.where(above == float("-inf"), 0.0, above)
    shares = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(shares, 1)
    values = v + first * v_n
    v1 = _part(values, offsets, valid, v_n, v_d, Dv, 0, V1, MASKED, WIDE)
    shares = shares.to(v1.dtype)
    acc1 = tl.dot(shares, v1, acc1 * shrink[:, None], input_precision="ieee")
    if V2 > 0:
        v2 = _part(values, offsets, valid, v_n, v_d, Dv, V1, V2, MASKED, WIDE)
        acc2 = tl.dot(shares, v2, acc2 * shrink[:, None], input_precision="ieee")
    return above, total, acc1, acc2


@triton.jit
def _attend_kernel(
    q, rows, k, v, padding, out, M, N, scale,
    q_b, q_h, q_m, q_d, r_b, r_m, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, p_b, p_n, o_b, o_h, o_m,
    H: tl.constexpr, G: tl.constexpr, HAS_PADDING: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, Dv: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    # Strides come in units, for the compiler to see that every row starts at a whole 16 bytes.
    k_b, k_h, k_n = k_b * UNIT, k_h * UNIT, k_n * UNIT
    v_b, v_h, v_n = v_b * UNIT, v_h * UNIT, v_n * UNIT
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(M, BM)
    bh = pid // blocks
    b, h = bh // H, bh % H
    m = (pid % blocks) * BM + tl.arange(0, BM)
    at = tl.load(rows + b * r_b + m * r_m, mask=m < M, other=-1)
    there = (at >= 0) & (at < N)
    queries = q + b * q_b + h * q_h
    q1 = _part(queries, m, there, q_m, q_d, D, 0, D1, True, WIDE)
    q2 = q1
    if D2 > 0:
        q2 = _part(queries, m, there, q_m, q_d, D, D1, D2, True, WIDE)
    k += b * k_b + (h // G) * k_h
    v += b * v_b + (h // G) * v_h
    if HAS_PADDING:
        padding += b * p_b

    # Keys before `clear` are seen by every row of the block, keys from `end` on by none.
    reach = tl.where(there, N, 0)
    if CAUSAL:
        reach = tl.where(there, at + 1, 0)
    end = tl.cast(tl.max(reach, 0), tl.int32)
    clear = end // BN * BN
    if CAUSAL:
        clear = tl.minimum(end, tl.cast(tl.min(tl.where(there, at + 1, N), 0), tl.int32)) // BN * BN
    if HAS_PADDING:
        clear = end * 0

    offsets = tl.arange(0, BN).to(tl.int64)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc1 = tl.zeros([BM, V1], tl.float32)
    acc2 = acc1
    if V2 > 0:
        acc2 = tl.zeros([BM, V2], tl.float32)
    if not HAS_PADDING:
        for start in range(0, clear, BN):
            top, total, acc1, acc2 = _step(
                q1, q2, top, total, acc1, acc2, at, start, offsets, k, v, padding, N, scale,
                k_n, k_d, v_n, v_d, p_n, False, CAUSAL, HAS_PADDING, WIDE, D, D1, D2, Dv, V1, V2,
            )  # fmt: skip
    for start in range(clear, end, BN):
        top, total, acc1, acc2 = _step(
            q1, q2, top, total, acc1, acc2, at, start, offsets, k, v, padding, N, scale,
            k_n, k_d, v_n, v_d, p_n, True, CAUSAL, HAS_PADDING, WIDE, D, D1, D2, Dv, V1, V2,
        )  # fmt: skip

    # a row without a key has a total of 0, and NaN goes through
    weight = tl.where(there & (total != 0.0), 1.0 / tl.where(total == 0.0, 1.0, total), 0.0)
    target = out + b * o_b + h * o_h + m[:, None] * o_m
    d1 = tl.arange(0, V1)
    tl.store(
        target + d1[None],
        tl.where(there[:, None], acc1 * weight[:, None], 0.0).to(out.dtype.element_ty),
        mask=(m < M)[:, None] & (d1 < Dv)[None],
    )
    if V2 > 0:
        d2 = V1 + tl.arange(0, V2)
        tl.store(
            target + d2[None],
            tl.where(there[:, None], acc2 * weight[:, None], 0.0).to(out.dtype.element_ty),
            mask=(m < M)[:, None] & (d2 < Dv)[None],
        )


def _unit(*caches: torch.Tensor) -> int:
    """How many channels fill 16 bytes, if all rows start at such places; else 1."""
    unit = 16 // caches[0].element_size()
    whole = all(x.stride(3) == 1 and all(stride % unit == 0 for stride in x.stride()[:3]) for x in caches)
    return unit if whole else 1


def _blocks(m: int, longest: int, width: int) -> tuple[int, int, dict[str, int]]:
    """Queries and keys of one step, and how it is launched, for heads of `longest` channels of `width` bytes.

    Keys and values of all stages, and the queries, must fit the shared memory of one multiprocessor, and the sums its
    registers: float32 products do not run on tensor cores and hold their operands in registers too.
    """
    if m <= 32:
        BM = 16 if m <= 16 else 32
    else:
        # twice the rows read each key half as often, unless the last block would be mostly empty
        BM = 128 if width == 2 and longest <= 128 and triton.cdiv(m, 128) * 128 <= 1.15 * m else 64
    if width == 2:
        warps, stages = 8 if BM == 128 or longest > 128 else 4, 3 if longest <= 128 else 2
        return BM, 64 if longest <= 128 else 32, {"num_warps": warps, "num_stages": stages}
    return BM, 32 if longest <= 96 else 16, {"num_warps": 8 if BM == 64 else 4, "num_stages": 2}


def partial_row_attention(
    q: torch.Tensor,
    k_new: torch.Tensor | None,
    v_new: torch.Tensor | None,
    rows: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    key_padding: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """Equal to reference.py up to rounding; same arguments. Heads of at most 256 channels, of float32 128."""
    B, H, M, D = q.shape
    Hkv, N, Dv = v_cache.shape[1:]
    if 0 in (B, H, M, N):
        return q.new_zeros(B, M, H, Dv).transpose(1, 2)
    if k_new is not None or v_new is not None:
        none = (0, 0, 0, 0)
        _write_kernel[(triton.cdiv(M, _COPIED) * B * Hkv,)](
            k_new, v_new, rows, k_cache, v_cache, M, N,
            *(none if k_new is None else k_new.stride()), *(none if v_new is None else v_new.stride()),
            *rows.stride(), *k_cache.stride(), *v_cache.stride(),
            Hkv=Hkv, HAS_K=k_new is not None, HAS_V=v_new is not None, D=D, Dv=Dv,
            WIDTH=triton.next_power_of_2(D), WIDTH_V=triton.next_power_of_2(Dv), BM=_COPIED,
        )  # fmt: skip
    out = q.new_empty(B, M, H, Dv).transpose(1, 2)
    (D1, D2), (V1, V2) = head_tiles(D), head_tiles(Dv)
    unit = _unit(k_cache, v_cache)
    k_strides, v_strides = ([s // unit for s in x.stride()[:3]] + [x.stride(3)] for x in (k_cache, v_cache))
    BM, BN, launch = _blocks(M, max(D1 + D2, V1 + V2), q.element_size())
    _attend_kernel[(triton.cdiv(M, BM) * B * H,)](
        # powers of two are cheaper than powers of e
        q, rows, k_cache, v_cache, key_padding, out, M, N, scale * 1.4426950408889634,
        *q.stride(), *rows.stride(), *k_strides, *v_strides,
        *((0, 0) if key_padding is None else key_padding.stride()), *out.stride()[:3],
        H=H, G=H // Hkv, HAS_PADDING=key_padding is not None, CAUSAL=causal, WIDE=widen(q.dtype),
        D=D, D1=D1, D2=D2, Dv=Dv, V1=V1, V2=V2, BM=BM, BN=BN, UNIT=unit, **launch,
    )  # fmt: skip
    return out

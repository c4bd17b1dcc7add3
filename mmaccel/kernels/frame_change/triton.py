"""`frame_change` on a GPU: a program goes through the frames of a few tokens, and reads each value once.

The references stay in registers. Where a token is too long for that, they are read again: a reference is always a frame
of the input or the given one, so its number is enough, and nothing is copied. Without a running reference the frames
are also cut into parts, so that short videos fill the device. Every result has one writer: the same in every run.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# Triton reads annotations while it compiles, so they must not become strings here.
import torch
import triton
import triton.language as tl

__all__ = ["frame_change"]

_TILE = 4096  # values of one frame that a program holds at once
_LONG = 1024  # channels at once of a token that is longer than a tile
_ENOUGH = 2048  # programs that keep every multiprocessor busy
_FEWEST_FRAMES = 4  # of a part: each part reads one frame more than it has


@triton.jit
def _old(
    x, reference, at, s, there, d, D, x_t, x_s, x_d, r_s, r_d, HAS_REFERENCE: tl.constexpr,
):  # fmt: skip
    """The channels d of each token's reference: frame `at` of the input, -1 for the given one, else zeros."""
    inside = (d < D)[None]
    old = tl.load(
        x + at[:, None] * x_t + s[:, None] * x_s + d[None] * x_d, mask=(there & (at >= 0))[:, None] & inside, other=0.0
    )
    if HAS_REFERENCE:
        given = tl.load(
            reference + s[:, None] * r_s + d[None] * r_d, mask=(there & (at == -1))[:, None] & inside, other=0.0
        )
        old = tl.where((at >= 0)[:, None], old, given)
    return old


@triton.jit
def _powers(now, old, MEASURE: tl.constexpr):
    """What is summed over the channels: of the product or difference, and of `now` alone."""
    now = now.to(tl.float32)
    old = old.to(tl.float32)
    if MEASURE < 2:
        moved = now * old
    elif MEASURE == 2:
        moved = tl.abs(now - old)
    else:
        moved = (now - old) * (now - old)
    return moved, tl.abs(now) if MEASURE == 2 else now * now


@triton.jit
def _frame_change_kernel(
    x, reference, seen, mask, change, last, T, S, D, parts, frames, threshold,
    x_b, x_t, x_s, x_d, r_b, r_s, r_d,
    MEASURE: tl.constexpr, RUNNING: tl.constexpr, HAS_REFERENCE: tl.constexpr, HAS_SEEN: tl.constexpr,
    HAS_MASK: tl.constexpr, ONE: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    strips = tl.cdiv(S, BS)
    s = (program % strips) * BS + tl.arange(0, BS)
    begin = (program // strips % parts) * frames
    b = program // strips // parts
    there = s < S
    x += b * x_b
    reference += b * r_b
    end = tl.minimum(begin + frames, T)

    # what the first frame of this part is compared with
    at = tl.full([BS], -2, tl.int64)
    if HAS_REFERENCE:
        at += 1
    if HAS_SEEN:
        at = tl.where(tl.load(seen + b * S + s, mask=there, other=0) != 0, at, -2)
    valid_before = there & (tl.full([BS], begin, tl.int64) > 0)
    at = tl.where(valid_before, begin - 1, at)
    if HAS_MASK:
        held = tl.load(mask + (b * T + begin - 1) * S + s, mask=valid_before, other=0) != 0
        at = tl.where(valid_before & (held == 0), -2, at)
    d = tl.arange(0, BD)
    old = _old(x, reference, at, s, there, d, D, x_t, x_s, x_d, r_s, r_d, HAS_REFERENCE)
    _, power = _powers(old, old, MEASURE)
    if not ONE:
        for start in range(BD, D, BD):
            more = _old(x, reference, at, s, there, start + d, D, x_t, x_s, x_d, r_s, r_d, HAS_REFERENCE)
            power += _powers(more, more, MEASURE)[1]
    base = tl.sum(power, 1)

    now_x = x + begin * x_t + s[:, None] * x_s
    for t in range(begin, end):
        now = tl.load(now_x + d[None] * x_d, mask=there[:, None] & (d < D)[None], other=0.0)
        if not ONE:
            old = _old(x, reference, at, s, there, d, D, x_t, x_s, x_d, r_s, r_d, HAS_REFERENCE)
        moved, power = _powers(now, old, MEASURE)
        if not ONE:
            for start in range(BD, D, BD):
                e = start + d
                more = tl.load(now_x + e[None] * x_d, mask=there[:, None] & (e < D)[None], other=0.0)
                far = _old(x, reference, at, s, there, e, D, x_t, x_s, x_d, r_s, r_d, HAS_REFERENCE)
                more_moved, more_power = _powers(more, far, MEASURE)
                moved += more_moved
                power += more_power
        size = tl.sum(power, 1)
        distance = tl.sum(moved, 1)
        if MEASURE < 2:
            # equal norms need no root, so that a token that stands still has a cosine of exactly 1
            norms = tl.where(size == base, size, tl.sqrt_rn(size) * tl.sqrt_rn(base))
            cosine = tl.div_rn(distance, tl.where(norms < 1.1754943508222875e-38, 1.1754943508222875e-38, norms))
            cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
            value = cosine if MEASURE == 1 else 1.0 - cosine
        else:
            norm = base
            if MEASURE == 3:
                distance = tl.sqrt_rn(distance)
                norm = tl.sqrt_rn(base)
            value = tl.div_rn(distance, tl.where(norm < 1.1920928955078125e-07, 1.1920928955078125e-07, norm))
        value = tl.where(at == -2, float("-inf") if MEASURE == 1 else float("inf"), value)
        valid = there
        if HAS_MASK:
            valid = there & (tl.load(mask + (b * T + t) * S + s, mask=there, other=0) != 0)
            value = tl.where(valid, value, float("-inf"))
        tl.store(change + (b * T + t) * S + s, value, mask=there)
        if RUNNING:
            taken = valid & ((value <= threshold) == 0)
            at = tl.where(taken, t, at)
            base = tl.where(taken, size, base)
            old = tl.where(taken[:, None], now, old)
        else:
            at = tl.where(valid, t, -2).to(tl.int64)
            base = size
            old = now
        now_x += x_t
    if end == T:
        tl.store(last + b * S + s, at, mask=there)


def frame_change(
    x: torch.Tensor,
    reference: torch.Tensor | None,
    seen: torch.Tensor | None,
    mask: torch.Tensor | None,
    measure: int,
    threshold: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equal to reference.py up to rounding; same arguments."""
    B, T, S, D = x.shape
    change = x.new_empty((B, T, S), dtype=torch.float32)
    if 0 in (B, T, S):
        last = x.new_full((B, S), -2 if reference is None else -1, dtype=torch.int64)
        return change, last if seen is None else last.masked_fill(~seen, -2)
    last = x.new_empty((B, S), dtype=torch.int64)
    running = threshold is not None
    BD = triton.next_power_of_2(max(D, 1))
    one = BD <= _TILE
    # sums over several pieces take registers of their own
    BD, BS = (BD, min(16, _TILE // BD)) if one else (_LONG, 2)
    rows = B * triton.cdiv(S, BS)
    parts = 1 if running else min(triton.cdiv(T, _FEWEST_FRAMES), triton.cdiv(_ENOUGH, rows))
    frames = triton.cdiv(T, parts)
    parts = triton.cdiv(T, frames)
    given = x[:, 0] if reference is None else reference
    _frame_change_kernel[(rows * parts,)](
        x, given, None if seen is None else seen.contiguous(), None if mask is None else mask.contiguous(), change,
        last, T, S, D, parts, frames, 0.0 if threshold is None else float(threshold), *x.stride(), *given.stride(),
        MEASURE=measure, RUNNING=running, HAS_REFERENCE=reference is not None, HAS_SEEN=seen is not None,
        HAS_MASK=mask is not None, ONE=one, BS=BS, BD=BD, num_warps=4,
    )  # fmt: skip
    return change, last

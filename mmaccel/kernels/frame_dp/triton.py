"""`frame_dp` on a GPU in three kernels: run lengths, how many of them reach each length, and the dynamic program.

The program of an item holds the best solution for every last frame in registers. Frame by frame it offers to all later
ends the windows that start there; nothing is written or read again between two frames but the counts, which do not
depend on what was found. All numbers are whole, so every run gives the same.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# Triton reads annotations while it compiles, so they must not become strings here.
import torch
import triton
import triton.language as tl

__all__ = ["frame_dp"]

_BT, _BP, _BL = 32, 64, 64


@triton.jit
def _runs_kernel(static, runs, steps, S, x_b, x_t, x_s, BT: tl.constexpr, BP: tl.constexpr):
    """How many steps in a row a position is static, from each step on."""
    program = tl.program_id(0).to(tl.int64)
    strips = tl.cdiv(S, BP)
    p = (program % strips) * BP + tl.arange(0, BP)
    row = program // strips
    i, b = row % steps, row // steps
    there = p < S
    end = tl.where(there, steps, i)
    at = i
    # a scene that moves ends all runs soon
    while at < steps:
        t = at + tl.arange(0, BT).to(tl.int64)
        inside = (t < steps)[:, None] & there[None]
        still = tl.load(static + b * x_b + t[:, None] * x_t + p[None] * x_s, mask=inside, other=1)
        end = tl.minimum(end, tl.min(tl.where(still == 0, t[:, None], steps), 0))
        at = tl.where(tl.max(end, 0) < at + BT, steps, at + BT)
    tl.store(runs + row * S + p, (end - i).to(tl.int32), mask=there)


@triton.jit
def _counts_kernel(runs, counts, S, L, BL: tl.constexpr, BP: tl.constexpr):
    """How many positions are static on at least d steps from each step on, for d = 1..L."""
    program = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(L, BL)
    row = program // parts
    d = (program % parts) * BL + tl.arange(0, BL)
    total = tl.zeros([BL], tl.int32)
    for start in range(0, S, BP):
        p = start + tl.arange(0, BP)
        run = tl.load(runs + row * S + p, mask=p < S, other=0)
        total += tl.sum((run[None] > d[:, None]).to(tl.int32), 1)
    tl.store(counts + row * L + d, total, mask=d < L)


@triton.jit
def _program_kernel(counts, starts, saved, window, T, L, WIDE: tl.constexpr, BJ: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BJ)
    best = tl.full([BJ], -1, tl.int64 if WIDE else tl.int32)
    start = tl.zeros([BJ], tl.int32)
    before = tl.sum(tl.zeros_like(best), 0)
    row = counts + b * (T - 1) * L
    for i in range(T):
        steps = j - i
        inside = (steps >= 1) & (steps <= L) & (j < T)
        total = before + steps.to(best.dtype) * tl.load(row + steps - 1, mask=inside, other=0)
        # a later start is a shorter window, which stays of equals
        better = (inside | (steps == 0)) & (total >= best)
        best = tl.where(better, total, best)
        start = tl.where(better, i, start)
        before = tl.sum(tl.where(j == i, best, 0), 0)
        row += L
    tl.store(starts + b * T + j, start.to(tl.int64), mask=j < T)
    tl.store(saved + b, before.to(tl.int64))

    opens = tl.zeros([BJ], tl.int32)
    end = T - 1
    while end >= 0:
        first = tl.sum(tl.where(j == end, start, 0), 0)
        opens = tl.where(j == first, 1, opens)
        end = first - 1
    tl.store(window + b * T + j, tl.cumsum(opens, 0).to(tl.int64) - 1, mask=j < T)


def frame_dp(static: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equal to reference.py; same arguments."""
    B, steps, S = static.shape
    T = steps + 1
    starts, window = (static.new_empty((B, T), dtype=torch.int64) for _ in range(2))
    saved = static.new_empty((B,), dtype=torch.int64)
    L = min(steps, longest - 1)
    counts = static.new_zeros((B, steps, L), dtype=torch.int32)
    if counts.numel() and S:
        runs = static.new_empty((B, steps, S), dtype=torch.int32)
        grid = (triton.cdiv(S, _BP) * B * steps,)
        _runs_kernel[grid](static, runs, steps, S, *static.stride(), BT=_BT, BP=_BP, num_warps=2)
        _counts_kernel[(triton.cdiv(L, _BL) * B * steps,)](runs, counts, S, L, BL=_BL, BP=_BP, num_warps=4)
    if B:
        BJ = max(16, triton.next_power_of_2(T))
        # within one warp the sum over all ends needs no barrier
        warps = max(1, BJ // 1024)
        _program_kernel[(B,)](counts, starts, saved, window, T, L, WIDE=T * S >= 2**31, BJ=BJ, num_warps=warps)
    return starts, saved, window

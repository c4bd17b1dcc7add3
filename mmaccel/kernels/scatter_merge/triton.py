"""`scatter_merge` on a GPU, in two ways that differ in who writes an output.

Atomic: every tile of tokens is read once, in order, and added to its outputs. Deterministic: tokens are sorted by
output (stably), and the program of an output walks through its own tokens, so the order of every sum is fixed.
"""

# pyright: reportArgumentType=false
# Triton reads annotations while it compiles, so they must not become strings here.
import torch
import triton
import triton.language as tl

from mmaccel.kernels.tiles import widen

__all__ = ["scatter_merge"]

_TOKENS, _CHANNELS = 8, 512  # of a tile


@triton.jit
def _weighted(
    x, weight, b, n, there, c, N, D, x_b, x_n, x_d,
    WIDE: tl.constexpr,
):  # fmt: skip
    """weight * x of tokens n and channels c, 0 where not `there`, whatever lies in memory there."""
    value = tl.load(
        x + b * x_b + n[:, None] * x_n + c[None] * x_d, mask=there[:, None] & (c < D)[None], other=0.0
    )  # fmt: skip
    if WIDE:
        value = value.to(tl.float32)
    share = tl.load(weight + b * N + n, mask=there, other=0.0)
    return value.to(tl.float32) * share[:, None]


@triton.jit
def _atomic_kernel(
    x, assignment, weight, out, N, D, K, x_b, x_n, x_d,
    WIDE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    chunks, blocks = tl.cdiv(D, BD), tl.cdiv(N, BN)
    b = pid // chunks // blocks
    n = (pid // chunks % blocks) * BN + tl.arange(0, BN)
    c = (pid % chunks) * BD + tl.arange(0, BD)
    to = tl.load(assignment + b * N + n, mask=n < N, other=-1)
    there = (to >= 0) & (to < K)
    value = _weighted(x, weight, b, n, there, c, N, D, x_b, x_n, x_d, WIDE)
    target = out + (b * K + to)[:, None] * D + c[None]
    tl.atomic_add(target, value, mask=there[:, None] & (c < D)[None], sem="relaxed")


@triton.jit
def _ordered_kernel(
    x, order, starts, weight, out, N, D, K, x_b, x_n, x_d,
    WIDE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(D, BD)
    b, k = pid // chunks // K, pid // chunks % K
    c = (pid % chunks) * BD + tl.arange(0, BD)
    first = tl.load(starts + b * (K + 1) + k)
    end = tl.load(starts + b * (K + 1) + k + 1)
    total = tl.zeros([BD], tl.float32)
    for start in range(first, end, BN):
        m = start + tl.arange(0, BN)
        there = m < end
        n = tl.load(order + b * N + m, mask=there, other=0)
        total += tl.sum(_weighted(x, weight, b, n, there, c, N, D, x_b, x_n, x_d, WIDE), 0)
    tl.store(out + (b * K + k) * D + c, total.to(out.dtype.element_ty), mask=c < D)


def scatter_merge(
    x: torch.Tensor, assignment: torch.Tensor, weight: torch.Tensor, n_out: int, deterministic: bool
) -> torch.Tensor:
    """Equal to reference.py up to rounding; same arguments, and `deterministic`."""
    B, N, D = x.shape
    if 0 in (B, N, D, n_out):
        return x.new_zeros(B, n_out, D)
    weight, wide = weight.contiguous(), widen(x.dtype)
    sizes, chunks = (N, D, n_out, *x.stride()), triton.cdiv(D, _CHANNELS)
    shared = {"WIDE": wide, "BN": _TOKENS, "BD": _CHANNELS}
    if not deterministic:
        out = x.new_zeros(B, n_out, D, dtype=torch.float32)
        grid = (B * triton.cdiv(N, _TOKENS) * chunks,)
        _atomic_kernel[grid](x, assignment.contiguous(), weight, out, *sizes, **shared)
        return out.to(x.dtype)
    out = x.new_empty(B, n_out, D, dtype=torch.float32 if wide else x.dtype)
    # sorting numbers half as wide takes half the passes
    by_output, order = assignment.int().sort(dim=1, stable=True)
    numbers = torch.arange(n_out + 1, dtype=torch.int32, device=x.device).expand(B, -1).contiguous()
    starts = torch.searchsorted(by_output, numbers)
    _ordered_kernel[(B * n_out * chunks,)](x, order, starts, weight, out, *sizes, **shared)
    return out.to(x.dtype)

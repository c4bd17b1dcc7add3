"""What the kernel benchmark runs: for each op its inputs at named sizes, and what it competes with.

A further op is a function that makes its `Case` from sizes, and a line in `OPS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from mmaccel.kernels.attention_received import attention_received
from mmaccel.kernels.frame_change import frame_change
from mmaccel.kernels.frame_dp import frame_dp
from mmaccel.kernels.gather_compact import gather_compact
from mmaccel.kernels.greedy_diverse import greedy_diverse
from mmaccel.kernels.nv12_to_rgb import nv12_to_rgb
from mmaccel.kernels.nv12_to_rgb import reference as nv12_reference
from mmaccel.kernels.nv12_to_rgb.taps import ACROSS_BITS, DOWN_BITS, colour, tables
from mmaccel.kernels.pairwise_match import pairwise_match
from mmaccel.kernels.partial_row_attention import partial_row_attention
from mmaccel.kernels.scatter_merge import scatter_merge, unmerge

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OPS", "Case", "Op"]


@dataclass(frozen=True)
class Case:
    """One op at one size. Its three callables take `inputs`, and may be called again and again.

    shape: the size in words. ours: the op as users call it. eager: the same result in plain torch, written as one would
    without the op. moved: bytes that any implementation must read and write, each input and output once. flops: of the
    matrix products that any implementation must do, a multiplication and an addition counted as two. sdpa: torch's
    fused attention over the whole problem, for ops that are part of an attention or save one. steps: of the Python loop
    in `eager`, which torch.compile would write out one behind the other.
    """

    shape: str
    inputs: tuple[Any, ...]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    moved: int
    flops: int
    sdpa: Callable[..., Any] | None = None
    steps: int = 0


@dataclass(frozen=True)
class Op:
    """An op's sizes by name ("tiny" is for tests), and the function that makes the case of one of them."""

    sizes: dict[str, tuple[int, ...]]
    case: Callable[..., Case]


def _random(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Normal numbers of a fixed seed, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes]


def _received(B: int, H: int, N: int, D: int, *, device: torch.device, dtype: torch.dtype) -> Case:
    q, k, v = _random(device, dtype, *[(B, H, N, D)] * 3)
    return Case(
        shape=f"{B} x [{H}, {N}, {D}], all queries",
        inputs=(q, k, v),
        ours=lambda q, k, _v: attention_received(q, k),
        eager=lambda q, k, _v: (q @ k.mT * D**-0.5).softmax(-1).float().mean((1, 2)),
        sdpa=lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        moved=2 * q.nbytes + 4 * B * N,
        flops=2 * B * H * N * N * D,
    )


def _partial(B: int, H: int, N: int, D: int, m: int, *, device: torch.device, dtype: torch.dtype) -> Case:
    every_q, k, v, q, k_new, v_new = _random(device, dtype, *[(B, H, N, D)] * 3, *[(B, H, m, D)] * 3)
    rows = torch.rand(B, N, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :m].sort(1).values.to(device)

    def eager(_every: torch.Tensor, q: torch.Tensor, k_new: torch.Tensor, v_new: torch.Tensor, *rest: torch.Tensor):
        rows, k, v = rest
        at = rows[:, None, :, None].expand(q.shape)
        k.scatter_(2, at, k_new)
        v.scatter_(2, at, v_new)
        return (q @ k.mT * D**-0.5).softmax(-1) @ v

    return Case(
        shape=f"{B} x [{H}, {N}, {D}], {m} rows",
        inputs=(every_q, q, k_new, v_new, rows, k, v),
        ours=lambda _every, *inputs: partial_row_attention(*inputs),
        eager=eager,
        sdpa=lambda every_q, _q, _k, _v, _rows, k, v: F.scaled_dot_product_attention(every_q, k, v),
        # caches and queries are read; fresh keys and values are read and written; the output is written
        moved=2 * k.nbytes + 6 * q.nbytes + rows.nbytes,
        flops=4 * B * H * m * N * D,
    )


def _match(B: int, N: int, M: int, D: int, *, device: torch.device, dtype: torch.dtype) -> Case:
    a, b = _random(device, dtype, (B, N, D), (B, M, D))
    step = max(1, (1 << 24) // M)

    def eager(a: torch.Tensor, b: torch.Tensor):
        # in blocks, because the whole matrix of many tokens fits nowhere
        a, b = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
        best = [(part @ b.mT).max(-1) for part in a.split(step, 1)]
        return torch.cat([part.indices for part in best], 1), torch.cat([part.values for part in best], 1)

    return Case(
        shape=f"{B} x [{N}, {D}] to [{M}, {D}]",
        inputs=(a, b),
        ours=lambda a, b: pairwise_match(a, b),
        eager=eager,
        moved=a.nbytes + b.nbytes + 12 * B * N,
        flops=2 * B * N * M * D,
    )


def _diverse(B: int, N: int, D: int, k: int, *, device: torch.device, dtype: torch.dtype) -> Case:
    x, scores = _random(device, dtype, (B, N, D), (B, N))
    scores = scores.float().sigmoid()

    def eager(x: torch.Tensor, scores: torch.Tensor):
        unit = F.normalize(x.float(), dim=-1)
        cosine = unit @ unit.mT
        nearest = torch.full_like(scores, -torch.inf)
        taken = torch.zeros_like(scores, dtype=torch.bool)
        picks = []
        for step in range(k):
            worth = scores if step == 0 else 0.5 * scores - 0.5 * nearest
            pick = worth.masked_fill(taken, -torch.inf).argmax(1, keepdim=True)
            taken = taken.scatter(1, pick, True)
            nearest = torch.maximum(nearest, cosine.gather(1, pick[..., None].expand(-1, 1, N))[:, 0])
            picks.append(pick)
        return torch.cat(picks, 1), torch.full((B,), k, device=x.device)

    return Case(
        shape=f"{B} x [{N}, {D}], {k} chosen",
        inputs=(x, scores),
        ours=lambda x, scores: greedy_diverse(x, k, method="mmr", scores=scores),
        eager=eager,
        moved=x.nbytes + scores.nbytes + 8 * B * k,
        # the similarity of every token with every chosen one
        flops=2 * B * N * k * D,
        steps=k,
    )


def _merged(B: int, N: int, D: int, K: int, *, device: torch.device, dtype: torch.dtype) -> Case:
    (x,) = _random(device, dtype, (B, N, D))
    generator = torch.Generator().manual_seed(0)
    assignment = torch.randint(0, K, (B, N), generator=generator).to(device)
    weight = torch.rand(B, N, generator=generator).to(device)

    def eager(x: torch.Tensor, assignment: torch.Tensor, weight: torch.Tensor):
        out = x.new_zeros(B, K, D, dtype=torch.float32)
        wide = assignment[..., None].expand(B, N, D)
        return out.scatter_add_(1, wide, x.float() * weight[..., None]).to(x.dtype)

    return Case(
        shape=f"{B} x [{N}, {D}] to {K}",
        inputs=(x, assignment, weight),
        ours=lambda x, assignment, weight: scatter_merge(x, assignment, weight, K),
        eager=eager,
        moved=x.nbytes + assignment.nbytes + weight.nbytes + B * K * D * x.element_size(),
        flops=0,
    )


def _spread(B: int, K: int, D: int, N: int, *, device: torch.device, dtype: torch.dtype) -> Case:
    (y,) = _random(device, dtype, (B, K, D))
    assignment = torch.randint(0, K, (B, N), generator=torch.Generator().manual_seed(0)).to(device)
    return Case(
        shape=f"{B} x [{K}, {D}] to {N}",
        inputs=(y, assignment),
        ours=unmerge,
        eager=lambda y, assignment: y.gather(1, assignment[..., None].expand(B, N, D)),
        moved=y.nbytes + assignment.nbytes + B * N * D * y.element_size(),
        flops=0,
    )


def _compact(B: int, S: int, D: int, d: int, L: int, *, device: torch.device, dtype: torch.dtype) -> Case:
    hidden, cos, sin = _random(device, dtype, (B, S, D), (B, S, d), (B, S, d))
    index = torch.rand(B, S, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :L].sort(1).values.to(device)
    position = torch.arange(S, device=device).expand(3, B, S).contiguous()

    def eager(index: torch.Tensor, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position: torch.Tensor):
        rows = [x.gather(1, index[..., None].expand(B, L, x.shape[2])) for x in (hidden, cos, sin)]
        return *rows, position.gather(2, index.expand(3, B, L))

    kept = hidden.element_size() * B * L * (D + 2 * d) + 24 * B * L
    return Case(
        shape=f"{B} x [{S}, {D} + 2 x {d}] to {L}",
        inputs=(index, hidden, cos, sin, position),
        ours=lambda index, hidden, cos, sin, position: gather_compact(
            index, rows=(hidden, cos, sin), columns=(position,)
        ),
        eager=eager,
        moved=2 * kept + index.nbytes,
        flops=0,
    )


def _change(B: int, T: int, S: int, D: int, *, device: torch.device, dtype: torch.dtype) -> Case:
    (x,) = _random(device, dtype, (B, T, S, D))

    def eager(x: torch.Tensor):
        wide = x.float()
        cosine = F.cosine_similarity(wide[:, 1:], wide[:, :-1], dim=-1)
        return F.pad(1 - cosine, (0, 0, 1, 0), value=torch.inf)

    return Case(
        shape=f"{B} x [{T}, {S}, {D}]",
        inputs=(x,),
        ours=lambda x: frame_change(x).change,
        eager=eager,
        moved=x.nbytes + 4 * B * T * S,
        flops=0,
    )


def _pictures(B: int, H: int, W: int, h: int, w: int, *, device: torch.device, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(0)
    y, uv = (
        torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
        for shape in ((B, H, W), (B, H // 2, W // 2, 2))
    )
    across, down = (
        tables(source, target, "BICUBIC", bits, device)
        for source, target, bits in ((W, w, ACROSS_BITS), (H, h, DOWN_BITS))
    )
    slots = torch.arange(B, device=device)
    mean, spread = torch.zeros(3, device=device), torch.full((3,), 255.0, device=device)

    def eager(y: torch.Tensor, uv: torch.Tensor):
        out = torch.empty(B, 3, h, w, dtype=dtype, device=device)
        nv12_reference.nv12_to_rgb(y, uv, out, slots, *across, *down, colour("bt709", False), 0, mean, spread)
        return out

    return Case(
        shape=f"{B} x [{H}, {W}] to [{h}, {w}]",
        inputs=(y, uv),
        ours=lambda y, uv: nv12_to_rgb(y, uv, size=(h, w), dtype=dtype),
        eager=eager,
        moved=y.nbytes + uv.nbytes + 3 * B * h * w * dtype.itemsize,
        flops=0,
        steps=B * (across[1].shape[0] + down[1].shape[0]),
    )


def _windows(B: int, T: int, S: int, *, device: torch.device, dtype: torch.dtype) -> Case:
    del dtype  # what is static is a matter of yes and no
    static = (torch.rand(B, T - 1, S, generator=torch.Generator().manual_seed(0)) > 0.2).to(device)

    def eager(static: torch.Tensor):
        best = [static.new_zeros(B, dtype=torch.int64)]
        for j in range(1, T):
            options, alive = [best[-1]], torch.ones_like(static[:, 0])
            for i in range(j - 1, -1, -1):
                alive = alive & static[:, i]
                options.append((best[i - 1] if i else 0) + (j - i) * alive.sum(1))
            best.append(torch.stack(options).amax(0))
        return best[-1]

    return Case(
        shape=f"{B} x [{T} frames, {S}]",
        inputs=(static,),
        ours=lambda static: frame_dp(static).saved,
        eager=eager,
        moved=static.nbytes + 16 * B * T,
        flops=0,
        steps=T * (T - 1) // 2,
    )


# Heads and tokens of SigLIP-so400m; a quarter of the rows is what STC-Cacher recomputes. The video size is a layer of
# Wan2.1-1.3B at 480p and 81 frames.
OPS: dict[str, Op] = {
    "attention_received": Op(
        {"tiny": (1, 2, 40, 16), "small": (4, 16, 729, 72), "full": (32, 16, 729, 72)},
        _received,
    ),
    "partial_row_attention": Op(
        {
            "tiny": (1, 2, 40, 16, 10),
            "small": (4, 16, 729, 72, 182),
            "full": (32, 16, 729, 72, 182),
            "video": (1, 12, 32760, 128, 8190),
        },
        _partial,
    ),
    # The middle sizes are a video of LLaVA-OneVision-7B: 32 frames of 196 tokens, kept or merged to a tenth.
    "pairwise_match": Op(
        {"tiny": (2, 33, 40, 16), "small": (1, 20_000, 20_000, 64), "full": (1, 100_000, 100_000, 64)},
        _match,
    ),
    "scatter_merge": Op({"tiny": (2, 33, 16, 5), "small": (1, 6272, 896, 627), "full": (1, 6272, 3584, 627)}, _merged),
    "unmerge": Op({"tiny": (2, 5, 16, 33), "small": (1, 627, 896, 6272), "full": (1, 627, 3584, 6272)}, _spread),
    "gather_compact": Op(
        {"tiny": (2, 33, 16, 8, 5), "small": (1, 6309, 896, 64, 665), "full": (1, 6309, 3584, 128, 3150)},
        _compact,
    ),
    "frame_change": Op(
        {"tiny": (2, 4, 9, 16), "small": (1, 32, 196, 896), "full": (1, 64, 729, 1152)},
        _change,
    ),
    # A frame of 1080p video to about the pixels of one image of 14 x 14 patches, and eight of them.
    "nv12_to_rgb": Op(
        {"tiny": (1, 8, 10, 4, 6), "small": (1, 1080, 1920, 392, 700), "full": (8, 1080, 1920, 392, 700)},
        _pictures,
    ),
    "frame_dp": Op({"tiny": (2, 5, 9), "small": (1, 32, 196), "full": (1, 128, 196)}, _windows),
    "greedy_diverse": Op(
        {"tiny": (2, 20, 8, 5), "small": (1, 576, 1024, 64), "full": (1, 6272, 896, 627)},
        _diverse,
    ),
}

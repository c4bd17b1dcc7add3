"""What the kernel benchmark runs: for each op its inputs at named sizes, and what it competes with.

A further op is a function that makes its `Case` from sizes, and a line in `OPS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from mmaccel.kernels.attention_received import attention_received
from mmaccel.kernels.partial_row_attention import partial_row_attention

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OPS", "Case", "Op"]


@dataclass(frozen=True)
class Case:
    """One op at one size. Its three callables take `inputs`, and may be called again and again.

    shape: the size in words. ours: the op as users call it. eager: the same result in plain torch, written as one would
    without the op. moved: bytes that any implementation must read and write, each input and output once. flops: of the
    matrix products that any implementation must do, a multiplication and an addition counted as two. sdpa: torch's
    fused attention over the whole problem, for ops that are part of an attention or save one.
    """

    shape: str
    inputs: tuple[Any, ...]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    moved: int
    flops: int
    sdpa: Callable[..., Any] | None = None


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
}

"""The most similar row of another set for every row, without the matrix of similarities.

Token merging needs it everywhere: the partners of ToMe's bipartite matching, the nearest cluster centre, the nearest
neighbour that max-min diversity starts from. It is the torch custom op `mmaccel::pairwise_match`; `mmaccel.kernels`
says which backend runs.
"""

from __future__ import annotations

from typing import Literal

import torch

from mmaccel.errors import MethodError
from mmaccel.kernels.dispatch import choose, no_triton
from mmaccel.kernels.pairwise_match import cpu

__all__ = ["pairwise_match"]


def pairwise_match(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    metric: Literal["cosine", "euclidean"] = "cosine",
    exclude_self: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for each row of `a`, its most similar row of `b` (ties: the first) and their similarity.

    a (B, N, D) and b (B, M, D), of one floating dtype; mask: bool (B, M), the rows of b that may be chosen (none: all).
    The similarity is the cosine (0 with a row of zeros), or minus the euclidean distance. Both results are (B, N),
    int64 and float32; -1 and -inf where b has no row to choose. `exclude_self` forbids equal row numbers.

    float16 and bfloat16 are compared in float32: nothing but the inputs themselves is rounded to 16 bits. Euclidean
    search centres the rows of b first, so that small differences between large numbers survive, and measures the
    distance to the winner anew; ties are those of the rounded similarities.

    A similarity that is NaN wins over all others, the first one of them: NaN in a row of a, or in a row of b that may
    be chosen, shows as NaN in the values. Rows that the mask forbids are not read. Infinite inputs, and float32 numbers
    so large that their products overflow, give NaN or -inf. Raises MethodError for arguments that do not fit.
    """
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2]:
        raise MethodError(
            f"a must be (B, N, D) and b (B, M, D), equal in B and D; got {tuple(a.shape)}, {tuple(b.shape)}"
        )
    if a.dtype != b.dtype or not a.is_floating_point() or a.device != b.device:
        raise MethodError(
            f"a and b must share a floating dtype and a device; got {a.dtype} on {a.device}, {b.dtype} on {b.device}"
        )
    if metric not in ("cosine", "euclidean"):
        raise MethodError(f"metric={metric!r} is not known; choose cosine or euclidean")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != b.shape[:2] or mask.device != b.device):
        raise MethodError(
            f"mask must be bool of shape {tuple(b.shape[:2])} on {b.device}; got {mask.dtype} {tuple(mask.shape)} on "
            f"{mask.device}"
        )
    return torch.ops.mmaccel.pairwise_match(a, b, mask, metric == "euclidean", exclude_self)


def _run(
    a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None, euclidean: bool, exclude_self: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if choose("pairwise_match", a.device, triton_missing=no_triton(a, b)) == "triton":
        from mmaccel.kernels.pairwise_match import triton

        return triton.pairwise_match(a, b, mask, euclidean, exclude_self)
    return cpu.pairwise_match(a, b, mask, euclidean, exclude_self)


def _fake(
    a: torch.Tensor,
    b: torch.Tensor,  # noqa: ARG001
    mask: torch.Tensor | None,  # noqa: ARG001
    euclidean: bool,  # noqa: ARG001
    exclude_self: bool,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor]:
    return a.new_empty(a.shape[:2], dtype=torch.int64), a.new_empty(a.shape[:2], dtype=torch.float32)


# torch.library.custom_op would import torch._dynamo at the first eager call.
_library = torch.library.Library("mmaccel", "FRAGMENT")
_library.define(
    "pairwise_match(Tensor a, Tensor b, Tensor? mask, bool euclidean, bool exclude_self) -> (Tensor, Tensor)"
)
_library.impl("pairwise_match", _run, "CompositeExplicitAutograd")
torch.library.register_fake("mmaccel::pairwise_match", _fake, lib=_library)

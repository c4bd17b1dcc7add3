"""Merge tokens into fewer by a weighted sum, and spread the merged values over the tokens again.

Token merging (ToMe 2023, and every cluster or contextual merge since) ends in this pair of a scatter and a gather. They
are the torch custom ops `mmaccel::scatter_merge` and `mmaccel::unmerge`; `mmaccel.kernels` says which backend runs.
"""

from __future__ import annotations

import torch

from mmaccel.errors import MethodError
from mmaccel.kernels.dispatch import choose, no_triton
from mmaccel.kernels.scatter_merge import cpu, reference

__all__ = ["scatter_merge", "unmerge"]

_NO_BACKWARD = "it has no backward, and gradients are wanted"


def scatter_merge(
    x: torch.Tensor,
    assignment: torch.Tensor,
    weight: torch.Tensor,
    n_out: int,
    *,
    deterministic: bool | None = None,
) -> torch.Tensor:
    """Return (B, n_out, D): output k of item b is the sum of `weight * x` over the tokens assigned to k.

    x: (B, N, D), of any floating dtype; sums are float32 (float64 for float64), the result has the dtype of x.
    assignment: int64 (B, N) in [0, n_out), or -1 for tokens that go nowhere; what they hold, NaN too, shows nowhere.
    weight: float32 (B, N). An output without tokens is 0. A token alone in its output with weight 1 passes bit for bit
    (but for the sign of zero); NaN in a token shows in its output.

    deterministic: whether a GPU gives every output one writer, which adds the tokens up in the same order in every run
    (after a sort), instead of adding atomically as tokens come, where the last bit may vary. None follows
    torch.use_deterministic_algorithms. A CPU always adds in the order of the tokens.

    An assignment outside [-1, n_out) is an error on the CPU; a GPU is not waited for, and takes it for -1. Where
    gradients are wanted the path is torch. Raises MethodError for arguments that do not fit.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise MethodError(f"the tokens to merge must be floating (B, N, D); got {x.dtype} {tuple(x.shape)}")
    _check(assignment, x.shape[:2], n_out, x.device)
    if weight.dtype != torch.float32 or weight.shape != assignment.shape or weight.device != x.device:
        raise MethodError(
            f"the weights must be float32 {tuple(assignment.shape)} on {x.device}; got {weight.dtype} "
            f"{tuple(weight.shape)} on {weight.device}"
        )
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        if not torch.compiler.is_compiling():
            choose("scatter_merge", x.device, triton_missing=_NO_BACKWARD)
        return reference.scatter_merge(x, assignment, weight, n_out)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.ops.mmaccel.scatter_merge(x, assignment, weight, n_out, deterministic)


def unmerge(y: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """Return (B, N, D): each token gets the value of its output, y (B, K, D) at assignment (B, N), bit for bit.

    assignment: int64 in [0, K), or -1 for tokens that went nowhere, which get 0. Any dtype. An assignment outside
    [-1, K) is an error on the CPU; a GPU is not waited for, and takes it for -1. Where gradients are wanted the path is
    torch. Raises MethodError for arguments that do not fit.
    """
    if y.ndim != 3:
        raise MethodError(f"the merged tokens must be (B, K, D); got {tuple(y.shape)}")
    _check(assignment, (y.shape[0], None), y.shape[1], y.device)
    if torch.is_grad_enabled() and y.requires_grad:
        if not torch.compiler.is_compiling():
            choose("unmerge", y.device, triton_missing=_NO_BACKWARD)
        return reference.unmerge(y, assignment)
    return torch.ops.mmaccel.unmerge(y, assignment)


def _check(assignment: torch.Tensor, shape: torch.Size | tuple[int, None], n_out: int, device: torch.device) -> None:
    wrong = assignment.ndim != 2 or assignment.dtype != torch.int64 or assignment.device != device
    if wrong or assignment.shape[0] != shape[0] or shape[1] not in (None, assignment.shape[1]):
        wanted = f"({shape[0]}, {'N' if shape[1] is None else shape[1]})"
        raise MethodError(
            f"the assignment must be int64 {wanted} on {device}; got {assignment.dtype} {tuple(assignment.shape)} on "
            f"{assignment.device}"
        )
    if n_out < 0:
        raise MethodError(f"n_out={n_out} outputs cannot be; give at least 0")
    if device.type == "cpu" and not torch.compiler.is_compiling() and assignment.numel():
        low, high = assignment.aminmax()
        if int(low) < -1 or int(high) >= n_out:
            raise MethodError(f"the assignment holds outputs outside [-1, {n_out})")


def _run(
    x: torch.Tensor, assignment: torch.Tensor, weight: torch.Tensor, n_out: int, deterministic: bool
) -> torch.Tensor:
    if choose("scatter_merge", x.device, triton_missing=no_triton(x)) == "triton":
        from mmaccel.kernels.scatter_merge import triton

        return triton.scatter_merge(x, assignment, weight, n_out, deterministic)
    return cpu.scatter_merge(x, assignment, weight, n_out)


def _run_unmerge(y: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    # values are copied as whole numbers of their width, so float64 is no obstacle
    if choose("unmerge", y.device, triton_missing=no_triton(assignment)) == "triton":
        from mmaccel.kernels.gather_compact import triton

        # a place of -1 is outside, and so is 0
        return triton.gather_compact(assignment, None, [y], [], [])[0]
    return cpu.unmerge(y, assignment)


def _fake(
    x: torch.Tensor,
    assignment: torch.Tensor,  # noqa: ARG001
    weight: torch.Tensor,  # noqa: ARG001
    n_out: int,
    deterministic: bool,  # noqa: ARG001
) -> torch.Tensor:
    return x.new_empty(x.shape[0], n_out, x.shape[2])


def _fake_unmerge(y: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    return y.new_empty(*assignment.shape, y.shape[2])


_library = torch.library.Library("mmaccel", "FRAGMENT")
_library.define("scatter_merge(Tensor x, Tensor assignment, Tensor weight, int n_out, bool deterministic) -> Tensor")
_library.define("unmerge(Tensor y, Tensor assignment) -> Tensor")
_library.impl("scatter_merge", _run, "CompositeExplicitAutograd")
_library.impl("unmerge", _run_unmerge, "CompositeExplicitAutograd")
torch.library.register_fake("mmaccel::scatter_merge", _fake, lib=_library)
torch.library.register_fake("mmaccel::unmerge", _fake_unmerge, lib=_library)

"""How far each token of a video moved since the frame before, or since the value that it was last computed from.

The signal by which EVS drops, HoliTom merges and caches over frames or denoising steps decide what is worth computing.
It is the torch op `mmaccel::frame_change`; `mmaccel.kernels` says which backend runs.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch

from mmaccel.errors import MethodError
from mmaccel.kernels.dispatch import choose, no_triton
from mmaccel.kernels.frame_change import cpu

__all__ = ["FrameChange", "Measure", "frame_change"]

Measure = Literal["cosine", "similarity", "l1", "l2"]
_MEASURES = get_args(Measure)


class FrameChange(NamedTuple):
    """What `frame_change` returns; `reference` and `seen` continue the same video in the next call."""

    change: torch.Tensor
    fired: torch.Tensor | None
    reference: torch.Tensor
    seen: torch.Tensor | None


def frame_change(
    x: torch.Tensor,
    *,
    reference: torch.Tensor | None = None,
    measure: Measure = "cosine",
    threshold: float | None = None,
    mask: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> FrameChange:
    """Return how far each token of x (B, T, S, D) moved from its reference, `change` float32 (B, T, S).

    measure: "cosine" is 1 - cos, in [0, 2]; "l1" and "l2" are the norm of the difference over the norm of the
    reference; "similarity" is the cosine itself, where likeness is wanted. A token of zeros has the cosine 0.
    reference: (B, S, D), dtype of x, what the first frame is compared with. A token that has no reference was never
    seen: its change is +inf (its similarity -inf). seen: bool (B, S), which tokens of `reference` hold something; by
    default all of them.
    threshold: None compares each frame with the one before. With a number the reference is a running one: a token
    replaces it only where it fires, which is where its change is above the threshold (NaN counts as above, so that a
    broken value is never reused). Slow drift then adds up until it fires.
    mask: bool (B, T, S), which tokens are valid. One that is not gets -inf, never fires and is no reference for others.

    The other fields: `fired` bool (B, T, S), None without a threshold; `reference` (B, S, D) after the last frame, and
    `seen` bool (B, S), the tokens that have one, None if all do. A video cut into several calls that pass both on gives
    the same as one call. NaN in a token or its reference makes its change NaN. Low-precision inputs are compared in
    float32, float64 in float64. Raises MethodError for arguments that do not fit.
    """
    _check(x, reference, measure, threshold, mask, seen)
    B, T, S, _ = x.shape
    change, at = torch.ops.mmaccel.frame_change(x, reference, seen, mask, _MEASURES.index(measure), threshold)
    fired = None if threshold is None else ~(change <= threshold)
    everywhere = mask is None and seen is None and (T > 0 or reference is not None)
    if threshold is None and everywhere:
        last = x[:, -1] if T else reference
        assert last is not None
        return FrameChange(change, None, last, None)
    given = x.new_zeros(()) if reference is None else reference
    last = torch.zeros_like(x[:, 0]) if T else x.new_zeros(B, S, x.shape[3])
    if T:
        last = x.gather(1, at.clamp_min(0)[:, None, :, None].expand(B, 1, S, x.shape[3]))[:, 0]
    last = torch.where((at >= 0)[..., None], last, torch.where((at == -1)[..., None], given, x.new_zeros(())))
    return FrameChange(change, fired, last, None if everywhere else at >= -1)


def _check(
    x: torch.Tensor,
    reference: torch.Tensor | None,
    measure: str,
    threshold: float | None,
    mask: torch.Tensor | None,
    seen: torch.Tensor | None,
) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise MethodError(f"x must be floating (B, T, S, D); got {x.dtype} {tuple(x.shape)}")
    if measure not in _MEASURES:
        raise MethodError(f"measure={measure!r} is not known; choose {', '.join(_MEASURES)}")
    if threshold is not None and (measure == "similarity" or not math.isfinite(threshold)):
        raise MethodError(
            f"threshold={threshold} with measure={measure!r}: a running reference needs a finite threshold on a change;"
            " take cosine, l1 or l2"
        )
    B, T, S, D = x.shape
    if reference is not None and (
        tuple(reference.shape) != (B, S, D) or reference.dtype != x.dtype or reference.device != x.device
    ):
        raise MethodError(
            f"reference must be {x.dtype} {(B, S, D)} on {x.device}; got {reference.dtype} {tuple(reference.shape)} on"
            f" {reference.device}"
        )
    if seen is not None and reference is None:
        raise MethodError("seen says which tokens of the reference count; give the reference as well")
    for name, given, shape in (("mask", mask, (B, T, S)), ("seen", seen, (B, S))):
        if given is not None and (given.dtype != torch.bool or tuple(given.shape) != shape or given.device != x.device):
            raise MethodError(
                f"{name} must be bool {shape} on {x.device}; got {given.dtype} {tuple(given.shape)} on {given.device}"
            )


def _run(
    x: torch.Tensor,
    reference: torch.Tensor | None,
    seen: torch.Tensor | None,
    mask: torch.Tensor | None,
    measure: int,
    threshold: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if choose("frame_change", x.device, triton_missing=no_triton(x)) == "triton":
        from mmaccel.kernels.frame_change import triton

        return triton.frame_change(x, reference, seen, mask, measure, threshold)
    return cpu.frame_change(x, reference, seen, mask, measure, threshold)


def _fake(
    x: torch.Tensor,
    reference: torch.Tensor | None,  # noqa: ARG001
    seen: torch.Tensor | None,  # noqa: ARG001
    mask: torch.Tensor | None,  # noqa: ARG001
    measure: int,  # noqa: ARG001
    threshold: float | None,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor]:
    B, T, S, _ = x.shape
    return x.new_empty((B, T, S), dtype=torch.float32), x.new_empty((B, S), dtype=torch.int64)


_library = torch.library.Library("mmaccel", "FRAGMENT")
_library.define(
    "frame_change(Tensor x, Tensor? reference, Tensor? seen, Tensor? mask, int measure, float? threshold)"
    " -> (Tensor, Tensor)"
)
_library.impl("frame_change", _run, "CompositeExplicitAutograd")
torch.library.register_fake("mmaccel::frame_change", _fake, lib=_library)

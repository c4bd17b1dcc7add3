"""Cut videos into segments so that merging what stands still over each of them saves most tokens.

The dynamic program of HoliTom: Holistic Token Merging for Fast Video Large Language Models (2025), for a whole batch
and without the [T, T, S] tensor of its window gains. It is the torch op `mmaccel::frame_dp`; `mmaccel.kernels` says
which backend runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmaccel.errors import MethodError
from mmaccel.kernels.dispatch import choose, no_triton
from mmaccel.kernels.frame_dp import cpu

__all__ = ["FrameDP", "frame_dp", "windows"]

_MAX_FRAMES = 8192  # of the Triton path: it holds the solutions for all ends in registers


class FrameDP(NamedTuple):
    """What `frame_dp` returns."""

    starts: torch.Tensor
    saved: torch.Tensor
    window: torch.Tensor


def frame_dp(static: torch.Tensor, longest: int = 1024, mask: torch.Tensor | None = None) -> FrameDP:
    """Return the partition of each item's T frames into windows that saves most tokens.

    static: bool (B, T - 1, S), whether a position is the same in frames t and t + 1. A window of frames i..j saves
    (j - i) * (positions static on all its steps) and holds at most `longest` frames.
    mask: bool (B, T, S), which tokens are valid; a position is static only between valid ones, so each frame of padding
    is a window of its own that saves nothing, and the other frames are cut as if it were not there.

    `starts` int64 (B, T) is the first frame of the window that ends at a frame in the best partition of the frames up
    to it; of equally good windows it is the shortest one. `saved` int64 (B): the tokens saved. `window` int64 (B, T):
    the number, from 0, of the window that each frame lies in; `windows(starts)` gives the same as lists. On a GPU
    nothing waits for the device. Raises MethodError for arguments that do not fit.
    """
    if static.ndim != 3 or static.dtype != torch.bool:
        raise MethodError(
            f"static must be bool (B, T - 1, S), such as `cosine > tau`; got {static.dtype} {tuple(static.shape)}"
        )
    if longest < 1:
        raise MethodError(f"longest={longest} frames make no window; give at least 1")
    B, steps, S = static.shape
    if mask is not None:
        if mask.dtype != torch.bool or tuple(mask.shape) != (B, steps + 1, S) or mask.device != static.device:
            raise MethodError(
                f"mask must be bool {(B, steps + 1, S)} on {static.device}; got {mask.dtype} {tuple(mask.shape)} on"
                f" {mask.device}"
            )
        static = static & mask[:, 1:] & mask[:, :-1]
    return FrameDP(*torch.ops.mmaccel.frame_dp(static, min(longest, steps + 1)))


def windows(starts: torch.Tensor) -> list[list[tuple[int, int]]]:
    """Follow `starts` (B, T) back from the last frame: each item's windows as (start, stop), in order of time."""
    if starts.ndim != 2:
        raise MethodError(f"starts must be (B, T), as frame_dp returns them; got {tuple(starts.shape)}")
    return [cpu.backtrack(row) for row in starts.tolist()]


def _run(static: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    reason = no_triton(static)
    if reason is None and static.shape[1] >= _MAX_FRAMES:
        reason = f"a video of {static.shape[1] + 1} frames is above {_MAX_FRAMES}"
    if choose("frame_dp", static.device, triton_missing=reason) == "triton":
        from mmaccel.kernels.frame_dp import triton

        return triton.frame_dp(static, longest)
    return cpu.frame_dp(static, longest)


def _fake(static: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # noqa: ARG001
    B, steps, _ = static.shape
    starts, window = (static.new_empty((B, steps + 1), dtype=torch.int64) for _ in range(2))
    return starts, static.new_empty((B,), dtype=torch.int64), window


_library = torch.library.Library("mmaccel", "FRAGMENT")
_library.define("frame_dp(Tensor static, int longest) -> (Tensor, Tensor, Tensor)")
_library.impl("frame_dp", _run, "CompositeExplicitAutograd")
torch.library.register_fake("mmaccel::frame_dp", _fake, lib=_library)

"""The specification of `nv12_to_rgb`: colours, then rows resized across, then columns down, all in whole numbers."""

from __future__ import annotations

import torch

__all__ = ["nv12_to_rgb"]


def _native(y: torch.Tensor, uv: torch.Tensor, colour: list[int]) -> torch.Tensor:
    """One picture, y [H, W] and uv [H/2, W/2, 2] as RGB int32 [3, H, W]; a pixel takes the chroma of its square."""
    luma, to_red, to_blue, u_to_green, v_to_green, offset = colour
    H, W = y.shape
    # eighths of a level: what 10 bits in the upper part of 16 hold beyond 8 bits stays
    lift = (lambda plane: plane.int() << 3) if y.dtype == torch.uint8 else (lambda plane: plane.int() >> 5)
    light = ((lift(y) - offset) * luma) >> 16
    chroma = lift(uv).repeat_interleave(2, 0)[:H].repeat_interleave(2, 1)[:, :W] - 1024
    u, v = chroma.unbind(-1)
    red, blue = light + ((v * to_red) >> 16), light + ((u * to_blue) >> 16)
    green = light + ((u * u_to_green) >> 16) + ((v * v_to_green) >> 16)
    return torch.stack([red, green, blue]).clamp_(0, 255)


def _across(rgb: torch.Tensor, at: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """[3, H, W] as int32 [3, H, w] in 128ths of a level."""
    total = rgb.new_zeros(3, rgb.shape[1], at.shape[0])
    for k, tap in enumerate(taps):
        total += rgb[..., (at + k).clamp_max(rgb.shape[2] - 1).long()] * tap
    return (total >> 7).clamp_max_(32767)


def _down(wide: torch.Tensor, at: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """[3, H, w] as int32 [3, h, w] in levels.

    libswscale rounds every product down and makes up for it in the sum; the last two rows it sums exactly.
    """
    K, h = taps.shape
    coarse = wide.new_full((3, h, wide.shape[2]), (64 + 8 * (K - 1)) >> 4)
    exact = torch.full_like(coarse, 64 << 12)
    for k, tap in enumerate(taps):
        product = wide[:, (at + k).clamp_max(wide.shape[1] - 1).long()] * tap[:, None]
        coarse += product >> 16
        exact += product
    last = torch.arange(h, device=wide.device)[:, None] >= h - 2
    return torch.where(last, exact >> 19, coarse >> 3).clamp_(0, 255)


def nv12_to_rgb(
    y: torch.Tensor,
    uv: torch.Tensor,
    out: torch.Tensor,
    slots: torch.Tensor,
    across_at: torch.Tensor,
    across: torch.Tensor,
    down_at: torch.Tensor,
    down: torch.Tensor,
    colour: list[int],
    turn: int,
    mean: torch.Tensor,
    spread: torch.Tensor,
) -> None:
    """Put pictures y [B, H, W], uv [B, H/2, W/2, 2] into out [N, 3, h, w] at slots [B]; -1 is nowhere.

    across_at, down_at: first source pixel of each target pixel; across, down: its taps [K, n]. turn: 1 swaps rows and
    columns, then 2 flips left and right, 4 top and bottom. What is not uint8 gets (level - mean) / spread, float32 [3].
    """
    flips = [axis for bit, axis in ((2, 2), (4, 1)) if turn & bit]
    for picture, chroma, slot in zip(y, uv, slots.tolist(), strict=True):
        if slot < 0:
            continue
        rgb = _down(_across(_native(picture, chroma, colour), across_at, across), down_at, down)
        upright = (rgb.transpose(1, 2) if turn & 1 else rgb).flip(flips)
        if out.dtype == torch.uint8:
            out[slot] = upright
        else:
            out[slot] = (upright - mean[:, None, None]) / spread[:, None, None]

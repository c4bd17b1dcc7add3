"""Pictures as video decoders leave them, NV12 or P010, to upright, resized, normalised RGB in one pass.

Between a hardware decoder and a vision tower lie a change of colours, a resize, a turn and a normalisation; each on its
own reads and writes the whole picture. Here the full-size RGB picture is never written. The arithmetic is that of
libswscale on x86-64 in whole numbers, so that frames are the same whether a GPU or FFmpeg's software has prepared them.
It is the torch op `mmaccel::nv12_to_rgb`; `mmaccel.kernels` says which backend runs.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch

from mmaccel.errors import MethodError
from mmaccel.kernels.dispatch import choose, no_triton
from mmaccel.kernels.nv12_to_rgb import reference
from mmaccel.kernels.nv12_to_rgb.taps import ACROSS_BITS, DOWN_BITS, INTERPOLATIONS, MATRICES, colour, tables

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["nv12_to_rgb"]

_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
_TURNS = {0: 0, 90: 1 | 2, 180: 2 | 4, 270: 1 | 4}


def nv12_to_rgb(
    y: torch.Tensor,
    uv: torch.Tensor,
    *,
    size: tuple[int, int] | None = None,
    matrix: str = "bt709",
    full_range: bool = False,
    interpolation: str = "BICUBIC",
    rotation: int = 0,
    mirror: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.uint8,
    out: torch.Tensor | None = None,
    slots: torch.Tensor | Sequence[int] | None = None,
) -> torch.Tensor:
    """Return pictures as RGB [N, 3, h, w]: `out` with the pictures in its `slots`, or a new tensor with one each.

    y: uint8 [B, H, W] or [H, W], uv: uint8 [B, ceil(H/2), ceil(W/2), 2] or without B (NV12); both uint16 for P010, with
    the value in the upper bits. Rows may be pitched: any strides are read where they are.
    size: (h, w) in pixels after turning, by default that of the picture. matrix: bt601, bt709, bt2020 (non-constant
    luminance), fcc or smpte240m; full_range: luma 0 to 255 instead of 16 to 235. interpolation: BICUBIC, BILINEAR,
    AREA, LANCZOS or POINT, with antialiasing where the picture shrinks. rotation: clockwise degrees, 0, 90, 180 or 270,
    after resizing; mirror: then left and right are swapped.
    dtype: uint8 gives levels, 0 to 255. float16, bfloat16 and float32 give (level / 255 - mean) / std, with mean 0 and
    std 1 by default, computed in float32 as (level - 255 mean) / (255 std).
    out: contiguous in the last dimension or not, of any of these dtypes, whose size and dtype then count. slots: int64
    [B], where in `out` each picture goes, -1 for nowhere; by default 0, 1, ...

    Levels equal, bit for bit, those of libswscale (FFmpeg 8.1 on x86-64) for 8-bit pictures of even height: yuv420p to
    RGB at full size, then each colour resized as a gray picture. There, odd heights are converted by another path
    with smoothed chroma; here, all sizes take the chroma of the nearest sample.

    Raises MethodError for arguments that do not fit, and for a side that shrinks so much (about 64 times, BICUBIC) that
    it takes two steps.
    """
    y, uv = (y[None], uv[None]) if y.ndim == 2 and uv.ndim == 3 else (y, uv)
    _check_planes(y, uv)
    if matrix not in MATRICES:
        raise MethodError(f"matrix={matrix!r} is not known; choose {', '.join(MATRICES)}")
    if interpolation not in INTERPOLATIONS:
        raise MethodError(f"interpolation={interpolation!r} is not known; choose {', '.join(INTERPOLATIONS)}")
    if rotation not in _TURNS:
        raise MethodError(f"rotation={rotation} must be 0, 90, 180 or 270 degrees")
    B, H, W = y.shape
    turn = _TURNS[rotation] ^ (2 if mirror else 0)
    if out is None:
        h, w = size or ((W, H) if turn & 1 else (H, W))
        if min(h, w) < 1 or dtype not in _DTYPES:
            raise MethodError(f"size={(h, w)} must be at least 1 x 1, and dtype={dtype} one of {_names()}")
        out = torch.empty(B, 3, h, w, dtype=dtype, device=y.device)
    _check_out(out, size, y.device)
    if out.dtype == torch.uint8 and (mean is not None or std is not None):
        raise MethodError("mean and std are for floating results; ask for dtype=torch.float32 or leave them out")
    to = torch.arange(B) if slots is None else torch.as_tensor(slots)
    if tuple(to.shape) != (B,) or to.dtype != torch.int64:
        raise MethodError(f"slots must be int64 ({B},), one for each picture; got {to.dtype} {tuple(to.shape)}")
    if to.device.type == "cpu" and B and not -1 <= int(to.min()) <= int(to.max()) < out.shape[0]:
        raise MethodError(f"slots must lie in [0, {out.shape[0]}), or be -1; got {to.tolist()}")
    middle, spread = _normaliser(_three(mean, 0.0, "mean"), _three(std, 1.0, "std"), y.device)
    if B == 0:
        return out

    across, down = (out.shape[2], out.shape[3]) if turn & 1 else (out.shape[3], out.shape[2])
    torch.ops.mmaccel.nv12_to_rgb(
        y, uv, out, to.to(y.device),
        *tables(W, across, interpolation, ACROSS_BITS, y.device), *tables(H, down, interpolation, DOWN_BITS, y.device),
        colour(matrix, full_range), turn, middle, spread,
    )  # fmt: skip
    return out


def _names() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)


def _three(values: Sequence[float] | None, default: float, name: str) -> tuple[float, ...]:
    given = (default,) * 3 if values is None else tuple(float(value) for value in values)
    if len(given) != 3 or not all(math.isfinite(value) for value in given) or (name == "std" and 0 in given):
        raise MethodError(f"{name} must be three finite numbers, one a colour, and std not 0; got {given}")
    return given


@functools.lru_cache(maxsize=64)
def _normaliser(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """255 mean and 255 std on a device, where they stay: a copy for each frame would cost more than the frame."""
    return torch.tensor([255.0 * each for each in mean]).to(device), torch.tensor([255.0 * e for e in std]).to(device)


def _check_planes(y: torch.Tensor, uv: torch.Tensor) -> None:
    shape = (y.shape[0], -(-y.shape[1] // 2), -(-y.shape[2] // 2), 2) if y.ndim == 3 else None
    if shape is None or tuple(uv.shape) != shape or 0 in y.shape[1:]:
        raise MethodError(
            "y must be (B, H, W) and uv (B, ceil(H/2), ceil(W/2), 2), or both without B; got "
            f"{tuple(y.shape)} and {tuple(uv.shape)}"
        )
    if y.dtype not in (torch.uint8, torch.uint16) or uv.dtype != y.dtype or uv.device != y.device:
        raise MethodError(
            f"y and uv must both be uint8 or both uint16, on one device; got {y.dtype} on {y.device}, {uv.dtype} on "
            f"{uv.device}"
        )


def _check_out(out: torch.Tensor, size: tuple[int, int] | None, device: torch.device) -> None:
    if out.ndim != 4 or out.shape[1] != 3 or 0 in out.shape[2:] or out.dtype not in _DTYPES or out.device != device:
        raise MethodError(
            f"out must be (N, 3, h, w) on {device} in {_names()}; got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    if size is not None and tuple(out.shape[2:]) != tuple(size):
        raise MethodError(f"out holds pictures of {tuple(out.shape[2:])}, size={tuple(size)} was asked for; give one")
    if any(stride == 0 and length > 1 for stride, length in zip(out.stride(), out.shape, strict=True)):
        raise MethodError("out is an expanded view, which cannot be written; make it contiguous")


def _run(
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
    given = (y, uv, out, slots, across_at, across, down_at, down, colour, turn, mean, spread)
    if choose("nv12_to_rgb", y.device, triton_missing=no_triton(y)) == "triton":
        from mmaccel.kernels.nv12_to_rgb import triton

        return triton.nv12_to_rgb(*given)
    return reference.nv12_to_rgb(*given)


def _fake(*given: object) -> None:  # noqa: ARG001
    return None


_library = torch.library.Library("mmaccel", "FRAGMENT")
_library.define(
    "nv12_to_rgb(Tensor y, Tensor uv, Tensor(a!) out, Tensor slots, Tensor across_at, Tensor across, Tensor down_at,"
    " Tensor down, int[] colour, int turn, Tensor mean, Tensor spread) -> ()"
)
_library.impl("nv12_to_rgb", _run, "CompositeExplicitAutograd")
torch.library.register_fake("mmaccel::nv12_to_rgb", _fake, lib=_library)

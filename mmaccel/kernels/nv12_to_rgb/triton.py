"""`nv12_to_rgb` on a GPU: a program makes one tile of one picture, and goes through the source rows under it once.

Each source row is brought to the tile's columns, its pixels converted on the way, and is added to all of the tile's
rows that it belongs to. So nothing between the decoder's planes and the result is written. All arithmetic is in whole
numbers up to the normalisation, which makes the result that of the reference whatever the tile.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# Triton reads annotations while it compiles, so they must not become strings here.
import torch
import triton
import triton.language as tl

from mmaccel.kernels.tiles import widen

__all__ = ["nv12_to_rgb"]

_ROWS, _COLUMNS = 8, 128  # of a tile: source rows under two tiles are read twice, and three sums are in registers


@triton.jit
def _eighths(plane, WIDE: tl.constexpr):
    """Levels in eighths: 8 bits, or the upper 10 of 16 with the rest below them."""
    if WIDE:
        return plane.to(tl.int32) >> 5
    return plane.to(tl.int32) << 3


@triton.jit
def _level(total, coarse_start, exact):
    """A vertical sum as a level from 0 to 255."""
    value = tl.where(exact, (total + (64 << 12)) >> 19, (total + coarse_start) >> 3)
    return tl.minimum(tl.maximum(value, 0), 255)


@triton.jit
def _nv12_to_rgb_kernel(
    y, uv, out, slots, across_at, across, down_at, down, mean, spread, H, W, N, h, w, across_K, down_K,
    y_b, y_h, y_w, uv_b, uv_h, uv_w, uv_c, out_n, out_c, out_h, out_w, origin,
    luma, to_red, to_blue, u_to_green, v_to_green, offset,
    WIDE: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    strips = tl.cdiv(w, COLUMNS)
    tall = tl.cdiv(h, ROWS)
    b = program // strips // tall
    begin = (program // strips % tall * ROWS).to(tl.int32)
    row = begin + tl.arange(0, ROWS)
    column = (program % strips * COLUMNS).to(tl.int32) + tl.arange(0, COLUMNS)
    slot = tl.load(slots + b)
    y += b * y_b
    uv += b * uv_b

    first = tl.load(across_at + column, mask=column < w, other=0)
    top = tl.load(down_at + row, mask=row < h, other=0)
    exact = row >= h - 2
    shift = tl.where(exact, 0, 16)[:, None]
    red = tl.zeros([ROWS, COLUMNS], tl.int32)
    green = tl.zeros([ROWS, COLUMNS], tl.int32)
    blue = tl.zeros([ROWS, COLUMNS], tl.int32)
    start = tl.load(down_at + begin)
    stop = tl.minimum(tl.load(down_at + tl.minimum(begin + ROWS, h) - 1) + down_K, H)
    for source in range(start, stop):
        y_row = y + source * y_h
        uv_row = uv + (source // 2) * uv_h
        r = tl.zeros([COLUMNS], tl.int32)
        g = tl.zeros([COLUMNS], tl.int32)
        bl = tl.zeros([COLUMNS], tl.int32)
        for k in range(across_K):
            tap = tl.load(across + k * w + column, mask=column < w, other=0)
            x = tl.minimum(first + k, W - 1)
            light = ((_eighths(tl.load(y_row + x * y_w), WIDE) - offset) * luma) >> 16
            half = uv_row + (x // 2) * uv_w
            u = _eighths(tl.load(half), WIDE) - 1024
            v = _eighths(tl.load(half + uv_c), WIDE) - 1024
            r += tl.minimum(tl.maximum(light + ((v * to_red) >> 16), 0), 255) * tap
            bl += tl.minimum(tl.maximum(light + ((u * to_blue) >> 16), 0), 255) * tap
            mixed = light + ((u * u_to_green) >> 16) + ((v * v_to_green) >> 16)
            g += tl.minimum(tl.maximum(mixed, 0), 255) * tap
        r = tl.minimum(r >> 7, 32767)[None]
        g = tl.minimum(g >> 7, 32767)[None]
        bl = tl.minimum(bl >> 7, 32767)[None]
        nth = source - top
        mine = (nth >= 0) & (nth < down_K) & (row < h)
        tap = tl.load(down + nth * h + row, mask=mine, other=0)[:, None]
        red += (r * tap) >> shift
        green += (g * tap) >> shift
        blue += (bl * tap) >> shift

    coarse = (64 + 8 * (down_K - 1)) >> 4
    rows = tl.where((slot >= 0) & (slot < N), h, 0)
    there = (row < rows)[:, None] & (column < w)[None]
    place = out + slot * out_n + origin + row[:, None].to(tl.int64) * out_h + column[None].to(tl.int64) * out_w
    for channel in tl.static_range(3):
        total = red if channel == 0 else green if channel == 1 else blue
        value = _level(total, coarse, exact[:, None])
        if LEVELS:
            tl.store(place + channel * out_c, value.to(tl.uint8), mask=there)
        else:
            middle = tl.load(mean + channel)
            divisor = tl.full([ROWS, COLUMNS], 0.0, tl.float32) + tl.load(spread + channel)
            scaled = tl.div_rn(value.to(tl.float32) - middle, divisor)
            tl.store(place + channel * out_c, scaled.to(out.dtype.element_ty), mask=there)


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
    """Equal to reference.py bit for bit; same arguments. A slot outside [0, N) is nowhere."""
    B, H, W = y.shape
    h, w = down_at.shape[0], across_at.shape[0]
    if B == 0:
        return
    # the interpreter cuts bfloat16 off where a GPU rounds
    target = torch.empty(out.shape, dtype=torch.float32, device=out.device) if widen(out.dtype) else out
    out_n, out_c, out_h, out_w = target.stride()
    # a turned or mirrored picture is written along other strides, from another corner
    origin = (out_w * (out.shape[3] - 1) if turn & 2 else 0) + (out_h * (out.shape[2] - 1) if turn & 4 else 0)
    step_right, step_down = -out_w if turn & 2 else out_w, -out_h if turn & 4 else out_h
    by_row, by_column = (step_right, step_down) if turn & 1 else (step_down, step_right)
    if target is not out:
        target.copy_(out)
    _nv12_to_rgb_kernel[(B * triton.cdiv(h, _ROWS) * triton.cdiv(w, _COLUMNS),)](
        y, uv, target, slots, across_at, across, down_at, down, mean, spread, H, W, out.shape[0], h, w,
        across.shape[0], down.shape[0], *y.stride(), *uv.stride(), out_n, out_c, by_row, by_column, origin, *colour,
        WIDE=y.dtype != torch.uint8, LEVELS=out.dtype == torch.uint8, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
    if target is not out:
        out.copy_(target)

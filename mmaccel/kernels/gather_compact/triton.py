"""`gather_compact` on a GPU: one launch whose programs share out among the tensors; each copies one tile.

Values are read and written as whole numbers of their width, so a tile costs the same whatever it holds, and no
arithmetic can touch it. Tiles of rows are measured in bytes, so that the widest vectors are used for every dtype.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Triton reads annotations while it compiles, so they must not become strings here.
import torch
import triton
import triton.language as tl

__all__ = ["gather_compact"]

# 8 KB of rows a program: four 16-byte vectors a thread in flight, and enough programs to fill the GPU with few tokens.
_TILE, _CHUNK = 8192, 1024
_BLOCK = 512  # tokens a program of the tensors with one number a token

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _copy_rows(
    index, x, out, local, C, x_b, x_s, x_c, S, L,
    CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    COLS: tl.constexpr = CHUNK * 8 // x.dtype.element_ty.primitive_bitwidth
    chunks, blocks = tl.cdiv(C, COLS), tl.cdiv(L, TILE // CHUNK)
    b = local // chunks // blocks
    place = (local // chunks % blocks) * (TILE // CHUNK) + tl.arange(0, TILE // CHUNK)
    c = (local % chunks) * COLS + tl.arange(0, COLS)
    at = tl.load(index + b * L + place, mask=place < L, other=-1)
    there = (at >= 0) & (at < S)
    inside = (c < C)[None]
    value = tl.load(x + b * x_b + at[:, None] * x_s + c[None] * x_c, mask=there[:, None] & inside, other=0)
    tl.store(out + (b * L + place)[:, None] * C + c[None], value, mask=(place < L)[:, None] & inside)


@triton.jit
def _copy_columns(
    index, valid, x, out, local, x_p, x_b, x_s, B, S, L,
    BLOCK: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L, BLOCK)
    pb = local // blocks
    b = pb % B
    place = (local % blocks) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(index + b * L + place, mask=place < L, other=-1)
    there = (at >= 0) & (at < S)
    if ZERO:
        there = there & (tl.load(valid + b * L + place, mask=place < L, other=0) != 0)
    value = tl.load(x + (pb // B) * x_p + b * x_b + at * x_s, mask=there, other=0)
    tl.store(out + pb * L + place, value, mask=place < L)


@triton.jit
def _gather_kernel(
    index, valid, rows, rows_out, rows_strides, widths, columns, columns_out, columns_strides, fronts, B, S, L,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEEP: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # the programs of one tensor follow those of the one before
    local = tl.program_id(0).to(tl.int64)
    for t in tl.static_range(ROWS):
        C = widths[t]
        chunks = tl.cdiv(C * (rows[t].dtype.element_ty.primitive_bitwidth // 8), CHUNK)
        programs = chunks * tl.cdiv(L, TILE // CHUNK) * B
        if (local >= 0) & (local < programs):
            _copy_rows(
                index, rows[t], rows_out[t], local, C, rows_strides[3 * t], rows_strides[3 * t + 1],
                rows_strides[3 * t + 2], S, L, CHUNK, TILE,
            )  # fmt: skip
        local -= programs
    for t in tl.static_range(COLUMNS):
        programs = fronts[t] * tl.cdiv(L, BLOCK) * B
        if (local >= 0) & (local < programs):
            _copy_columns(
                index, valid, columns[t], columns_out[t], local, columns_strides[3 * t], columns_strides[3 * t + 1],
                columns_strides[3 * t + 2], B, S, L, BLOCK, t >= KEEP,
            )  # fmt: skip
        local -= programs


def gather_compact(
    index: torch.Tensor,
    valid: torch.Tensor | None,
    rows: list[torch.Tensor],
    columns: list[torch.Tensor],
    masks: list[torch.Tensor],
) -> list[torch.Tensor]:
    """Equal to reference.py bit for bit; same arguments, rows [B|1, S, C]. An index outside [0, S) gives 0."""
    B, L = index.shape
    index = index.contiguous()
    valid = None if valid is None else valid.contiguous()
    moved = [x.new_empty(B, L, x.shape[2]) for x in rows]
    moved += [x.new_empty(*x.shape[:-2], B, L) for x in columns + masks]

    R = len(rows)
    wide = [(_whole(x.expand(B, -1, -1)), _whole(out)) for x, out in zip(rows, moved[:R], strict=True) if out.numel()]
    keep = [(x, out) for x, out in zip(columns, moved[R:], strict=False) if out.numel()]
    zero = [(x, out) for x, out in zip(masks, moved[R + len(columns) :], strict=True) if out.numel()]
    thin = [(_whole(_in_front(x, B)), _whole(out)) for x, out in keep + zero]
    if not wide and not thin:
        return moved
    S = wide[0][0].shape[1] if wide else thin[0][0].shape[2]
    bytes_of = [x.shape[2] * x.element_size() for x, _ in wide]
    chunk = min(_CHUNK, triton.next_power_of_2(max(bytes_of, default=_CHUNK)))
    # a program copies at least a 16-byte vector of one row, and at most 512 rows
    chunk = max(chunk, 16)
    grid = sum(B * triton.cdiv(L, _TILE // chunk) * triton.cdiv(row, chunk) for row in bytes_of)
    grid += sum(B * triton.cdiv(L, _BLOCK) * x.shape[0] for x, _ in thin)
    _gather_kernel[(grid,)](
        index, valid,
        tuple(x for x, _ in wide), tuple(out for _, out in wide),
        tuple(stride for x, _ in wide for stride in x.stride()), tuple(x.shape[2] for x, _ in wide),
        tuple(x for x, _ in thin), tuple(out for _, out in thin),
        tuple(stride for x, _ in thin for stride in x.stride()), tuple(x.shape[0] for x, _ in thin),
        B, S, L, ROWS=len(wide), COLUMNS=len(thin), KEEP=len(thin) if valid is None else len(keep),
        CHUNK=chunk, TILE=_TILE, BLOCK=_BLOCK,
    )  # fmt: skip
    return moved


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.view(_WHOLE[x.element_size()])


def _in_front(x: torch.Tensor, B: int) -> torch.Tensor:
    """[..., B|1, S] as [P, B, S], without a copy where it is 2-D or 3-D."""
    return x.expand(*x.shape[:-2], B, x.shape[-1]).reshape(-1, B, x.shape[-1])

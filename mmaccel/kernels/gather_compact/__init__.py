"""Per-token tensors at the kept tokens only: hidden states, rotary tables, position ids and masks in one launch.

Whatever drops tokens between two layers has to move the same tokens of many tensors. Done one by one, the small ones
cost a launch each; here one kernel moves them all. Values are copied, never computed with, so the result equals
`torch.gather` bit for bit in every dtype. It is the torch custom op `mmaccel::gather_compact`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mmaccel.errors import MethodError
from mmaccel.kernels.dispatch import choose, no_triton
from mmaccel.kernels.gather_compact import cpu, reference

__all__ = ["gather_compact"]


def gather_compact(
    index: torch.Tensor,
    valid: torch.Tensor | None = None,
    *,
    rows: Sequence[torch.Tensor] = (),
    columns: Sequence[torch.Tensor] = (),
    masks: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, ...]:
    """Return every tensor at the kept tokens: first those of `rows`, then of `columns`, then of `masks`, in order.

    index: int64 (B, L), the old place, in [0, S), of each new token; valid: bool (B, L), False for places that only
    fill the batch up. Any dtype may be mixed with any other:
    rows: (B, S, ...) -> (B, L, ...), tokens that are rows, such as hidden states or the rotary tables cos and sin.
    columns: (..., B, S) -> (..., B, L), one number a token, such as position ids, 2-D or with an axis in front.
    masks: like columns, but 0 (False) where `valid` is False; elsewhere such places get what `index` points at.
    A tensor with 1 in place of B is shared by the items and comes out with B. Results are contiguous.

    A place outside [0, S) is an error on the CPU; a GPU is not waited for, and gives 0 there. Where gradients are
    wanted the path is torch. Raises MethodError for arguments that do not fit.
    """
    given = [*rows, *columns, *masks]
    _check(index, valid, rows, [*columns, *masks])
    if not given:
        return ()
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        if not torch.compiler.is_compiling():
            choose("gather_compact", index.device, triton_missing="it has no backward, and gradients are wanted")
        return tuple(reference.gather_compact(index, valid, list(rows), list(columns), list(masks)))
    B, L = index.shape
    flat = [x if x.ndim == 3 else x.reshape(*x.shape[:2], math.prod(x.shape[2:])) for x in rows]
    moved = torch.ops.mmaccel.gather_compact(index, valid, flat, list(columns), list(masks))
    for i, x in enumerate(rows):
        if x.ndim != 3:
            moved[i] = moved[i].view(B, L, *x.shape[2:])
    return tuple(moved)


def _check(
    index: torch.Tensor, valid: torch.Tensor | None, rows: Sequence[torch.Tensor], columns: Sequence[torch.Tensor]
) -> None:
    if index.ndim != 2 or index.dtype != torch.int64:
        raise MethodError(f"the index must be int64 (B, L); got {index.dtype} {tuple(index.shape)}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != index.shape):
        raise MethodError(f"valid must be bool {tuple(index.shape)}; got {valid.dtype} {tuple(valid.shape)}")
    B, places = index.shape[0], set()
    for x, kind, batch, place in [(x, "rows", 0, 1) for x in rows] + [(x, "columns", -2, -1) for x in columns]:
        if x.ndim < 2 or x.shape[batch] not in (1, B):
            shape = "(B, S, ...)" if kind == "rows" else "(..., B, S)"
            raise MethodError(f"{kind} are {shape} with B = {B} or 1; got {tuple(x.shape)}")
        if x.device != index.device:
            raise MethodError(f"the index is on {index.device}, a tensor to gather on {x.device}; bring them together")
        places.add(x.shape[place])
    if len(places) > 1:
        raise MethodError(f"tensors gathered together must have the same number of tokens; got {sorted(places)}")
    if places and index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
        low, high = index.aminmax()
        S = places.pop()
        if int(low) < 0 or int(high) >= S:
            raise MethodError(f"the index holds places outside [0, {S})")


def _run(
    index: torch.Tensor,
    valid: torch.Tensor | None,
    rows: list[torch.Tensor],
    columns: list[torch.Tensor],
    masks: list[torch.Tensor],
) -> list[torch.Tensor]:
    # values are copied as whole numbers of their width, so float64 is no obstacle
    if choose("gather_compact", index.device, triton_missing=no_triton(index)) == "triton":
        from mmaccel.kernels.gather_compact import triton

        return triton.gather_compact(index, valid, rows, columns, masks)
    return cpu.gather_compact(index, valid, rows, columns, masks)


def _fake(
    index: torch.Tensor,
    valid: torch.Tensor | None,  # noqa: ARG001
    rows: list[torch.Tensor],
    columns: list[torch.Tensor],
    masks: list[torch.Tensor],
) -> list[torch.Tensor]:
    return [x.new_empty(*index.shape, x.shape[2]) for x in rows] + [
        x.new_empty(*x.shape[:-2], *index.shape) for x in (*columns, *masks)
    ]


_library = torch.library.Library("mmaccel", "FRAGMENT")
_library.define(
    "gather_compact(Tensor index, Tensor? valid, Tensor[] rows, Tensor[] columns, Tensor[] masks) -> Tensor[]"
)
_library.impl("gather_compact", _run, "CompositeExplicitAutograd")
torch.library.register_fake("mmaccel::gather_compact", _fake, lib=_library)

"""Attention of some fresh rows against keys and values of which the rest is cached.

What methods do that compute only the tokens that changed: STC-Cacher (encoder features of similar frames), HSA and
DiffSparse (denoising steps). Rows that were not computed keep the keys and values of the last time that they were. It
is the torch op `mmaccel::partial_row_attention`; `mmaccel.kernels` says which backend runs.
"""

from __future__ import annotations

import torch

from mmaccel.errors import MethodError
from mmaccel.kernels.dispatch import choose, no_triton
from mmaccel.kernels.partial_row_attention import cpu

__all__ = ["partial_row_attention"]

_MAX_HEAD = {2: 256, 4: 128}  # of the Triton path, by the size of a channel in bytes; longer ones leave its registers


def partial_row_attention(
    q: torch.Tensor,
    k_new: torch.Tensor | None,
    v_new: torch.Tensor | None,
    rows: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    key_padding: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Write fresh keys and values into their rows of the caches, then attend from those rows to all N cached rows.

    q (B, H, m, D), k_new (B, Hkv, m, D) and v_new (B, Hkv, m, Dv) belong to m active rows, after norms and rotary
    embedding, H a multiple of Hkv; k_cache (B, Hkv, N, D) and v_cache (B, Hkv, N, Dv) hold all rows and are changed in
    place. All share a floating dtype. None for k_new or v_new leaves that cache as it is: pass the whole tensor as the
    cache where every key is computed anew. The result (B, H, m, Dv) has the dtype of q and lies token by token in
    memory, so `transpose(1, 2).flatten(2)` is free.

    rows: int64 (B, m), or (m,) for the same ones in every item: the place of each active row among the N, in any
    order, distinct within an item (which of two equal ones is kept is not defined). -1 is padding: nothing is written
    for it and its output is 0. Other numbers outside [0, N) raise on the CPU; the Triton path takes them as padding.
    key_padding: bool (B, N), True where the cached row is valid. causal: row r sees the keys up to r; with sorted rows
    whole blocks of later keys are skipped. A row that sees no key gives 0. scale: None is D ** -0.5.

    NaN in a row or in a valid key or value shows in the result; under `causal` it may also reach rows before that key,
    and torch's CPU kernel gives 0 to a row of which every visible key is NaN. NaN in padding is ignored. Not
    differentiable. Raises MethodError for arguments that do not fit.
    """
    _check(q, k_new, v_new, k_cache, v_cache, key_padding)
    B, _, m, D = q.shape
    rows = rows.expand(B, -1) if rows.ndim == 1 else rows
    _check_rows(rows, B, m, k_cache.shape[2])
    scale = D**-0.5 if scale is None else float(scale)
    return torch.ops.mmaccel.partial_row_attention(q, k_new, v_new, rows, k_cache, v_cache, key_padding, causal, scale)


def _check(
    q: torch.Tensor,
    k_new: torch.Tensor | None,
    v_new: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    key_padding: torch.Tensor | None,
) -> None:
    if q.ndim != 4 or k_cache.ndim != 4 or v_cache.ndim != 4 or q.shape[0] != k_cache.shape[0]:
        raise MethodError(
            "q must be (B, H, m, D), k_cache (B, Hkv, N, D) and v_cache (B, Hkv, N, Dv), equal in B; got "
            f"{tuple(q.shape)}, {tuple(k_cache.shape)}, {tuple(v_cache.shape)}"
        )
    if q.shape[3] != k_cache.shape[3] or 0 in (q.shape[3], v_cache.shape[3]):
        raise MethodError(f"the heads of q and k_cache must be of one length; got {q.shape[3]} and {k_cache.shape[3]}")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise MethodError(
            f"the caches must be equal in B, Hkv and N; got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if k_cache.shape[1] == 0 or q.shape[1] % k_cache.shape[1]:
        raise MethodError(f"the {q.shape[1]} query heads must be a multiple of the {k_cache.shape[1]} key heads")
    for name, new, cache in (("k_new", k_new, k_cache), ("v_new", v_new, v_cache)):
        wanted = (*cache.shape[:2], q.shape[2], cache.shape[3])
        if new is not None and tuple(new.shape) != wanted:
            raise MethodError(f"{name} must be {wanted}, the active rows of its cache; got {tuple(new.shape)}")
        if new is not None and any(s == 0 and n > 1 for s, n in zip(cache.stride(), cache.shape, strict=True)):
            raise MethodError(f"the cache of {name} is an expanded view, which cannot be written; make it contiguous")
    given = [tensor for tensor in (q, k_new, v_new, k_cache, v_cache) if tensor is not None]
    if not q.is_floating_point() or any((t.dtype, t.device) != (q.dtype, q.device) for t in given):
        raise MethodError(
            "queries, new rows and caches must share a floating dtype and a device; got "
            + ", ".join(f"{t.dtype} on {t.device}" for t in given)
        )
    shape = (q.shape[0], k_cache.shape[2])
    if key_padding is not None and (key_padding.dtype != torch.bool or tuple(key_padding.shape) != shape):
        raise MethodError(
            f"key_padding must be bool of shape {shape}; got {key_padding.dtype} {tuple(key_padding.shape)}"
        )


def _check_rows(rows: torch.Tensor, B: int, m: int, N: int) -> None:
    if rows.dtype != torch.int64 or tuple(rows.shape) != (B, m):
        raise MethodError(f"rows must be int64 of shape {(B, m)} or {(m,)}; got {rows.dtype} {tuple(rows.shape)}")
    # Reading values would make the host wait for a GPU, and would break a compiled graph in two.
    if torch.compiler.is_compiling() or rows.device.type != "cpu" or not rows.numel():
        return
    least, most = int(rows.min()), int(rows.max())
    if not -1 <= least <= most < N:
        raise MethodError(f"rows must lie in [0, {N}), or be -1 for padding; got {least} to {most}")


def _run(
    q: torch.Tensor,
    k_new: torch.Tensor | None,
    v_new: torch.Tensor | None,
    rows: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    key_padding: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    reason = no_triton(q)
    longest = max(q.shape[3], v_cache.shape[3])
    if reason is None and longest > _MAX_HEAD.get(q.element_size(), 0):
        reason = f"heads of {longest} channels in {q.dtype} are above {_MAX_HEAD.get(q.element_size(), 0)}"
    if choose("partial_row_attention", q.device, triton_missing=reason) == "triton":
        from mmaccel.kernels.partial_row_attention import triton

        return triton.partial_row_attention(q, k_new, v_new, rows, k_cache, v_cache, key_padding, causal, scale)
    return cpu.partial_row_attention(q, k_new, v_new, rows, k_cache, v_cache, key_padding, causal, scale)


def _fake(
    q: torch.Tensor,
    k_new: torch.Tensor | None,  # noqa: ARG001
    v_new: torch.Tensor | None,  # noqa: ARG001
    rows: torch.Tensor,  # noqa: ARG001
    k_cache: torch.Tensor,  # noqa: ARG001
    v_cache: torch.Tensor,
    key_padding: torch.Tensor | None,  # noqa: ARG001
    causal: bool,  # noqa: ARG001
    scale: float,  # noqa: ARG001
) -> torch.Tensor:
    B, H, m, _ = q.shape
    return q.new_empty(B, m, H, v_cache.shape[3]).transpose(1, 2)


# torch.library.custom_op would import torch._dynamo at the first eager call: seconds, in the middle of a first token.
_library = torch.library.Library("mmaccel", "FRAGMENT")
_library.define(
    "partial_row_attention(Tensor q, Tensor? k_new, Tensor? v_new, Tensor rows, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor? key_padding, bool causal, float scale) -> Tensor"
)
_library.impl("partial_row_attention", _run, "CompositeExplicitAutograd")
torch.library.register_fake("mmaccel::partial_row_attention", _fake, lib=_library)

"""How much attention every token receives, without the attention map and without leaving SDPA or flash attention.

Many token reducers (VisionZip, HoliTom, EarlyTom, FastV, SnapKV-like cache selection) rank tokens by column means of
the softmax map, and their public code runs the model in eager attention to get it. This op recomputes the columns from
q and k in blocks. It is the torch custom op `mmaccel::attention_received`; `mmaccel.kernels` says which backend runs.
"""

from __future__ import annotations

from typing import Literal

import torch

from mmaccel.errors import MethodError
from mmaccel.kernels.attention_received import cpu
from mmaccel.kernels.dispatch import choose, no_triton

__all__ = ["attention_received"]

_MAX_HEAD = 256  # of the Triton path

Queries = Literal["all"] | int | tuple[int, int] | torch.Tensor


def attention_received(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    queries: Queries = "all",
    reduce: Literal["token", "block", "diagonal"] = "token",
    block: int = 64,
    causal: bool = False,
    key_padding: torch.Tensor | None = None,
    query_padding: torch.Tensor | None = None,
    heads: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Return the mean over heads and chosen query rows of `softmax(q k^T * scale)`: what each key receives.

    q (B, H, Sq, D) and k (B, Hkv, Sk, D) are as attention sees them (after norms and rotary embedding), of one
    floating dtype, H a multiple of Hkv. The result is float32 (B, N), or (B, H, N) with `heads`, and sums to 1 over
    the N entries of an item (of each head); an item without a valid query row or a valid key receives 0 everywhere.

    queries: "all"; an int n, the last n valid rows of each item; (start, stop), a span of rows; or a 1-D integer
    tensor of row numbers (negative ones count from the end, repeated ones count twice).
    key_padding: bool (B, Sk), True where the key is valid. query_padding: bool (B, Sq) likewise; without it every row
    is valid, except under `causal`, where queries are the last Sq keys and share their validity.
    causal: a row sees the keys up to its own position; rows are aligned to the end of the keys.
    reduce: "token", a value for every key, N = Sk; "block", the sum of each `block` keys in a row (the last block may
    be shorter), N = ceil(Sk / block), as UniPrefill scores blocks; "diagonal" (causal only), entry o sums what keys
    receive that lie o places before their query, N = Sk, as MInference estimates slash lines. scale: None is D ** -0.5.

    NaN in a row or key that takes part makes the item's result NaN. Raises MethodError for arguments that do not fit.
    """
    _check(q, k, reduce, block, causal, key_padding, query_padding)
    B, _, Sq, D = q.shape
    if query_padding is None and causal and key_padding is not None:
        query_padding = key_padding[:, k.shape[2] - Sq :]
    rows = _rows(queries, B, Sq, query_padding, q.device)
    received = torch.ops.mmaccel.attention_received(
        q, k, rows, key_padding, causal, heads, D**-0.5 if scale is None else float(scale), reduce == "diagonal"
    )
    if reduce != "block":
        return received
    short = -received.shape[-1] % block
    return torch.nn.functional.pad(received, (0, short)).unflatten(-1, (-1, block)).sum(-1)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    reduce: str,
    block: int,
    causal: bool,
    key_padding: torch.Tensor | None,
    query_padding: torch.Tensor | None,
) -> None:
    if reduce not in ("token", "block", "diagonal"):
        raise MethodError(f"reduce={reduce!r} is not known; choose token, block or diagonal")
    if block < 1:
        raise MethodError(f"block={block} keys make no block; give at least 1")
    if reduce == "diagonal" and not causal:
        raise MethodError("diagonals are counted back from the query, so they need causal=True")
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise MethodError(
            f"q must be (B, H, Sq, D) and k (B, Hkv, Sk, D), equal in B and D; got {tuple(q.shape)}, {tuple(k.shape)}"
        )
    if q.dtype != k.dtype or not q.is_floating_point() or q.device != k.device:
        raise MethodError(
            f"q and k must share a floating dtype and a device; got {q.dtype} on {q.device}, {k.dtype} on {k.device}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise MethodError(f"the {q.shape[1]} query heads must be a multiple of the {k.shape[1]} key heads")
    if causal and q.shape[2] > k.shape[2]:
        raise MethodError(
            f"causal attention aligns queries to the last keys; there are {q.shape[2]} queries but {k.shape[2]} keys"
        )
    for name, mask, length in (("key_padding", key_padding, k.shape[2]), ("query_padding", query_padding, q.shape[2])):
        if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (q.shape[0], length)):
            raise MethodError(
                f"{name} must be bool of shape {(q.shape[0], length)}; got {mask.dtype} {tuple(mask.shape)}"
            )


def _rows(
    queries: Queries, B: int, Sq: int, query_padding: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """Normalise `queries` to row numbers int64 (B, M), -1 for none, or None for every row."""
    if isinstance(queries, torch.Tensor):
        if queries.ndim != 1 or queries.is_floating_point() or queries.dtype == torch.bool:
            raise MethodError(f"a tensor of queries must be 1-D integers; got {queries.dtype} {tuple(queries.shape)}")
        index = queries.to(device=device, dtype=torch.int64)
        # Reading values would break a compiled graph in two; there, the gather itself rejects them.
        if not torch.compiler.is_compiling() and index.numel() and not bool(((index >= -Sq) & (index < Sq)).all()):
            raise MethodError(f"queries holds row numbers outside [{-Sq}, {Sq}): {queries.tolist()}")
        index = torch.where(index < 0, index + Sq, index).expand(B, -1)
    elif isinstance(queries, tuple):
        if len(queries) != 2:
            raise MethodError(f"a span of queries is (start, stop); got {queries}; give several rows as a tensor")
        start, stop = queries
        if not 0 <= start < stop <= Sq:
            raise MethodError(f"the span of queries {queries} must lie in the {Sq} query rows and hold at least one")
        index = torch.arange(start, stop, device=device).expand(B, -1)
    elif queries == "all":
        if query_padding is None:
            return None
        index = torch.arange(Sq, device=device).expand(B, -1)
    elif isinstance(queries, int) and not isinstance(queries, bool):
        if not 1 <= queries <= Sq:
            raise MethodError(f"the last {queries} of {Sq} query rows were asked for; give a number from 1 to {Sq}")
        if query_padding is None:
            return torch.arange(Sq - queries, Sq, device=device).expand(B, -1)
        # A stable sort moves the valid rows to the end and leaves them in order.
        index = query_padding.to(torch.int8).sort(dim=1, stable=True).indices[:, Sq - queries :]
    else:
        raise MethodError(f"queries={queries!r} must be 'all', an int, a (start, stop) span or a 1-D integer tensor")
    if query_padding is None:
        return index
    return index.where(query_padding.gather(1, index), index.new_tensor(-1))


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor | None,
    key_padding: torch.Tensor | None,
    causal: bool,
    heads: bool,
    scale: float,
    diagonal: bool,
) -> torch.Tensor:
    reason = no_triton(q, k)
    if reason is None and q.shape[3] > _MAX_HEAD:
        reason = f"heads of {q.shape[3]} channels are longer than {_MAX_HEAD}"
    if choose("attention_received", q.device, triton_missing=reason) == "triton":
        from mmaccel.kernels.attention_received import triton

        return triton.attention_received(q, k, rows, key_padding, causal, heads, scale, diagonal)
    return cpu.attention_received(q, k, rows, key_padding, causal, heads, scale, diagonal)


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor | None,  # noqa: ARG001
    key_padding: torch.Tensor | None,  # noqa: ARG001
    causal: bool,  # noqa: ARG001
    heads: bool,
    scale: float,  # noqa: ARG001
    diagonal: bool,  # noqa: ARG001
) -> torch.Tensor:
    shape = (q.shape[0], q.shape[1], k.shape[2]) if heads else (q.shape[0], k.shape[2])
    return q.new_empty(shape, dtype=torch.float32)


# torch.library.custom_op would import torch._dynamo at the first eager call: seconds, in the middle of a first token.
_library = torch.library.Library("mmaccel", "FRAGMENT")
_library.define(
    "attention_received(Tensor q, Tensor k, Tensor? rows, Tensor? key_padding, bool causal, bool heads, float scale,"
    " bool diagonal) -> Tensor"
)
_library.impl("attention_received", _run, "CompositeExplicitAutograd")
torch.library.register_fake("mmaccel::attention_received", _fake, lib=_library)

"""`frame_change` in blocks of tokens that stay in the cache: each frame is widened once and its norm taken once.

The reference's numbers (bit for bit, but for the order of the sums of L1), without a float32 copy of the video. Correct
on any device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["frame_change"]

# 4 MB of float32 for the frames of a block, as much again for their products: in the L3 cache, and rarely a block that
# is so small that calls outweigh work.
_BLOCK = 1 << 20


def _blocks(B: int, S: int, per_token: int) -> Iterator[tuple[slice, slice]]:
    """Cut B items of S tokens into blocks of about `_BLOCK` values: whole items, or a part of one."""
    tokens = max(1, _BLOCK // max(1, per_token))
    items = max(1, tokens // max(1, S))
    for b in range(0, B, items):
        for s in range(0, S, tokens):
            yield slice(b, b + items), slice(s, s + tokens)


def _size(x: torch.Tensor, measure: int) -> torch.Tensor:
    # the 1-norm of torch is not vectorised along the last dimension: five times as slow as this sum
    return x.abs().sum(-1) if measure == 2 else torch.linalg.vector_norm(x, dim=-1)


def _measured(now: torch.Tensor, before: torch.Tensor, norms: torch.Tensor, measure: int) -> torch.Tensor:
    """Change of `now` from `before`; `norms` is the product of both norms for a cosine, else that of `before`."""
    if measure < 2:
        cosine = (now * before).sum(-1).div_(norms.clamp_min(torch.finfo(now.dtype).tiny)).clamp_(-1, 1)
        return cosine if measure == 1 else 1 - cosine
    return _size(now - before, measure).div_(norms.clamp_min(torch.finfo(now.dtype).eps))


def frame_change(
    x: torch.Tensor,
    reference: torch.Tensor | None,
    seen: torch.Tensor | None,
    mask: torch.Tensor | None,
    measure: int,
    threshold: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change float32 (B, T, S) and the frame that is the reference at the end; same arguments as in reference.py."""
    B, T, S, _ = x.shape
    with torch.no_grad():
        change = x.new_empty((B, T, S), dtype=torch.float32)
        if threshold is not None or T == 0:
            at = torch.full((B, S), -2 if reference is None else -1, device=x.device)
            if seen is not None:
                at.masked_fill_(~seen, -2)
            if threshold is not None and T:
                _running(x, reference, mask, measure, threshold, change, at)
            return change, at
        _consecutive(x, reference, measure, change)
        never = -torch.inf if measure == 1 else torch.inf
        if reference is None:
            change[:, 0] = never
        elif seen is not None:
            change[:, 0].masked_fill_(~seen, never)
        if mask is None:
            return change, torch.full((B, S), T - 1, device=x.device)
        change[:, 1:].masked_fill_(~mask[:, :-1], never)
        change.masked_fill_(~mask, -torch.inf)
        return change, torch.where(mask[:, -1], T - 1, -2)


def _consecutive(x: torch.Tensor, reference: torch.Tensor | None, measure: int, change: torch.Tensor) -> None:
    """Fill `change` with each frame against the one before; entry 0 only if there is a reference."""
    B, T, S, D = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for b, s in _blocks(B, S, T * D):
        frames = x[b, :, s].to(wide)
        size = _size(frames, measure) if measure < 2 else _size(frames[:, :-1], measure)
        if T > 1:
            norms = size[:, 1:] * size[:, :-1] if measure < 2 else size
            change[b, 1:, s] = _measured(frames[:, 1:], frames[:, :-1], norms, measure)
        if reference is not None:
            before = reference[b, s].to(wide)
            norms = _size(before, measure)
            change[b, 0, s] = _measured(frames[:, 0], before, size[:, 0] * norms if measure < 2 else norms, measure)


def _running(
    x: torch.Tensor,
    reference: torch.Tensor | None,
    mask: torch.Tensor | None,
    measure: int,
    threshold: float,
    change: torch.Tensor,
    at: torch.Tensor,
) -> None:
    """Fill `change` and move `at` on, frame by frame within each block."""
    B, T, S, D = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for b, s in _blocks(B, S, D):
        before = torch.zeros_like(x[b, 0, s]) if reference is None else reference[b, s]
        before = before.to(wide, copy=True)
        base = _size(before, measure)
        for t in range(T):
            now = x[b, t, s].to(wide)
            size = _size(now, measure)
            moved = (
                _measured(now, before, size * base if measure < 2 else base, measure)
                .float()
                .masked_fill_(at[b, s] == -2, torch.inf)
            )
            taken = ~(moved <= threshold)
            if mask is not None:
                moved.masked_fill_(~mask[b, t, s], -torch.inf)
                taken &= mask[b, t, s]
            change[b, t, s] = moved
            at[b, s] = torch.where(taken, t, at[b, s])
            base = torch.where(taken, size, base)
            before = torch.where(taken[..., None], now, before)

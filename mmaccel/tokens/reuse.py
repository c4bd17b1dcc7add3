"""Reuse: compute some rows of a tensor, take the rest from the last time that all of them were computed."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

import torch

from mmaccel.errors import MethodError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

__all__ = ["RowCache", "reference_frames", "row_similarity", "rows_to_renew"]


def reference_frames(
    first: Sequence[bool],
    interval: int | None,
    *,
    held: int | None = None,
    like: Callable[[int, int], bool] | None = None,
) -> list[int]:
    """Say for each frame which one it reuses: itself where it is computed whole, -1 for one that was held from before.

    first: whether a frame begins a video, which ends reuse. interval: a frame is computed whole once its reference is
    this many frames old, None for never. held: how many frames ago (0: just now) the held reference was, None without
    one. like(frame, reference) says whether a frame is still like its reference; where it is not it is computed whole.
    """
    found: list[int] = []
    reference, age = (None, 0) if held is None else (-1, held)
    for frame, begins in enumerate(first):
        age += 1
        stale = reference is None or begins or (interval is not None and age >= interval)
        if stale or (like is not None and not like(frame, reference)):  # type: ignore[arg-type]
            reference, age = frame, 0
        assert reference is not None
        found.append(reference)
    return found


def row_similarity(rows: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the cosine of each row of rows (B, N, C) with the same row of reference (B or 1, N, C), float32 (B, N).

    A row of zeros is like nothing: 0.
    """
    if rows.ndim != 3 or reference.ndim != 3 or reference.shape[1:] != rows.shape[1:]:
        raise MethodError(
            f"rows and their reference must be (B, N, C), equal in N and C; got {tuple(rows.shape)} and "
            f"{tuple(reference.shape)}"
        )
    a, b = rows.float(), reference.float()
    lengths = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    cosine = torch.linalg.vecdot(a, b, dim=-1) / lengths.clamp_min(torch.finfo(torch.float32).tiny)
    return cosine.clamp(-1, 1)


def rows_to_renew(
    similarity: torch.Tensor, *, share: float | None = None, at_most: float = 1.0, unit: int = 1
) -> torch.Tensor:
    """Choose by similarity (B, N) to an earlier state which rows are computed anew, as bool (B, N).

    share: that share of the rows, those least similar, rounded down but at least one. They are compared in steps of
    2^-16, ties to the lower row, so that rows which have not changed at all do not depend on rounding noise. Without it
    all rows whose similarity is not above `at_most`, which may be none; NaN is not above anything. unit: so many
    consecutive rows are renewed together, by their mean similarity; a divisor of N.
    """
    if similarity.ndim != 2 or unit < 1 or similarity.shape[1] % unit:
        raise MethodError(f"similarity must be (B, N) with N a multiple of {unit}; got {tuple(similarity.shape)}")
    score = similarity.unflatten(1, (-1, unit)).mean(2) if unit > 1 else similarity
    if share is None:
        chosen = ~(score > at_most)
    else:
        if not 0 < share <= 1:
            raise MethodError(f"share={share} of the rows must be in (0, 1]")
        # the share as it is written: the product of floats 0.29 * 100 is below 29
        count = max(1, int(Decimal(repr(float(share))) * score.shape[1]))
        lowest = torch.round(score * 65536).nan_to_num(-torch.inf).sort(dim=1, stable=True).indices[:, :count]
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(1, lowest, True)
    return chosen.repeat_interleave(unit, 1) if unit > 1 else chosen


class RowCache:
    """A cache of tensors by key, such as (layer, "key"), whose token rows can be renewed one by one.

    `store` takes every row, `update` some of them, `full` gives all. Tokens lie along dimension `dim`, items along
    dimension 0. The cache owns its memory and writes into it: what `full` and `update` return is valid until the next
    write to the same key, and must not be changed by the caller.
    """

    def __init__(self, dim: int = 1) -> None:
        if dim < 1:
            raise MethodError(f"dim={dim}: the tokens must lie behind the batch, in dimension 1 or later")
        self.dim = dim
        self._entries: dict[Hashable, torch.Tensor] = {}

    def store(self, key: Hashable, values: torch.Tensor) -> torch.Tensor:
        """Take all rows of an entry, new or not, of any shape with tokens along `dim`; return the entry."""
        if values.ndim <= self.dim:
            raise MethodError(
                f"the rows of {key!r} must have tokens in dimension {self.dim}; got {tuple(values.shape)}"
            )
        entry = self._entries.get(key)
        if entry is None or (entry.shape, entry.dtype, entry.device) != (values.shape, values.dtype, values.device):
            entry = self._entries[key] = torch.empty_like(values.detach(), memory_format=torch.contiguous_format)
        return entry.copy_(values.detach())

    def update(self, key: Hashable, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Renew some rows of an entry and return all of it.

        rows: int64 (B, m), distinct within an item, or (m,) for the same rows in every item; values: the entry's shape
        with m instead of N along `dim`. Raises MethodError when nothing was stored or the shapes do not fit.
        """
        entry = self.full(key)
        rows = rows.expand(entry.shape[0], -1) if rows.ndim == 1 else rows
        shape = list(entry.shape)
        if rows.ndim != 2 or rows.dtype != torch.int64 or rows.shape[0] != shape[0]:
            raise MethodError(
                f"rows of {key!r} must be int64 ({shape[0]}, m) or (m,); got {rows.dtype} {tuple(rows.shape)}"
            )
        n, shape[self.dim] = shape[self.dim], rows.shape[1]
        if list(values.shape) != shape or values.dtype != entry.dtype or values.device != entry.device:
            raise MethodError(
                f"the new rows of {key!r} must be {entry.dtype} {tuple(shape)} on {entry.device}; "
                f"got {values.dtype} {tuple(values.shape)} on {values.device}"
            )
        # On a GPU the scatter itself stops at a bad row; reading the rows here would make the host wait.
        if rows.device.type == "cpu" and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < n:
            raise MethodError(f"rows of {key!r} must lie in [0, {n}); got {int(rows.min())} to {int(rows.max())}")
        spread = [1] * len(shape)
        spread[0], spread[self.dim] = rows.shape
        return entry.scatter_(self.dim, rows.reshape(spread).expand(shape), values.detach())

    def full(self, key: Hashable) -> torch.Tensor:
        """Return all rows of an entry, fresh and old."""
        if key not in self._entries:
            raise MethodError(f"nothing is cached for {key!r}; compute all rows once and store them first")
        return self._entries[key]

    def discard(self, key: Hashable) -> None:
        """Forget an entry, if there is one."""
        self._entries.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    @property
    def nbytes(self) -> int:
        """The memory held, in bytes."""
        return sum(entry.nbytes for entry in self._entries.values())

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

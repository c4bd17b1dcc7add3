"""Reuse: compute some rows of a tensor, take the rest from the last time that all of them were computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmaccel.errors import MethodError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

__all__ = ["RowCache"]


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

"""Self-attention of some rows over the keys and values of all: fresh ones where there are, the last ones elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmaccel.errors import NotApplicableError

__all__ = ["KeysValues", "RowAttention"]

_SDPA = torch.nn.functional.scaled_dot_product_attention


class KeysValues:
    """Keys and values [B, heads, N, d] of one attention, stored in `dtype` (None: as they are) on `device`."""

    def __init__(self, dtype: torch.dtype | None = None, device: str | None = None) -> None:
        self.dtype, self.device = dtype, device
        self._stored: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def nbytes(self) -> int:
        """The memory held, in bytes."""
        return sum(part.nbytes for part in self._stored)

    def store(self, *parts: Tensor) -> None:
        """Take keys and values over; they are copied only where dtype or device ask for it, or a gradient is wanted."""
        self._stored = [
            _fitting(part.detach().clone() if part.requires_grad else part, self.dtype or part.dtype).to(
                self.device or part.device
            )
            for part in parts
        ]

    def update(self, rows: Tensor, *parts: Tensor) -> list[Tensor]:
        """Write fresh keys and values [B, heads, m, d] at `rows` int64 [B or 1, m]; returns all, in their dtype."""
        whole = []
        for stored, fresh in zip(self._stored, parts, strict=True):
            # 8-bit floats have no indexed writes of their own
            bits = torch.uint8 if stored.element_size() == 1 else stored.dtype
            _put(stored.view(bits), rows.to(stored.device), _fitting(fresh, stored.dtype).to(stored.device).view(bits))
            part = stored.to(device=fresh.device, dtype=fresh.dtype)
            if stored.dtype != fresh.dtype:
                # what was just computed is used as it is, not as it is stored
                part.scatter_(2, rows[:, None, :, None].expand(fresh.shape), fresh)
            whole.append(part)
        return whole


def _put(stored: Tensor, rows: Tensor, fresh: Tensor) -> None:
    """Write `fresh` [B, heads, m, d] at rows [B or 1, m] of `stored` [B, heads, N, d], in place."""
    by_token = stored.transpose(1, 2)
    if not by_token.is_contiguous():
        stored.scatter_(2, rows[:, None, :, None].expand(fresh.shape), fresh)
        return
    # as models make them: all heads of a token lie side by side, and rows are copied whole
    batch, tokens = by_token.shape[:2]
    places = (rows + torch.arange(batch, device=rows.device)[:, None] * tokens).flatten()
    by_token.view(batch * tokens, -1).index_copy_(0, places, fresh.transpose(1, 2).reshape(len(places), -1))


def _fitting(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in another dtype; 8-bit floats have no infinity, and what is too large for them would become NaN."""
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        values = values.clamp(-limit, limit)
    return values.to(dtype)


class RowAttention(TorchFunctionMode):
    """Within this block `scaled_dot_product_attention` sees the keys and values of all N tokens.

    rows: int64 [B or 1, m], the tokens that are computed, None for all (their keys and values are then stored).
    tokens: N. text: where keys of the prompt stand, which are always fresh.
    """

    def __init__(self, kept: KeysValues | None, rows: Tensor | None, tokens: int, text: str) -> None:
        super().__init__()
        self.kept, self.rows, self.tokens, self.text = kept, rows, tokens, text
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass every function on, and this one with other keys and values."""
        kwargs = kwargs or {}
        if func is not _SDPA or self.kept is None:
            return func(*args, **kwargs)
        self.calls += 1
        names = ("query", "key", "value")
        given = {**dict(zip(names, args, strict=False)), **{n: kwargs[n] for n in names if n in kwargs}}
        rest = {name: value for name, value in kwargs.items() if name not in names}
        keys, values = self._keys(given["key"], given["value"])
        return func(given["query"], keys, values, *args[3:], **rest)

    def _keys(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        present = self.tokens if self.rows is None else self.rows.shape[1]
        extra = key.shape[2] - present
        begin = extra if self.text == "first" else 0
        own = slice(begin, begin + present)
        assert self.kept is not None
        if self.rows is None:
            self.kept.store(key[:, :, own], value[:, :, own])
            return key, value
        whole = self.kept.update(self.rows, key[:, :, own], value[:, :, own])
        if not extra:
            return whole[0], whole[1]
        order = [
            torch.cat([part[:, :, :extra], all_rows] if begin else [all_rows, part[:, :, present:]], dim=2)
            for part, all_rows in zip((key, value), whole, strict=True)
        ]
        return order[0], order[1]

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        if exc[0] is None and self.kept is not None and self.calls != 1:
            raise NotApplicableError(
                f"this self-attention called scaled_dot_product_attention {self.calls} times, and 1 call was expected; "
                "set the attention backend to 'native' and use the model's default attention processors."
            )

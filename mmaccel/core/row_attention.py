"""Self-attention of some rows over the keys and values of all: fresh ones where there are, the last ones elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmaccel.errors import NotApplicableError

__all__ = ["KeysValues", "RowAttention", "joint_rows", "rotated"]

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


def joint_rows(rows: Tensor, tokens: int, extra: int, text: str) -> Tensor:
    """Rows int64 [B or 1, m] of `tokens` tokens as rows of these and `extra` of the prompt, all of which are taken.

    text: where these stand, "first" or "last".
    """
    prompt = torch.arange(extra, device=rows.device).expand(rows.shape[0], extra)
    return torch.cat([prompt, rows + extra] if text == "first" else [rows, prompt + tokens], 1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x [B, heads, S, d] by tables [B, S, d], computed in float32 (RoFormer, 2021)."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    return (x.float() * cos[:, None].float() + turned * sin[:, None].float()).to(x.dtype)


class RowAttention(TorchFunctionMode):
    """Within this block `scaled_dot_product_attention` sees the keys and values of all N tokens.

    kept: None leaves the keys and values as they are. rows: int64 [B or 1, m], the tokens that are computed, None for
    all (their keys and values are then stored). tokens: N. text: where keys of the prompt stand, which are always
    fresh. A mask is cut to the queries and keys that there are. tables: (cos, sin) [B, S, d] that queries and keys
    have still to be turned by, all S of them or those of the latent; for models whose tables have no batch axis.
    sizes: float32 [B, m], how many tokens each of the rows stands for; as keys they count as often.
    """

    def __init__(
        self, kept: KeysValues | None, rows: Tensor | None, tokens: int, text: str,
        tables: tuple[Tensor, Tensor] | None = None, sizes: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kept, self.rows, self.tokens, self.text = kept, rows, tokens, text
        self.tables, self.sizes = tables, sizes
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass every function on, and this one with other keys and values."""
        kwargs = kwargs or {}
        if func is not _SDPA:
            return func(*args, **kwargs)
        self.calls += 1
        names = ("query", "key", "value", "attn_mask")
        given = {**dict(zip(names, args, strict=False)), **{n: kwargs[n] for n in names if n in kwargs}}
        rest = {name: value for name, value in kwargs.items() if name not in names}
        query, key, value = self._rotated(given["query"]), self._rotated(given["key"]), given["value"]
        extra = key.shape[2] - (self.tokens if self.rows is None else self.rows.shape[1])
        if self.kept is not None:
            key, value = self._keys(key, value, extra)
        mask = self._mask(given.get("attn_mask"), query.shape[2], key.shape[2], extra)
        if self.sizes is not None:
            mask = self._counted(mask, extra, query.dtype)
        return func(query, key, value, mask, *args[4:], **rest)

    def _mask(self, mask: Tensor | None, queries: int, keys: int, extra: int) -> Tensor | None:
        """A mask that broadcasts to [B, heads, N + extra, N + extra], for the queries and keys that there are."""
        if mask is None or self.rows is None:
            return mask
        places = joint_rows(self.rows, self.tokens, extra, self.text)[:, None]
        while mask.ndim < 4:
            mask = mask[None]
        for axis, length in ((2, queries), (3, keys)):
            if mask.shape[axis] not in (1, length):
                shape = [max(mask.shape[0], len(places)), *mask.shape[1:]]
                mask = mask.expand(shape)
                shape[axis] = length
                index = (places[..., None] if axis == 2 else places[:, :, None]).expand(shape)
                mask = mask.gather(axis, index.to(mask.device))
        return mask

    def _counted(self, mask: Tensor | None, extra: int, dtype: torch.dtype) -> Tensor:
        """The mask with log(size) added for each key."""
        assert self.sizes is not None
        pad = (extra, 0) if self.text == "first" else (0, extra)
        bias = torch.nn.functional.pad(self.sizes.log(), pad)[:, None, None].to(dtype)
        if mask is None:
            return bias
        return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask + bias

    def _rotated(self, x: Tensor) -> Tensor:
        if self.tables is None:
            return x
        count = self.tables[0].shape[1]
        begin = x.shape[2] - count if self.text == "first" else 0
        parts = x[:, :, :begin], rotated(x[:, :, begin : begin + count], *self.tables), x[:, :, begin + count :]
        return torch.cat(parts, dim=2)

    def _keys(self, key: Tensor, value: Tensor, extra: int) -> tuple[Tensor, Tensor]:
        present = key.shape[2] - extra
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
        needed = any(part is not None for part in (self.kept, self.tables, self.sizes))
        if exc[0] is None and self.calls != 1 and needed:
            raise NotApplicableError(
                f"this self-attention called scaled_dot_product_attention {self.calls} times, and 1 call was expected; "
                "set the attention backend to 'native' and use the model's default attention processors."
            )

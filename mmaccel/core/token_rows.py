"""A diffusion transformer computes some of its tokens: rows are taken in front of its blocks and put back behind."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmaccel.core.patching import Patcher
from mmaccel.core.row_attention import KeysValues, RowAttention
from mmaccel.errors import NotApplicableError

__all__ = ["TokenRows", "latent_tokens", "put_rows", "take_rows", "take_tables", "token_grid", "token_mask"]


def latent_tokens(latents: Tensor, patch: tuple[int, ...], frames_first: bool = False) -> Tensor:
    """Latents [B, C, (T,) H, W] as tokens [B, N, C * patch]; [B, N, C] is that already (`patch` is () then).

    frames_first: a 5-D latent is [B, T, C, H, W].
    """
    if not patch:
        return latents
    if frames_first:
        latents = latents.transpose(1, 2)
    for axis, size in enumerate(patch):
        latents = latents.unflatten(2 + 2 * axis, (-1, size))
    grid = [2 + 2 * axis for axis in range(len(patch))]
    inside = [3 + 2 * axis for axis in range(len(patch))]
    return latents.permute(0, *grid, 1, *inside).flatten(1 + len(patch)).flatten(1, len(patch))


def token_grid(latents: Tensor, patch: tuple[int, ...], frames_first: bool = False) -> tuple[int, ...]:
    """Tokens along each axis of latents of the shapes that `latent_tokens` takes; (N,) for [B, N, C]."""
    if not patch:
        return (latents.shape[1],)
    lengths = list(latents.shape[-len(patch) :])
    if frames_first:
        lengths[0] = latents.shape[1]
    return tuple(length // size for length, size in zip(lengths, patch, strict=True))


def token_mask(chosen: Tensor, latents: Tensor, patch: tuple[int, ...], frames_first: bool = False) -> Tensor:
    """`chosen` bool [B, N] as a mask that broadcasts to `latents` of the shapes that `latent_tokens` takes."""
    if not patch:
        return chosen[..., None]
    mask = chosen.unflatten(1, token_grid(latents, patch, frames_first))
    for axis, size in enumerate(patch):
        mask = mask.repeat_interleave(size, dim=1 + axis)
    return mask.unsqueeze(2 if frames_first else 1)


class TokenRows:
    """Hooks on the blocks of one transformer. `rows` and `kept` say what the call in progress computes and keeps.

    rows: int64 [B or 1, m] of the tokens to compute, None for all. kept: keys and values by attention; an attention
    without an entry is left alone when all rows are computed, and sees the chosen rows only when some are.
    layout: see `adapters.diffusion.Layout`.
    """

    def __init__(self, layout: Any) -> None:
        self.layout = layout
        self.rows: Tensor | None = None
        self.tokens = 0
        self.kept: dict[str, KeysValues] = {}
        self._tables: dict[int, tuple[Any, Any]] = {}  # by the id of tables that are held along with what was taken
        self._inside: tuple[Tensor, Tensor] | None = None

    def install(self, patcher: Patcher, blocks: dict[str, Any]) -> None:
        """Put the hooks on `blocks`, in the order in which they run."""
        names = list(blocks)
        for name, block in blocks.items():
            patcher.before(block, self._before(block, first=name == names[0]))
            if name == names[-1]:
                patcher.after(block, self._scatter)
            for attribute in self.layout.keeping:
                attention = getattr(block, attribute, None)
                if attention is not None:
                    patcher.wrap(attention, "forward", self._attend(f"{name}.{attribute}"))

    def __enter__(self) -> TokenRows:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.rows, self.kept, self._tables, self._inside = None, {}, {}, None

    def _before(self, block: Any, *, first: bool) -> Any:
        signature = inspect.signature(type(block).forward)

        def gather(_block: Any, args: Any, kwargs: Any) -> Any:
            if self.rows is None:
                return None
            bound = signature.bind(block, *args, **kwargs)
            given = bound.arguments
            for name in self.layout.apart:
                if given.get(name) is not None:
                    raise NotApplicableError(
                        f"the blocks of this call treat some tokens unlike others ({name}), which cannot be done for "
                        "a part of them; remove the method for such calls."
                    )
            if first:
                given["hidden_states"] = take_rows(given["hidden_states"], self.rows, 1)
            for name in self.layout.rotary:
                if given.get(name) is not None:
                    given[name] = self._rotary(given[name])
            for name in self.layout.times:
                times = given.get(name)
                if times is not None and times.shape[1] == self.tokens and times.ndim > 2:
                    given[name] = take_rows(times, self.rows, 1)
            return bound.args[1:], bound.kwargs

        return gather

    def _rotary(self, tables: Any) -> Any:
        """The rows of a pair of tables; None where the attention must apply them, see `RowAttention`."""
        if id(tables) not in self._tables:
            assert self.rows is not None
            taken: Any = take_tables(tables, self.rows, self.tokens, self.layout)
            if not self.layout.rotary_dim:
                alike = self.rows.shape[0] == 1
                self._inside = None if alike else taken
                taken = tuple(table[0] for table in taken) if alike else None
            self._tables[id(tables)] = tables, taken
        return self._tables[id(tables)][1]

    def _scatter(self, _block: Any, _args: Any, _kwargs: Any, output: Any) -> Any:
        if self.rows is None:
            return None
        place = self.layout.output
        states = output if place is None else output[place]
        whole = states.new_zeros(states.shape[0], self.tokens, states.shape[2])
        whole.scatter_(1, self.rows[..., None].expand(states.shape), states)
        if place is None:
            return whole
        return (*output[:place], whole, *output[place + 1 :])

    def _attend(self, name: str) -> Callable[..., Any]:
        def around(call: Any, *args: Any, **kwargs: Any) -> Any:
            kept = self.kept.get(name)
            skipped = bool(kwargs.get(self.layout.skipped))
            if skipped or (kept is None and self.rows is None):
                return call(*args, **kwargs)
            with RowAttention(kept, self.rows, self.tokens, self.layout.text, self._inside):
                return call(*args, **kwargs)

        return around


def take_tables(tables: Any, rows: Tensor, tokens: int, layout: Any) -> tuple[Tensor, Tensor]:
    """Rows int64 [B or 1, m] of rotary tables of `tokens` tokens: [B or 1, (text +) m, ...] each.

    tables: as the family has them, [B or 1, N, ...] or, without a batch axis, [(text +) N, d]; rows of the prompt stay.
    """
    cos, sin = tables
    if layout.rotary_dim:
        return take_rows(cos, rows, layout.rotary_dim), take_rows(sin, rows, layout.rotary_dim)
    head = cos.shape[0] - tokens if layout.rotary_text else 0
    rows = torch.cat([torch.arange(head, device=rows.device).expand(rows.shape[0], head), rows + head], 1)
    return cos[rows], sin[rows]


def take_rows(values: Tensor, rows: Tensor, axis: int) -> Tensor:
    """Rows int64 [B or 1, m] of `values` [B or 1, ..., N, ...] along `axis`."""
    batch = max(values.shape[0], rows.shape[0])
    if axis == 1 and values.ndim == 3:
        # whole rows are copied many times faster than the same numbers one by one
        flat = values.expand(batch, -1, -1).reshape(-1, values.shape[2])
        return flat.index_select(0, _flat(rows, batch, values.shape[1])).unflatten(0, (batch, rows.shape[1]))
    shape = [max(values.shape[0], rows.shape[0]), *values.shape[1:]]
    values = values.expand(shape)
    shape[axis] = rows.shape[1]
    index = rows.view(rows.shape[0], *[1] * (axis - 1), rows.shape[1], *[1] * (values.ndim - axis - 1))
    return values.gather(axis, index.expand(shape))


def put_rows(values: Tensor, rows: Tensor, fresh: Tensor) -> Tensor:
    """A copy of `values` [B, N, D] with `fresh` [B, m, D] at rows int64 [B or 1, m]."""
    flat = values.reshape(-1, values.shape[2])
    places = _flat(rows, values.shape[0], values.shape[1])
    return flat.index_copy(0, places, fresh.reshape(-1, fresh.shape[2])).view(values.shape)


def _flat(rows: Tensor, batch: int, tokens: int) -> Tensor:
    """Rows [B or 1, m] of `batch` items of `tokens` as rows of one long item."""
    return (rows + torch.arange(batch, device=rows.device)[:, None] * tokens).flatten()

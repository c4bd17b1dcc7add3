"""A prefill that goes on at its end and loses tokens in its middle, so that it can follow a stream without end."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from mmaccel.core.cache import cache_keyword
from mmaccel.core.rotation import turn, turn_angles

__all__ = ["Block", "RollingPrefill"]

_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Block:
    """Tokens that come together, such as those of one frame and its time stamp.

    embeds: [n, D], what goes into the language model; None once it is there and nothing will be computed anew.
    offset: int64 [axes, n], positions counted from where the block begins. advance: by how much the next block begins
    later. visual: bool [n]. salience: float32 [n], 0 for text. deep: for each deep-stack level features [visual, D].
    gap: None for a block that begins behind the one before it. Otherwise all blocks with a gap begin where the first
    of them did, and this one is `gap` steps of the first axis later than the one before it; their sum is rounded down.
    compact: whether what is left of it closes up when tokens are taken out.
    """

    embeds: torch.Tensor | None
    offset: torch.Tensor
    advance: int
    visual: torch.Tensor
    salience: torch.Tensor
    deep: tuple[torch.Tensor, ...] = ()
    gap: float | None = None
    compact: bool = True

    def __len__(self) -> int:
        return self.offset.shape[1]

    @functools.cached_property
    def tokens(self) -> int:
        """Number of visual tokens."""
        return int(self.visual.sum())

    def take(self, keep: torch.Tensor) -> Block:
        """Only the tokens `keep`, bool [n]. With one axis they close up; with several each keeps its place."""
        offset, advance = self.offset[:, keep], self.advance
        if self.compact and len(offset) == 1:
            offset, advance = torch.arange(offset.shape[1], device=offset.device)[None], offset.shape[1]
        return replace(
            self,
            embeds=None if self.embeds is None else self.embeds[keep],
            offset=offset,
            advance=advance,
            visual=self.visual[keep],
            salience=self.salience[keep],
            deep=tuple(level[keep[self.visual]] for level in self.deep),
        )


@dataclass
class _Cursor:
    """Where the next block begins."""

    next: int = 0
    anchor: int | None = None
    time: float = 0.0

    @property
    def step(self) -> int:
        """How much later than the anchor the last block with a gap began."""
        # a time such as 3 * (1 / 3) must not fall below its step by rounding
        return math.floor(self.time + 1e-6)

    def place(self, block: Block) -> torch.Tensor:
        """int64 [axes, n]: the positions of the block, which is the next one."""
        if block.gap is None:
            begin, self.next = self.next, self.next + block.advance
            return block.offset + begin
        if self.anchor is None:
            self.anchor, self.time = self.next, 0.0
        else:
            self.time += block.gap
        self.next = max(self.next, self.anchor + block.advance)
        position = block.offset + self.anchor
        position[0] += self.step
        return position


class RollingPrefill:
    """The keys and values of blocks of tokens, at positions without holes. One sequence.

    rebuild: keep the inputs of all blocks, and compute everything anew when some are taken out; otherwise keys and
    values stay as they are, and keys are turned to their new positions (`rotation.check_rotary` says whether they can
    be). That is exact in the first layer; the hidden states of later layers have seen what is gone.
    """

    def __init__(self, language_model: nn.Module, axes: int, *, rebuild: bool) -> None:
        self._model, self._axes, self._rebuild = language_model, axes, rebuild
        self._config: Any = language_model.config
        self._keyword = cache_keyword(language_model)
        self.blocks: list[Block] = []
        self._cursor = _Cursor()
        self._positions = torch.zeros(axes, 0, dtype=torch.int64)
        self.cache = self._empty()

    def _empty(self) -> Any:
        return DynamicCache(config=self._config)

    @property
    def next(self) -> int:
        """The position of the next token of text."""
        return self._cursor.next

    @property
    def end(self) -> int:
        """One more than the largest position."""
        cursor = self._cursor
        return cursor.next if cursor.anchor is None else max(cursor.next, cursor.anchor + cursor.step + 1)

    @property
    def tokens(self) -> int:
        """Number of visual tokens that are held."""
        return sum(block.tokens for block in self.blocks)

    @property
    def positions(self) -> torch.Tensor:
        """int64 [axes, n]: the positions of all tokens that are held."""
        return self._positions

    def nbytes(self) -> int:
        """Bytes of keys, values and kept inputs."""
        tensors = [t for layer in self.cache.layers if layer.is_initialized for t in (layer.keys, layer.values)]
        tensors += [t for block in self.blocks for t in (block.embeds, *block.deep) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    @torch.no_grad()
    def extend(self, blocks: Sequence[Block]) -> torch.Tensor:
        """Run the language model over new blocks; what it says of each of their tokens, [1, n, D]."""
        position = torch.cat([self._cursor.place(block) for block in blocks], 1)
        hidden = self._compute(blocks, position)
        self._positions = torch.cat([self._positions.to(position.device), position], 1)
        bare = blocks if self._rebuild else [replace(block, embeds=None, deep=()) for block in blocks]
        self.blocks = [*self.blocks, *bare]
        return hidden

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What comes in this block is forgotten at its end."""
        saved = self._save()
        try:
            yield
        finally:
            self._restore(saved)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What happens in this block happens as a whole, or not at all if something raises."""
        saved = self._save()
        try:
            yield
        except BaseException:
            self._restore(saved)
            raise

    @torch.no_grad()
    def keep(self, keeps: Sequence[torch.Tensor | None]) -> None:
        """Take tokens out: for each block bool [n] says what stays, None keeps all of it. The rest closes up.

        A block of which no visual token stays goes as a whole, and so does its text.
        """
        blocks, taken = [], []
        for block, keep in zip(self.blocks, keeps, strict=True):
            if keep is None:
                blocks.append(block)
                taken.append(torch.ones_like(block.visual))
            elif bool(keep[block.visual].any()):
                blocks.append(block.take(keep))
                taken.append(keep)
            else:
                taken.append(torch.zeros_like(block.visual))
        cursor = _Cursor()
        placed = [cursor.place(block) for block in blocks]
        position = torch.cat(placed, 1) if placed else self._positions[:, :0]
        index = torch.cat(taken).nonzero().squeeze(1)
        if self._rebuild:
            self.cache = self._empty()
            if blocks:
                self._compute(blocks, position)
        else:
            self._move(index, position - self._positions[:, index])
        self.blocks, self._cursor, self._positions = blocks, cursor, position

    def _move(self, index: torch.Tensor, shift: torch.Tensor) -> None:
        turns = turn_angles(self._model.rotary_emb, shift) if bool(shift.any()) else None
        for layer in self.cache.layers:
            at = index.to(layer.keys.device)
            keys = layer.keys.index_select(-2, at)
            if turns is not None:
                keys = turn(keys, *(part.to(keys.device) for part in turns))
            layer.keys, layer.values = keys, layer.values.index_select(-2, at)

    def _compute(self, blocks: Sequence[Block], position: torch.Tensor) -> torch.Tensor:
        embeds = torch.cat([block.embeds for block in blocks if block.embeds is not None])[None]
        visual = torch.cat([block.visual for block in blocks])
        levels = next((len(block.deep) for block in blocks if block.deep), 0)
        deep = [torch.cat([block.deep[i] for block in blocks if block.deep]) for i in range(levels)]
        found, shown = [], 0
        for start in range(0, embeds.shape[1], _CHUNK):
            span = slice(start, start + _CHUNK)
            part = visual[span]
            count = int(part.sum())
            more: dict[str, Any] = {}
            if levels and count:
                more["visual_pos_masks"] = part[None]
                more["deepstack_visual_embeds"] = [level[shown : shown + count] for level in deep]
            shown += count
            found.append(self._forward(embeds[:, span], position[:, span], more))
        return torch.cat(found, 1)

    def _forward(self, embeds: torch.Tensor, position: torch.Tensor, more: dict[str, Any]) -> torch.Tensor:
        held = self.cache.get_seq_length()
        # an explicit mask: without one, transformers takes holes in the positions for the seams of packed sequences
        mask = torch.ones(1, held + embeds.shape[1], dtype=torch.int64, device=embeds.device)
        ids = position if self._axes == 1 else position[:, None]
        more[self._keyword] = self.cache
        out = self._model(inputs_embeds=embeds, position_ids=ids, attention_mask=mask, use_cache=True, **more)
        return out.last_hidden_state

    def _save(self) -> tuple[Any, ...]:
        # the library's layers grow by making new tensors, so those that are there now can be put back
        layers = [(layer.keys, layer.values) for layer in self.cache.layers if layer.is_initialized]
        return self.cache, layers, self.blocks, replace(self._cursor), self._positions

    def _restore(self, saved: tuple[Any, ...]) -> None:
        self.cache, layers, self.blocks, self._cursor, self._positions = saved
        if not layers:
            self.cache = self._empty()
        for layer, (keys, values) in zip(self.cache.layers, layers, strict=False):
            layer.keys, layer.values = keys, values

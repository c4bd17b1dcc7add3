"""A budget of visual tokens, and which of them go when it is full."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch

from mmaccel.core.rolling import Block, RollingPrefill
from mmaccel.errors import MethodError, StreamError
from mmaccel.session.settings import is_number, is_whole
from mmaccel.tokens import evict as evicting

__all__ = ["Budget", "Evict"]

Evict = Literal["oldest", "least-salient"]


class Budget:
    """`max_tokens` visual tokens at most, None for no limit; see `mmaccel.stream`.

    Raises:
        MethodError: a setting is out of range.
    """

    def __init__(self, max_tokens: Any, evict: Any, slack: Any) -> None:
        if max_tokens is not None and not (is_whole(max_tokens) and max_tokens >= 1):
            raise MethodError(f"max_tokens must be a whole number of visual tokens or None, not {max_tokens!r}.")
        if evict not in get_args(Evict):
            raise MethodError(f"evict must be one of {', '.join(get_args(Evict))}, not {evict!r}.")
        if not is_number(slack) or not 0 <= slack < 1:
            raise MethodError(f"slack must be a fraction in [0, 1), not {slack!r}.")
        self._most, self._slack = None if max_tokens is None else int(max_tokens), float(slack)
        self._weighs = evict == "least-salient" and max_tokens is not None
        self._mean: torch.Tensor | None = None
        self._count = 0
        self.evicted = self.evictions = 0

    @property
    def limited(self) -> bool:
        """Whether tokens will ever go."""
        return self._most is not None

    def weigh(self, block: Block) -> Block:
        """The block with the salience of its tokens against all that have come, its own among them."""
        if not self._weighs or block.embeds is None:
            return block
        x = block.embeds[block.visual].float()
        self._count += len(x)
        mean = x.new_zeros(x.shape[1]) if self._mean is None else self._mean
        self._mean = mean + (x - mean).sum(0) / self._count
        salience = block.salience.clone()
        salience[block.visual] = evicting.unlike_mean(x, self._mean)
        return replace(block, salience=salience)

    def make_room(self, held: RollingPrefill, new: int, head: int) -> None:
        """Evict from `held` until `new` more visual tokens fit; the first `head` blocks are not of the stream.

        Raises:
            StreamError: they never will.
        """
        if self._most is None:
            return
        if new > self._most:
            raise StreamError(
                f"max_tokens={self._most} is less than the {new} visual tokens that come at once; give at least {new}."
            )
        blocks = held.blocks
        sizes = [block.tokens for block in blocks]
        before = sum(sizes)
        surplus = evicting.excess(before, new, self._most, self._slack)
        if not surplus:
            return
        shown = [number for number, size in enumerate(sizes) if size]
        keeps: list[torch.Tensor | None] = [None] * len(blocks)
        if self._weighs:
            scores = torch.cat([blocks[number].salience[blocks[number].visual] for number in shown])
            parts = evicting.least(scores, surplus).split([sizes[number] for number in shown])
            for number, part in zip(shown, parts, strict=True):
                if not bool(part.all()):
                    keeps[number] = torch.ones_like(blocks[number].visual).masked_scatter(blocks[number].visual, part)
        else:
            for number in shown[: evicting.oldest([sizes[number] for number in shown], surplus)]:
                keeps[number] = torch.zeros_like(blocks[number].visual)
        # what methods have left nothing of but its text goes with the frames around it
        staying = (n for n in shown if keeps[n] is None or bool(keeps[n][blocks[n].visual].any()))  # type: ignore[index]
        for number in range(head, next(staying, len(blocks))):
            keeps[number] = torch.zeros_like(blocks[number].visual)
        held.keep(keeps)
        self.evicted += before - held.tokens
        self.evictions += 1

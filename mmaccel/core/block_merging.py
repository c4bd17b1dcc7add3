"""Tokens merge in front of modules of a diffusion transformer's blocks, and get their own places back behind them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmaccel.core.patching import Patcher
from mmaccel.core.row_attention import RowAttention
from mmaccel.core.token_rows import take_tables
from mmaccel.kernels.dispatch import recording
from mmaccel.report import Report
from mmaccel.tokens.reduce import Merge

__all__ = ["BlockMerging"]


class BlockMerging:
    """Hooks on the blocks of one transformer.

    site: the adapter. match: (tokens [B, N, C] as they come into a block, their grid) -> how they merge, None if none
    do. every: blocks from one match to the next. first: number of the first block that merges. feed_forward: whether
    tokens merge in front of feed-forward modules too; an MLP that runs beside attention (single-stream blocks) sees all
    tokens. proportional: merged tokens count in attention as often as they hold tokens.

    A token that others went into keeps its rotary position. The prompt's tokens do not merge.
    """

    def __init__(
        self, site: Any, transformer: Any, report: Report, name: str, match: Callable[..., Merge | None],
        *, every: int = 1, first: int = 0, feed_forward: bool = False, proportional: bool = False,
    ) -> None:  # fmt: skip
        self.site, self.transformer, self.layout = site, transformer, site.layout
        self.report, self.name, self.match = report, name, match
        self.every, self.first = every, first
        self.feed_forward, self.proportional = feed_forward, proportional
        self._grid: tuple[int, ...] = ()
        self._tokens = 0
        self._last: Merge | None = None
        self._merge: Merge | None = None
        self._age = 0

    def install(self, patcher: Patcher) -> None:
        """Put the hooks on."""
        blocks = list(self.site.blocks(self.transformer).values())
        for block in blocks[self.first :]:
            patcher.before(block, self._before(block))
            patcher.after(block, self._after, always=True)
            for attribute in self.layout.attention:
                attention = getattr(block, attribute, None)
                if attention is not None:
                    patcher.wrap(attention, "forward", self._attend)
            for attribute in self.layout.feed_forward if self.feed_forward else ():
                module = getattr(block, attribute, None)
                if module is not None:
                    patcher.wrap(module, "forward", self._pass)
        patcher.wrap(self.transformer, "forward", self._around)

    def _around(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        given = self.site.arguments(self.transformer, args, kwargs)
        self._grid = self.site.grid(self.transformer, given)
        self._tokens = math.prod(self._grid)
        self._last, self._age = None, 0
        with recording() as events:
            try:
                return call(*args, **kwargs)
            finally:
                self._grid, self._last, self._merge = (), None, None
                for event in events:
                    self.report.kernel(event.op, event.backend, event.reason)

    def _before(self, block: Any) -> Callable[..., Any]:
        signature = inspect.signature(type(block).forward)

        @torch.no_grad()
        def match(_block: Any, args: Any, kwargs: Any) -> None:
            given = signature.bind(block, *args, **kwargs).arguments
            if not self._grid:
                return
            for name in self.layout.apart:
                if given.get(name) is not None:
                    self.report.note(
                        f"{self.name}: blocks treat some tokens unlike others ({name}); nothing merged there"
                    )
                    return
            if self._last is None or self._age >= self.every:
                self._last, self._age = self.match(given["hidden_states"].detach(), self._grid), 0
            self._age += 1
            self._merge = self._last

        return match

    def _after(self, *_: Any) -> None:
        self._merge = None

    def _attend(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        merge = self._merge
        if merge is None or kwargs.get(self.layout.skipped):
            return call(*args, **kwargs)
        x, args, kwargs = _first(args, kwargs)
        text = x.shape[1] - self._tokens
        inside = None

        def rows(pair: Any) -> Any:
            nonlocal inside
            taken = take_tables(pair, merge.kept, self._tokens, self.layout)
            if self.layout.rotary_dim:
                return taken
            inside = taken  # without a batch axis the model could not apply them
            return None

        args = tuple(rows(value) if _is_pair(value) else value for value in args)
        kwargs = {name: rows(value) if _is_pair(value) else value for name, value in kwargs.items()}
        sizes = merge.sizes if self.proportional else None
        with RowAttention(None, merge.kept, self._tokens, self.layout.text, inside, sizes):
            output = call(self._merged(x, text), *args, **kwargs)
        (B, K), C = merge.kept.shape, x.shape[2]
        self.report.count(self.name, "self-attention", B * self._tokens, B * K)
        spent, dense = (8 * n * C**2 + 4 * n**2 * C for n in (K + text, self._tokens + text))
        self.report.compute("self-attention", B * spent, B * dense)
        if isinstance(output, tuple):
            return (self._unmerged(output[0], text), *output[1:])
        return self._unmerged(output, text)

    def _pass(self, call: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._merge is None or x.shape[1] < self._tokens:
            return call(x, *args, **kwargs)
        text = x.shape[1] - self._tokens
        return self._unmerged(call(self._merged(x, text), *args, **kwargs), text)

    def _merged(self, x: Tensor, text: int) -> Tensor:
        """Merge the latent's tokens of x [B, N + text, C]."""
        assert self._merge is not None
        if not text:
            return self._merge.merge(x)
        first = self.layout.text == "first"
        prompt, own = (x[:, :text], x[:, text:]) if first else (x[:, -text:], x[:, :-text])
        merged = self._merge.merge(own)
        return torch.cat([prompt, merged] if first else [merged, prompt], 1)

    def _unmerged(self, y: Tensor, text: int) -> Tensor:
        """Undo `_merged` in shape: y [B, K + text, C]."""
        assert self._merge is not None
        if not text:
            return self._merge.unmerge(y)
        first = self.layout.text == "first"
        prompt, own = (y[:, :text], y[:, text:]) if first else (y[:, -text:], y[:, :-text])
        whole = self._merge.unmerge(own)
        return torch.cat([prompt, whole] if first else [whole, prompt], 1)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, Tensor) for part in value)


def _first(args: Any, kwargs: Any) -> tuple[Tensor, Any, Any]:
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), args, rest

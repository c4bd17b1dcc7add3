"""One call of an attention or feed-forward of a diffusion transformer, whole or for some of its tokens."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mmaccel.core.cached_modules import Module
from mmaccel.core.row_attention import KeysValues, RowAttention, joint_rows
from mmaccel.core.token_rows import put_rows, take_rows, take_tables
from mmaccel.errors import NotApplicableError

__all__ = ["ModuleCall"]


class ModuleCall:
    """A call that was caught. Tokens of the prompt may stand beside the latent's, or come as an argument of their own.

    states: the first argument, [B, N, D] or, with `beside` tokens of the prompt among it, [B, N + beside, D]. passed:
    names of the arguments that hold further ones.
    """

    def __init__(
        self, module: Module, call: Any, bound: inspect.BoundArguments, passed: list[str], layout: Any, tokens: int
    ) -> None:
        self.module, self.layout, self.tokens = module, layout, tokens
        self._call, self._bound, self._passed = call, bound, passed
        self._first: str = next(islice(bound.arguments, 1, None))
        self.states: Tensor = bound.arguments[self._first]
        self.beside = self.states.shape[1] - tokens if self.states.ndim > 1 else 0

    @property
    def latent(self) -> Tensor:
        """The latent's tokens of `states`."""
        return self._own(self.states)

    def whole(self, kept: KeysValues | None = None) -> Any:
        """Call for all tokens; an attention's keys and values go to `kept`."""
        with RowAttention(kept, None, self.tokens, self.layout.text) if kept is not None else nullcontext():
            return self._run()

    def some(self, rows: Tensor, kept: KeysValues | None) -> tuple[Tensor, Tensor | None]:
        """Call for rows int64 [B or 1, m] and all tokens of the prompt: outputs [B, m, D], and those of the prompt."""
        given = self._bound.arguments
        given[self._first] = take_rows(self.states, self._joint(rows), 1)
        if self.module.kind != "self-attention":
            return self.parted(self._run())
        inside = None
        for holder in (given, *(given[name] for name in self._passed if name in given)):
            for name in self.layout.rotary:
                if holder.get(name) is not None:
                    holder[name], inside = self._rotary(holder[name], rows)
        with RowAttention(kept, rows, self.tokens, self.layout.text, inside):
            return self.parted(self._run())

    def some_alone(self, rows: Tensor | None) -> Tensor:
        """Call for some rows, or none, of a layer, the others 0."""
        whole = self.states.new_zeros(*self.states.shape[:2], self.module.module.out_features)
        if rows is None:
            return whole
        rows = self._joint(rows)
        self._bound.arguments[self._first] = take_rows(self.states, rows, 1)
        return put_rows(whole, rows, self._run())

    def parted(self, output: Any) -> tuple[Tensor, Tensor | None]:
        """An output as that of the latent's tokens and that of the prompt's, None if these did not go through.

        Raises:
            NotApplicableError: there is more than that, as with an IP-Adapter.
        """
        if isinstance(output, tuple):
            if len(output) != 2:
                raise NotApplicableError(
                    f"{self.module.name} returns {len(output)} tensors, and 2 were expected; unload IP-Adapters first."
                )
            return output
        if not self.beside:
            return output, None
        prompt = output[:, : self.beside] if self.layout.text == "first" else output[:, -self.beside :]
        return self._own(output), prompt

    def joined(self, own: Tensor, prompt: Tensor | None) -> Any:
        """The two as the module gives them."""
        if prompt is None:
            return own
        if not self.beside:
            return own, prompt
        return torch.cat([prompt, own] if self.layout.text == "first" else [own, prompt], dim=1)

    def _run(self) -> Any:
        return self._call(*self._bound.args[1:], **self._bound.kwargs)

    def _own(self, states: Tensor) -> Tensor:
        if not self.beside:
            return states
        return states[:, self.beside :] if self.layout.text == "first" else states[:, : -self.beside]

    def _joint(self, rows: Tensor) -> Tensor:
        return joint_rows(rows, self.tokens, self.beside, self.layout.text) if self.beside else rows

    def _rotary(self, tables: Any, rows: Tensor) -> tuple[Any, Any]:
        """Rows of rotary tables, or, where every item has rows of its own and tables no batch axis, for inside."""
        taken = take_tables(tables, rows, self.tokens, self.layout)
        if self.layout.rotary_dim:
            return taken, None
        if rows.shape[0] == 1:
            return (taken[0][0], taken[1][0]), None
        return None, taken

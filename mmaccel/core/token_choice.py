"""Which tokens of a denoising step are computed: ranked once a step or once a module, alike for all branches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmaccel.core.token_rows import put_rows, take_rows
from mmaccel.tokens.refresh import cell_bonus, refresh_scores

__all__ = ["Signals", "TokenChoice"]


@dataclass(frozen=True)
class Signals:
    """What tokens are ranked by, beside the change of what they are given, which counts 1.

    staleness: weight of a step since the token was computed. bonus: share by which the best token of a `cell` x `cell`
    square is raised. by_module: rank anew for each module, by what that module is given, not once a step by what the
    first one is given.
    """

    staleness: float = 0.25
    cell: int = 2
    bonus: float = 0.0
    by_module: bool = False


class TokenChoice:
    """The rankings of one run. Only the first branch of guidance is looked at; the others follow it.

    grid: tokens along each axis. parts: branches of guidance that lie in one batch.
    """

    def __init__(self, signals: Signals, grid: tuple[int, ...], parts: int) -> None:
        self.signals, self.grid, self.parts = signals, grid, parts
        self._known: dict[str, tuple[Tensor, Tensor]] = {}
        self._order: dict[str, Tensor] = {}
        self._rows: dict[tuple[str, int], Tensor] = {}

    def begin(self) -> None:
        """A step begins: rankings are made anew."""
        self._order, self._rows = {}, {}

    def look(self, key: str, states: Tensor, count: int, *, rank: bool = True) -> None:
        """Rank the tokens of `states` [B, N, D] if asked to, and take the best `count` to be fresh from now on.

        The first look has nothing to compare with: all tokens are taken to be fresh then.
        """
        tokens = states.shape[1]
        known = self._known.get(key)
        if known is not None and rank and count:
            self._order[key] = self._ranked(states.detach(), known[0], known[1] + 1)
        if known is None or count == tokens:
            self._known[key] = states.detach(), torch.zeros(1, tokens, device=states.device)
            return
        reference, age = known[0], known[1] + 1
        if count:
            rows = self._repeated(self._order[key][:, :count], states.shape[0])
            reference = put_rows(reference, rows, take_rows(states.detach(), rows, 1))
            age = age.expand(rows.shape[0], -1).scatter(1, rows, 0.0)
        self._known[key] = reference, age

    def ranking(self, key: str, states: Tensor) -> Tensor | None:
        """All tokens, int64 [B / parts or 1, N], those that ask most first; None if nothing is known yet."""
        if key not in self._known:
            return None
        reference, age = self._known[key]
        return self._ranked(states.detach(), reference, age + 1)

    def _ranked(self, states: Tensor, reference: Tensor, age: Tensor) -> Tensor:
        scores = refresh_scores(states, reference, age, staleness=self.signals.staleness).nan_to_num(0.0)
        if self.parts > 1:
            scores = scores.unflatten(0, (self.parts, -1)).mean(0)
        if self.signals.bonus:
            scores = cell_bonus(scores, self.grid, self.signals.cell, self.signals.bonus)
        return scores.sort(dim=1, descending=True, stable=True).indices

    def _repeated(self, rows: Tensor, batch: int) -> Tensor:
        return rows if rows.shape[0] in (1, batch) else rows.repeat(self.parts, 1)

    def rows(self, key: str, count: int, batch: int) -> Tensor:
        """The best `count` tokens, int64 [batch or 1, count], ascending."""
        if (key, count) not in self._rows:
            self._rows[key, count] = self._repeated(self._order[key][:, :count].sort(1).values, batch)
        return self._rows[key, count]

    @property
    def nbytes(self) -> int:
        """The memory held, in bytes."""
        return sum(reference.nbytes + age.nbytes for reference, age in self._known.values())

"""Levels: each row of a table takes one of a few levels, so that the loss is least and the work is exactly a total."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mmaccel.errors import MethodError

__all__ = ["LevelPlan", "cheapest_levels", "rows_of_level"]


@dataclass(frozen=True)
class LevelPlan:
    """Which share of the tokens is computed at each step, in each layer, in each kind of module.

    units: int64 (T, L, M), of `whole` units each. kinds: names of the M kinds of modules. cost: share of the work of
    computing everything, in the measure that the plan was made for.
    """

    units: torch.Tensor
    whole: int
    cost: float
    kinds: tuple[str, ...] = ("self-attention", "cross-attention", "mlp")

    @classmethod
    def dense(cls, steps: int, layers: int) -> LevelPlan:
        """Everything is computed."""
        return cls.of_steps(torch.ones(steps, dtype=torch.int64), 1, layers)

    @classmethod
    def of_steps(cls, units: torch.Tensor, whole: int, layers: int) -> LevelPlan:
        """One level a step: units int64 (T,)."""
        return cls.of_layers(units[:, None].expand(-1, layers), whole)

    @classmethod
    def of_layers(cls, units: torch.Tensor, whole: int) -> LevelPlan:
        """One level a layer of a step: units int64 (T, L)."""
        return cls(units[..., None].expand(-1, -1, 3), whole, float(units.double().mean() / whole))

    @property
    def partial(self) -> bool:
        """Whether any level lies between none and all."""
        return bool(((self.units > 0) & (self.units < self.whole)).any())

    def counts(self, step: int, tokens: int) -> list[int]:
        """How many of `tokens` modules compute at a step, each number once."""
        units = self.units[min(step, len(self.units) - 1)].unique().tolist()
        return [rows_of_level(level, self.whole, tokens) for level in units]

    def at(self, step: int, layer: int, kind: str) -> int:
        """Units of a module at a step; a step behind the last is as the last."""
        return int(self.units[min(step, len(self.units) - 1), layer, self.kinds.index(kind)])

    def rows(self, step: int, layer: int, kind: str, tokens: int) -> int:
        """How many of `tokens` a module computes at a step."""
        return rows_of_level(self.at(step, layer, kind), self.whole, tokens)

    def ahead(self, step: int, layer: int, kind: str, *, later: bool = False) -> bool:
        """Whether the next step, or with `later` any that follows, takes something from what this one leaves."""
        end = len(self.units) if later else min(step + 2, len(self.units))
        return any(self.at(other, layer, kind) < self.whole for other in range(step + 1, end))

    def partial_ahead(self, step: int, layer: int, kind: str, *, first: bool = True) -> bool:
        """Whether a later step computes some tokens of a module, with `first` before one computes all of them."""
        units = [self.at(later, layer, kind) for later in range(step + 1, len(self.units))]
        units = [value for value in units if value]
        return any(value < self.whole for value in (units[:1] if first else units))


def rows_of_level(units: int, whole: int, tokens: int) -> int:
    """How many of `tokens` are computed at a level of `units` of `whole`, rounded half up."""
    return (2 * units * tokens + whole) // (2 * whole)


def cheapest_levels(
    losses: torch.Tensor, weights: torch.Tensor, total: int, forced: torch.Tensor | None = None
) -> torch.Tensor:
    """Choose a level for each row, so that the weights sum to `total` exactly and the sum of losses is least.

    losses: floating (R, S), finite; weights: int64 (S,) or (R, S), not negative. forced: int64 (R,), the level that a
    row must take, -1 where it is free. Returns the levels, int64 (R,). An exact dynamic program over the budget: R x S
    x total steps in float64, vectorised over the budget. Among equal losses the lower level of the last row wins.
    Source of the program: DiffSparse (2026).

    Raises MethodError where no choice has this total, and names the nearest total that has one.
    """
    if losses.ndim != 2 or weights.shape not in ((losses.shape[1],), losses.shape):
        raise MethodError(
            f"losses must be (R, S) and weights (S,) or (R, S); got {tuple(losses.shape)} and {tuple(weights.shape)}"
        )
    if weights.is_floating_point() or bool((weights < 0).any()):
        raise MethodError("the weights of levels are whole numbers that are not negative")
    table = losses.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(table).all():
        raise MethodError("the losses of levels must be finite")
    work = weights.to("cpu", torch.int64).expand(losses.shape).numpy()
    fixed = [-1] * len(table) if forced is None else forced.tolist()
    if len(fixed) != len(table) or not all(-1 <= level < table.shape[1] for level in fixed):
        raise MethodError(f"forced must be (R,), each -1 or one of {table.shape[1]} levels")
    # sums that cannot come back to the total from below are kept, so that the nearest total can be named
    most = int(work.max(1, initial=0).sum())
    best = np.full(most + 1, np.inf)
    best[0] = 0.0
    choices = np.zeros((len(table), most + 1), dtype=np.int8 if table.shape[1] < 128 else np.int32)
    for row, only in enumerate(fixed):
        found = np.full(most + 1, np.inf)
        for level in range(table.shape[1]) if only < 0 else (only,):
            step = int(work[row, level])
            through = best[: most + 1 - step] + table[row, level]
            better = through < found[step:]
            found[step:][better] = through[better]
            choices[row, step:][better] = level
        best = found
    reachable = np.isfinite(best).nonzero()[0]
    if not 0 <= total <= most or not np.isfinite(best[total]):
        nearest = int(reachable[np.abs(reachable - total).argmin()])
        raise MethodError(f"no choice of levels sums to {total}; the nearest total that one does is {nearest}")
    chosen = []
    for row in range(len(table) - 1, -1, -1):
        chosen.append(int(choices[row, total]))
        total -= int(work[row, chosen[-1]])
    return torch.tensor(chosen[::-1], dtype=torch.int64, device=losses.device)

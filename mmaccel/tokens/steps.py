"""How often each token of a latent is computed in a run of denoising steps, for a given share of the work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from mmaccel.errors import MethodError

__all__ = ["Plan", "SpreadPlan", "StepPlan", "smallest_runtime", "spread_plan", "step_plan"]

_FEWEST, _DISTILLED = 3, 6
_LARGEST_GAP = 16
_FALL = 5.0


class Plan(Protocol):
    """Who is computed when, in `steps` denoising steps."""

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        ...

    def active(self, tokens: int) -> Tensor:
        """Bool [steps, tokens], tokens in the order of their need, the neediest first."""
        ...


@dataclass(frozen=True)
class SpreadPlan:
    """Step n computes the neediest `fractions[n]` of the tokens: 1 all, 0 none."""

    fractions: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return len(self.fractions)

    def active(self, tokens: int) -> Tensor:
        """Who is computed when: bool [steps, tokens], tokens in the order of their need, the neediest first."""
        counts = torch.tensor([round(part * tokens) for part in self.fractions])
        return torch.arange(tokens) < counts[:, None]


def spread_plan(
    steps: int, runtime: float, *, between: float = 0.0, share: float = 0.5, multistep: bool = False
) -> SpreadPlan:
    """Spread whole steps evenly, and spend the rest on the neediest tokens between the first of them.

    between: the fraction of the budget `runtime * steps` for steps that compute about `share` of the tokens; they
    stand in the middle of the first gaps. What is no whole step is theirs as well, so that the budget is met.
    multistep: for solvers that build on the last few velocities: whole steps are closer at the beginning, and the last
    step is one of them, because such solvers end with a step of first order, which is long.

    Raises:
        MethodError: fewer than 6 steps, as distilled models take, or fewer than 3 steps' worth of work, or gaps above
            16 steps; the message names the smallest runtime that can be reached.
    """
    if runtime >= 1.0:
        return SpreadPlan((1.0,) * steps)
    budget = runtime * steps
    if steps < _DISTILLED:
        raise MethodError(
            f"with {steps} steps, as distilled models take, each one moves the latents far and it does not pay to hold "
            f"velocities: the smallest runtime is 1. Take {_DISTILLED} steps or more, or remove the method."
        )
    fewest = max(_FEWEST, math.ceil(steps / _LARGEST_GAP))
    if budget < fewest - 1e-9:
        smallest = min(1.0, math.ceil(fewest / steps * 1000) / 1000)
        raise MethodError(
            f"runtime={runtime:g} cannot be reached in {steps} steps: fewer than {fewest} of them would be computed; "
            f"the smallest runtime is {smallest:g}."
        )
    fractions = [0.0] * steps
    whole = max(fewest - 1, math.floor(budget * (1 - between) + 1e-9))
    rest = budget - whole
    turns = _early(steps, whole) if multistep else _even(steps, whole)
    if len(_middles(turns, steps)) < math.ceil(rest - 1e-9):
        turns = _even(steps, whole)
    for step in turns:
        fractions[step] = 1.0
    chosen = _middles(turns, steps)[: max(math.ceil(rest - 1e-9), round(rest / share))]
    for step in chosen:
        fractions[step] = rest / len(chosen)
    return SpreadPlan(tuple(fractions))


def _middles(turns: list[int], steps: int) -> list[int]:
    return [(a + b) // 2 for a, b in pairwise([*turns, steps]) if b - a > 1]


def _even(steps: int, whole: int) -> list[int]:
    # the shorter gaps come first, where noise is largest and a wrong turn is not taken back
    short = whole - steps % whole
    return [index * (steps // whole) + max(0, index - short) for index in range(whole)]


def _early(steps: int, whole: int) -> list[int]:
    """From the first step to the last one, closer at the beginning."""
    # short gaps cannot become much shorter: one and two in turn came out further from dense than two throughout
    rise = min(1.0, max(0.5, ((steps - 1) / (whole - 1) - 1) / 2))
    # density of whole steps at a share x of the run: 1 + rise * exp(-_FALL * x), and its integral
    covered = [x + rise / _FALL * (1 - math.exp(-_FALL * x)) for x in (step / steps for step in range(steps))]
    wanted = [index * covered[-1] / (whole - 1) for index in range(whole)]
    turns = [0]
    for index in range(1, whole):
        nearest = min(range(steps), key=lambda step: abs(covered[step] - wanted[index]))
        turns.append(min(max(nearest, turns[-1] + 1), steps - whole + index))
    too_long = max(b - a for a, b in pairwise(turns)) > _LARGEST_GAP
    return _even(steps, whole) if too_long else turns


@dataclass(frozen=True)
class StepPlan:
    """Steps 0 .. first-1 and the last `last` ones compute every token; in between tokens have divisors.

    shares: the fraction of the tokens that each of `divisors` gets. A token with divisor d is computed at every d-th
    step in between.
    """

    steps: int
    first: int
    last: int
    divisors: tuple[int, ...]
    shares: tuple[float, ...]
    staggered: bool = False

    @property
    def window(self) -> int:
        """Number of steps in between."""
        return self.steps - self.first - self.last

    def active(self, tokens: int) -> Tensor:
        """Who is computed when: bool [steps, tokens], tokens in the order of their need, the neediest first.

        In between, counted from the last whole step, a token of divisor d is computed at every d-th step. Groups are
        aligned, so that a token is never computed beside staler neighbours than its own divisor asks for; `staggered`
        has the tokens of a group take turns instead, so that steps cost alike.
        """
        edges = [round(tokens * part) for part in torch.tensor(self.shares, dtype=torch.float64).cumsum(0).tolist()]
        counts = [end - begin for begin, end in zip([0, *edges], edges, strict=False)]
        counts[-1] += tokens - sum(counts)
        divisor = torch.repeat_interleave(torch.tensor(self.divisors), torch.tensor(counts))
        turn = torch.arange(tokens) % divisor if self.staggered else 0
        active = torch.ones(self.steps, tokens, dtype=torch.bool)
        active[self.first : self.first + self.window] = (
            torch.arange(1, self.window + 1)[:, None] + turn
        ) % divisor == 0
        return active


def smallest_runtime(steps: int, first: int, last: int, divisor: int) -> float:
    """The runtime with every token at one divisor between the dense steps."""
    dense = min(steps, first + last)
    return (dense + (steps - dense) // divisor) / steps


def step_plan(
    steps: int, runtime: float, *, divisors: tuple[int, ...] = (), first: int | None = None, last: int | None = None,
    largest: int = 16, staggered: bool = False,
) -> StepPlan:  # fmt: skip
    """Find dense steps and shares of the divisors so that `runtime * steps` dense steps' worth of tokens is computed.

    first, last: dense steps at both ends, by default a thirteenth of the steps (at least 2) and none. divisors: by
    default d and 2 d, d being the largest for which the budget suffices, so that all tokens meet at every other turn;
    `largest` bounds d. The shares of several divisors are the flattest that meet the budget (the distribution of
    largest entropy); divisors that cannot meet it from above come as near as they can from below.

    Raises:
        MethodError: `runtime` cannot be reached; the message names the smallest runtime that can.
    """
    if runtime >= 1.0:
        return StepPlan(steps, steps, 0, (1,), (1.0,))
    last = 0 if last is None else last
    budget = runtime * steps
    limit = max(divisors, default=largest)
    usual = max(2, round(steps / 13))
    begins = (*range(usual, 1, -1), *range(usual + 1, steps - last)) if first is None else (first,)
    best: tuple[float, StepPlan] | None = None
    for begin in begins:
        window = steps - begin - last
        if window < 1:
            continue
        share = (budget - begin - last) / window
        groups = divisors or _pair(share, window, largest)
        rates = [window // divisor / window for divisor in groups]
        if share < min(rates) - 1e-9:
            continue
        spent = begin + last + min(share, max(rates)) * window
        if best is None or spent > best[0] + 1e-9:
            best = spent, StepPlan(steps, begin, last, groups, _flattest(rates, min(share, max(rates))), staggered)
        if share <= max(rates) + 1e-9:
            break
    if best is not None:
        return best[1]
    fewest = 2 if first is None else first
    smallest = smallest_runtime(steps, fewest, last, limit)
    raise MethodError(
        f"runtime={runtime:g} cannot be reached in {steps} steps: {fewest} at the beginning and {last} at the end "
        f"compute everything, and the largest divisor is {limit}; the smallest runtime is "
        f"{math.ceil(smallest * 1000) / 1000:g}."
        + (" With so few steps it does not pay; remove the method." if steps < 10 else "")
    )


def _pair(share: float, window: int, largest: int) -> tuple[int, ...]:
    if share <= 0:
        return (largest,)
    divisor = next((d for d in range(largest, 0, -1) if window // d / window >= share - 1e-9), 1)
    return (divisor, 2 * divisor)


def _flattest(rates: list[float], mean: float) -> tuple[float, ...]:
    known = torch.tensor(rates, dtype=torch.float64)
    low, high, shares = -1e4, 1e4, known
    for _ in range(200):
        tilt = (low + high) / 2
        shares = torch.softmax(tilt * known, 0)
        low, high = (tilt, high) if float(shares @ known) < mean else (low, tilt)
    return tuple(shares.tolist())

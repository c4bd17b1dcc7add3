"""How often each token of a latent is computed in a run of denoising steps, for a given share of the work."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmaccel.errors import MethodError

__all__ = ["StepPlan", "smallest_runtime", "step_plan"]


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

    @property
    def window(self) -> int:
        """Number of steps in between."""
        return self.steps - self.first - self.last

    def active(self, tokens: int) -> Tensor:
        """Who is computed when: bool [window, tokens], tokens in the order of their need, the neediest first.

        Tokens of one divisor take turns, so that the steps cost alike.
        """
        edges = [round(tokens * part) for part in torch.tensor(self.shares).cumsum(0).tolist()]
        counts = [end - begin for begin, end in zip([0, *edges], edges, strict=False)]
        counts[-1] += tokens - sum(counts)
        divisor = torch.repeat_interleave(torch.tensor(self.divisors), torch.tensor(counts))
        turn = torch.arange(tokens) % divisor
        return torch.arange(self.window)[:, None] % divisor == turn

    def runtime(self, tokens: int) -> float:
        """The fraction of all token evaluations that this plan makes."""
        if not self.window:
            return 1.0
        return float((self.first + self.last + self.active(tokens).float().mean(1).sum()) / self.steps)


def smallest_runtime(steps: int, first: int, last: int, divisor: int) -> float:
    """The runtime with every token at one divisor between the dense steps."""
    dense = min(steps, first + last)
    return (dense + (steps - dense) / divisor) / steps


def step_plan(
    steps: int, runtime: float, *, divisors: tuple[int, ...], first: int | None = None, last: int | None = None,
    least: tuple[int, int] = (2, 1), dense: float = 0.4,
) -> StepPlan:  # fmt: skip
    """Find dense steps and shares of the divisors so that `runtime * steps` dense steps' worth of tokens is computed.

    first, last: dense steps at both ends; None has `dense` of the work done there, but at least `least`, four fifths
    of it at the beginning. The shares are the flattest that meet the budget (the distribution of largest entropy).

    Raises:
        MethodError: `runtime` cannot be reached; the message names the smallest runtime that can.
    """
    if runtime >= 1.0:
        return StepPlan(steps, steps, 0, divisors, (1.0, *(0.0,) * (len(divisors) - 1)))
    budget = runtime * steps
    fewest = (least[0] if first is None else first, least[1] if last is None else last)
    smallest = smallest_runtime(steps, *fewest, max(divisors))
    if runtime < smallest - 1e-9 or sum(fewest) >= steps:
        raise MethodError(
            f"runtime={runtime:g} cannot be reached in {steps} steps: the first {fewest[0]} and the last {fewest[1]} "
            f"compute everything, and the largest divisor is {max(divisors)}; the smallest runtime is "
            f"{math.ceil(smallest * 1000) / 1000:g}"
            + (". With so few steps it does not pay; remove the method." if smallest > 0.7 else ".")
        )
    total = max(sum(fewest), round(dense * budget))
    while total > sum(fewest) and (budget - total) / (steps - total) < 1.0 / max(divisors):
        total -= 1
    if last is None:
        last = max(least[1], round(total / 5)) if first is None else max(least[1], min(total - first, round(total / 5)))
    if first is None:
        first = max(least[0], total - last)
    share = (budget - first - last) / (steps - first - last)
    return StepPlan(steps, first, last, divisors, _flattest(divisors, min(1.0, max(share, 1.0 / max(divisors)))))


def _flattest(divisors: tuple[int, ...], mean: float) -> tuple[float, ...]:
    rates = torch.tensor([1.0 / divisor for divisor in divisors], dtype=torch.float64)
    low, high = -1e4, 1e4
    for _ in range(200):
        tilt = (low + high) / 2
        shares = torch.softmax(tilt * rates, 0)
        low, high = (tilt, high) if float(shares @ rates) < mean else (low, tilt)
    return tuple(shares.tolist())

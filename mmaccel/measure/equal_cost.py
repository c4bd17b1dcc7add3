"""Two methods at the same cost, though neither was run at just that of the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmaccel.errors import MMAccelError
from mmaccel.measure.quality import bootstrap_difference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmaccel.measure.quality import Interval

__all__ = ["Curve", "at_equal_cost"]


@dataclass(frozen=True, eq=False)
class Curve:
    """The settings of one method: costs, ascending, and which of the same n questions each answered rightly.

    Raises:
        MMAccelError: no settings, costs that do not rise, or different numbers of questions.
    """

    costs: Sequence[float]
    hits: Sequence[np.ndarray]

    def __post_init__(self) -> None:
        falls = any(b < a for a, b in zip(self.costs, self.costs[1:], strict=False))
        if not self.costs or len(self.costs) != len(self.hits) or falls or len({len(one) for one in self.hits}) != 1:
            raise MMAccelError("a curve takes settings with rising costs, all with the same questions.")

    def at(self, cost: float) -> np.ndarray | None:
        """float64 [n], the hits at a cost: those of the two settings beside it, mixed; None where all cost more.

        Who has the budget of a cost can run each of the two settings a share of the time.
        """
        if cost < self.costs[0]:
            return None
        above = next((place for place, one in enumerate(self.costs) if one > cost), None)
        if above is None:
            return np.asarray(self.hits[-1], dtype=np.float64)
        low, high = self.costs[above - 1], self.costs[above]
        share = (cost - low) / (high - low)
        return (1 - share) * np.asarray(self.hits[above - 1]) + share * np.asarray(self.hits[above])


def at_equal_cost(
    cost: float, hits: np.ndarray, rival: Curve, groups: np.ndarray, *, samples: int = 10_000
) -> Interval | None:
    """Compare a setting, with its cost and hits [n], with what `rival` answers at that cost; paired, clips are drawn.

    groups [n]: which questions belong together. None where the rival always costs more.
    """
    other = rival.at(cost)
    return None if other is None else bootstrap_difference(hits, other, groups, samples=samples)

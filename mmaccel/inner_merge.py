"""The inner half of HoliTom, which EarlyTom has as well: merge once more between two decoder layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmaccel.reducer import TwiceReducer
from mmaccel.tokens import reduce, select

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens
    from mmaccel.tokens.place import Reduction

__all__ = ["InnerMerge"]


@dataclass(frozen=True)
class InnerMerge(TwiceReducer):
    """Merges, before decoder layer `inner_layer`, the tokens that the last prompt token attends to least.

    Each goes into the kept token most like it, all in one mean.
    """

    inner_depth: ClassVar[float] = 0.64  # layer 18 of 28

    def reduce_inside(self, tokens: VisualTokens) -> Reduction | None:
        """The inner part on all visual tokens of a prompt."""
        n = len(tokens)
        wanted = max(1, round(n * self.inner_keep))
        if wanted >= n:
            return None
        assert tokens.score is not None
        kept = select.top_k(tokens.score[None], wanted)
        return reduce.merge_dropped_into_kept(tokens.features[None].float(), kept).reduction(0)

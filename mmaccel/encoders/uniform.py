"""Uniform: evenly spaced tokens, the baseline without any choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmaccel.method import Info, Stage
from mmaccel.reducer import BEFORE_LLM, GridReducer
from mmaccel.tokens import select
from mmaccel.tokens.place import Reduction

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens


@dataclass(frozen=True)
class Uniform(GridReducer):
    """Keep evenly spaced visual tokens, counted in raster order through all frames.

    Sentence: position -> whole item -> evenly spaced -> drop -> place.
    """

    info: ClassVar[Info] = Info(
        name="uniform", verb="drop", stage=Stage.BEFORE_LLM, summary="keeps evenly spaced visual tokens",
        source="equal-cost baseline", year=2026, targets=("video-lm",), slots=(BEFORE_LLM,), baseline=True,
    )  # fmt: skip

    streams: ClassVar[bool] = True

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Drop all but every n-th token."""
        n = len(tokens)
        return Reduction(select.evenly_spaced(n, self.budget(n), tokens.features.device))

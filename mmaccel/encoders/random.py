"""Random: the baseline that every token reducer has to beat at the same budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmaccel.method import Info, Stage, knob
from mmaccel.reducer import BEFORE_LLM, GridReducer
from mmaccel.tokens import select, signals
from mmaccel.tokens.place import Reduction

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens


_SEED_STEP = 1_009


@dataclass(frozen=True)
class Random(GridReducer):
    """Keep a random choice of the visual tokens, the same for every call with the same seed.

    Sentence: random number -> whole item -> top-k -> drop -> place.
    """

    seed: int = knob(0, "seed of the choice; each grid of a prompt draws anew", low=0)

    info: ClassVar[Info] = Info(
        name="random", verb="drop", stage=Stage.BEFORE_LLM, summary="keeps a random choice of the visual tokens",
        source="equal-cost baseline", year=2026, targets=("video-lm",), slots=(BEFORE_LLM,), baseline=True,
    )  # fmt: skip

    streams: ClassVar[bool] = True

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Drop all but a random choice."""
        # far apart, so that no grid of one seed draws what another grid of the next seed draws
        seed = self.seed * _SEED_STEP + tokens.number
        scores = signals.random((1, len(tokens)), seed=seed, device=tokens.features.device)
        return Reduction(select.top_k(scores, self.budget(len(tokens)))[0])

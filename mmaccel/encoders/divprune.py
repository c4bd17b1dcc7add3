"""DivPrune: the most diverse tokens, by farthest-point sampling."""

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
class DivPrune(GridReducer):
    """DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (2025).

    Sentence: 1 - cosine between tokens -> whole item -> farthest point -> drop -> place. The first token is the one
    whose nearest neighbour is farthest, each next one the token that is farthest from all chosen before; ties go to the
    earlier token. Needs features only. Each image or video is reduced by itself.
    """

    info: ClassVar[Info] = Info(
        name="divprune", verb="drop", stage=Stage.BEFORE_LLM, summary="keeps the tokens most unlike each other",
        source="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", year=2025,
        targets=("video-lm",), slots=(BEFORE_LLM,),
    )  # fmt: skip

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Drop what is like something that stays."""
        return Reduction(select.farthest_point(tokens.features[None], self.budget(len(tokens)))[0])

"""IDPruner: tokens that are important and unlike each other, by maximal marginal relevance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from mmaccel.method import Info, Stage, knob
from mmaccel.reducer import BEFORE_LLM, GridReducer
from mmaccel.tokens import select, signals
from mmaccel.tokens.place import Reduction

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens


@dataclass(frozen=True)
class IDPruner(GridReducer):
    """IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs (2026).

    Sentence: importance, brought to [0, 1] -> whole item -> maximal marginal relevance -> drop -> place. The first
    token is the most important one; each next one maximises balance * importance - (1 - balance) * its largest cosine
    with a token that was chosen before. Ties go to the earlier token.

    Differs from the paper: importance comes from a scorer that was trained with the model there; here it is taken from
    what every model has (inferred): the attention of the class token (or, without one, attention received) in the
    vision layer that the language model sees, the norm of the projected feature, or nothing, which leaves diversity
    alone. The paper chooses among all images of a prompt together; here each image or video is reduced by itself, as
    `keep` is counted for each.
    """

    balance: float = knob(
        0.5, "weight of importance against diversity; 1 is top-k, 0 diversity alone", low=0.0, high=1.0
    )
    per_round: int = knob(1, "tokens chosen at once between two updates of the cosines; more is coarser", low=1)
    importance: Literal["attention", "norm", "constant"] = knob(
        "attention", "what stands in for the paper's trained scorer", choices=("attention", "norm", "constant")
    )

    info: ClassVar[Info] = Info(
        name="idpruner", verb="drop", stage=Stage.BEFORE_LLM,
        summary="keeps important tokens that are unlike each other",
        source="IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs", year=2026,
        targets=("video-lm",), slots=(BEFORE_LLM,), needs=("vision attention",), licence="AngelSlim's own terms",
    )  # fmt: skip
    needs_scores: ClassVar[bool] = True

    @property
    def reads_scores(self) -> bool:
        """Norm and constant importance leave the vision tower alone."""
        return self.importance == "attention"

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Drop what matters little or is shown already."""
        x = tokens.features[None]
        scores = signals.min_max(self._importance(tokens)[None])
        budget = self.budget(len(tokens))
        return Reduction(select.mmr(scores, x, budget, balance=self.balance, per_round=self.per_round)[0])

    def _importance(self, tokens: VisualTokens) -> torch.Tensor:
        """float32 [N]."""
        if self.importance == "norm":
            return signals.norm(tokens.features)
        if self.importance == "constant":
            return torch.zeros(len(tokens), device=tokens.features.device)
        assert tokens.score is not None
        return tokens.score

"""VisionZip: keep the tokens that the vision encoder attends to, and average the rest into a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mmaccel.method import Info, Stage, knob
from mmaccel.reducer import BEFORE_LLM, GridReducer
from mmaccel.tokens import allocate, reduce, select
from mmaccel.tokens.place import Reduction

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens


@dataclass(frozen=True)
class VisionZip(GridReducer):
    """VisionZip: Longer is Better but Not Necessary in Vision Language Models (2024).

    Sentence: attention of the class token (or, without one, attention received) in the vision layer that the language
    model sees -> evenly over frames -> top-k -> merge the rest -> place. Of each frame's budget the share `contextual`
    is made of evenly spaced targets among the rest; every other token is averaged into the target most like it.
    Differs from the paper: likeness is the cosine of projected features, because the encoder's keys have no
    counterpart after pooling or patch merging (inferred to be equivalent in purpose).
    """

    contextual: float = knob(
        0.136, "share of the budget that is averaged context; 30 of 221 in the paper", low=0.0, high=1.0
    )

    info: ClassVar[Info] = Info(
        name="visionzip", verb="merge", stage=Stage.BEFORE_LLM,
        summary="keeps tokens with most encoder attention, averages the rest into context tokens",
        source="VisionZip: Longer is Better but Not Necessary in Vision Language Models", year=2024,
        targets=("video-lm",), slots=(BEFORE_LLM,), needs=("vision attention",), licence="Apache-2.0",
    )  # fmt: skip
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "llava": {"keep": 221, "contextual": 0.136, "source": "paper: 191 dominant + 30 contextual of 576"}
    }
    needs_scores: ClassVar[bool] = True

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Keep dominant tokens of every frame, merge the others into contextual ones."""
        assert tokens.score is not None
        T, S = tokens.frames()
        budgets = allocate.per_frame(self.budget(len(tokens)), torch.ones(T), S).tolist()
        x = tokens.features.view(T, S, -1)
        score = tokens.score.view(T, S)
        frames = [_frame(x[t], score[t], n, round(n * self.contextual)) for t, n in enumerate(budgets)]
        return reduce.joined(frames, [S] * T)


def _frame(x: torch.Tensor, score: torch.Tensor, budget: int, contextual: int) -> Reduction:
    dominant = select.top_k(score[None], budget - contextual)[0]
    rest = torch.ones(len(x), dtype=torch.bool, device=x.device)
    rest[dominant] = False
    others = rest.nonzero().squeeze(1)
    if contextual == 0:
        return Reduction(dominant)
    targets = others[select.evenly_spaced(len(others), contextual, x.device)]
    centres = torch.cat([dominant, targets]).sort().values
    # dominant tokens stand for themselves: they are centres that nobody may join
    joins = reduce.nearest_centre(x[others][None].float(), torch.searchsorted(others, targets)[None], metric="cosine")[
        0
    ]
    assignment = torch.searchsorted(centres, torch.arange(len(x), device=x.device).clamp_max(int(centres[-1])))
    assignment[others] = torch.searchsorted(centres, targets)[joins]
    assignment[dominant] = torch.searchsorted(centres, dominant)
    merge = reduce.merge_by_assignment(assignment[None], len(centres))
    reduction = merge.reduction(0)
    return Reduction(centres, reduction.mix)

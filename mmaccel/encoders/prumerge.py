"""LLaVA-PruMerge: keep the tokens with unusually much encoder attention, let each take in those most like it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mmaccel.errors import MethodError
from mmaccel.method import Info, Stage, knob
from mmaccel.reducer import BEFORE_LLM, GridReducer
from mmaccel.tokens import allocate, reduce, select
from mmaccel.tokens.place import Mix, Reduction

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens

_ABSORBED = 32 / 576  # the paper's neighbours, of the tokens of its images


@dataclass(frozen=True)
class PruMerge(GridReducer):
    """LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (2024).

    Sentence: attention of the class token (or, without one, attention received) in the vision layer that the language
    model sees -> evenly over frames, or as many as stand out -> top-k, and evenly spaced tokens (the "+" variant)
    -> each takes in its nearest `neighbours`, weighted by attention, and one token holds what was dropped -> place.

    With `adaptive` the number is the paper's: in each frame the tokens above the third quartile plus 1.5 interquartile
    ranges, at least one, and one for the rest; `keep` is not used then, and the report shows what was reached.

    Differs from the paper: likeness is the cosine of projected features, because the encoder's keys have no counterpart
    after pooling or patch merging. `neighbours` is in proportion to the tokens of a frame. A merged token is divided by
    the sum of its weights (1 for itself, the share of the frame's attention for others), where the authors' code adds
    up. The token for the rest is part of the budget, left out where a frame has one token, and stands at the dropped
    token with most attention (all inferred). The evenly spaced tokens are a share of the kept ones; the authors' code
    spaces three for each that stands out.
    """

    neighbours: int | None = knob(
        None,
        "tokens that each kept one takes in, 0 for none; default 1/18 of the frame's, the paper's 32 of 576",
        low=0,
    )
    spread: float = knob(0.0, 'share of the kept tokens that is evenly spaced, for the "+" variant', low=0.0, high=1.0)
    rest: bool = knob(True, "one token of each frame is the mean of all that were dropped, weighted by attention")
    adaptive: bool = knob(False, "the paper's number of tokens, those that stand out by attention: keep is not used")

    info: ClassVar[Info] = Info(
        name="prumerge", verb="merge", stage=Stage.BEFORE_LLM,
        summary="keeps tokens with most encoder attention, each takes in those most like it",
        source="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", year=2024,
        targets=("video-lm",), slots=(BEFORE_LLM,), needs=("vision attention",), licence="no licence file found",
    )  # fmt: skip
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "llava": {"adaptive": True, "neighbours": 32, "source": "authors' code"},
        "llava plus": {"adaptive": True, "neighbours": 32, "spread": 0.75, "source": "authors' code: 3 an outlier"},
    }  # fmt: skip
    needs_scores: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adaptive and self.spread == 1.0:
            raise MethodError("prumerge: spread=1.0 leaves adaptive no token to count by; give a spread below 1.")

    def _neighbours(self, S: int) -> int:
        return max(1, round(S * _ABSORBED)) if self.neighbours is None else self.neighbours

    @property
    def neutral(self) -> bool:
        """Keep everything; what is adaptive keeps what stands out, whatever `keep` says."""
        return super().neutral and not self.adaptive

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Keep what is attended to, merge the others into it."""
        assert tokens.score is not None
        T, S = tokens.frames()
        x, score = tokens.features.view(T, S, -1), tokens.score.view(T, S)
        frames = [self._frame(x[t], score[t], *numbers) for t, numbers in enumerate(self._numbers(score))]
        return reduce.joined(frames, [S] * T)

    def _numbers(self, score: torch.Tensor) -> list[tuple[int, int, int]]:
        """For each frame of score [T, S]: tokens kept by attention, evenly spaced ones, and 1 for the rest or 0."""
        T, S = score.shape
        if self.adaptive:
            out = select.outliers(score, minimum=1).sum(1).tolist()
            spaced = [min(S - n, round(n * self.spread / (1 - self.spread))) for n in out]
            return [(n, m, int(self.rest and n + m < S)) for n, m in zip(out, spaced, strict=True)]
        numbers = []
        for budget in allocate.per_frame(self.budget(T * S), torch.ones(T), S).tolist():
            last = int(self.rest and 1 < budget < S)
            spaced = round((budget - last) * self.spread)
            numbers.append((budget - last - spaced, spaced, last))
        return numbers

    def _frame(self, x: torch.Tensor, score: torch.Tensor, best: int, spaced: int, last: int) -> Reduction:
        top = select.top_k(score[None], best)
        others = (~select.mask_of(top, len(x))[0]).nonzero().squeeze(1)
        kept = torch.cat([top[0], others[select.evenly_spaced(len(others), spaced, x.device)]]).sort().values
        total = score.sum()
        share = score / total if total > 0 else torch.full_like(score, 1 / len(score))
        merged = reduce.absorb_nearest(x, kept, share, self._neighbours(len(x)))
        return _with_rest(merged, share) if last else merged


def _with_rest(kept: Reduction, share: torch.Tensor) -> Reduction:
    """One more token, the mean of all dropped ones weighted by share [S], in its place among the kept."""
    dropped = (~select.mask_of(kept.index[None], len(share))[0]).nonzero().squeeze(1)
    weight = share[dropped]
    total = weight.sum()
    weight = weight / total if total > 0 else torch.full_like(weight, 1 / len(weight))
    index, order = torch.cat([kept.index, dropped[weight.argmax()][None]]).sort()
    rows, cols, weights = torch.full_like(dropped, len(kept.index)), dropped, weight
    if kept.mix is not None:
        rows, cols, weights = (
            torch.cat([kept.mix.rows, rows]),
            torch.cat([kept.mix.cols, cols]),
            torch.cat([kept.mix.weights, weights]),
        )
    return Reduction(index, Mix(order.argsort()[rows], cols, weights))
